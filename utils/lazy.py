"""Modules that take a second to import: named at the top of a file like others, loaded by those runs that use them."""

import importlib


class Lazy:
    """A module, which is imported when something in it is first asked for.

    Args: name: of the module, as "scipy.stats".
    Raises: ImportError then, where there is no such module.
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        return getattr(importlib.import_module(self._name), name)
