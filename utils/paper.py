"""Reads the checkpoints of the paper's repository: bare state dicts with other parameter names."""

import torch

from utils.cli import UserError, need

# Each layout of parameter names: the methods that have it, and {their prefix: our prefix}. A
# checkpoint has a layout if each of its names begins with one of these prefixes, and every prefix
# occurs.
LAYOUTS = [
    (
        ("asymvlm-psd", "asymvlm-vmf"),
        {
            "text_adaptor.etta.": "text_mlp.",
            "text_adaptor.temperature": "temperature",
        },
    ),
    (
        ("pfe",),
        {
            "image_adaptor.logvar.": "image_mlp.",
            "text_adaptor.logvar.": "text_mlp.",
        },
    ),
    (
        ("pcmepp",),
        {
            "img_enc.logvar.": "image_head.log_var.",
            "txt_enc.logvar.": "text_head.log_var.",
            "loss_func.shift": "shift",
            "loss_func.negative_scale": "negative_scale",
        },
    ),
    (
        ("prolip",),
        {
            "img_enc.logvar.": "image_head.log_var.",
            "txt_enc.logvar.": "text_head.log_var.",
        },
    ),
    (
        ("probvlm",),
        {
            "img_BayesCap.": "image_bayescap.",
            "txt_BayesCap.": "text_bayescap.",
        },
    ),
]
SCALARS = ("shift", "negative_scale")  # of shape (1,) there and () here
LAST_BIASES = (".6.bias", ".mod.5.bias")  # ends of the names of parameters of shape (D,)


def translate(content, path, method=None):
    """Translate a bare state dict of the paper's repository to our parameter names.

    Args:
        content: what the file holds.
        path: the file. Its name decides between methods with the same parameter names.
        method: the method, if it is known.
    Returns: the method; the width D, or None if it cannot be determined; the weights by our names.
    Raises: UserError if it is no such state dict, or if it can belong to two methods.
    """
    need(
        _is_state_dict(content),
        f"{path}: not a checkpoint: neither one of ours nor a state dict of the paper's repository",
    )
    for methods, prefixes in LAYOUTS:
        weights = _rename(content, prefixes)
        if weights is None:
            continue
        for name in SCALARS:
            weight = weights.get(name)
            if isinstance(weight, torch.Tensor) and weight.numel() == 1:
                weights[name] = weight.reshape(())
        return _choose(methods, path, method), _width(weights), weights
    first_name = next(iter(content))
    raise UserError(
        f"{path}: parameters such as {first_name!r} do not belong to any method of this project"
    )


def _is_state_dict(content):
    """Whether this is a dict with at least one name."""
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) for name in content)


def _rename(content, prefixes):
    """The weights by our names, or None if they do not have exactly these prefixes."""
    weights = {}
    prefixes_found = set()
    for name, weight in content.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            return None
        prefixes_found.add(prefix)
        weights[prefixes[prefix] + name.removeprefix(prefix)] = weight
    if prefixes_found != set(prefixes):
        return None
    return weights


def _choose(methods, path, method):
    """The one of these methods that the argument or the name of the file names."""
    for name in (method, path.stem):
        if name in methods:
            return name
    need(
        len(methods) == 1,
        f"{path}: may be of {' or of '.join(methods)}; "
        "name the file <method>.pt or give load_adaptor its method",
    )
    return methods[0]


def _width(weights):
    """D, the length of the last bias of a network, or None if there is no such tensor."""
    for name, weight in weights.items():
        if name.endswith(LAST_BIASES):
            return weight.numel() if isinstance(weight, torch.Tensor) else None
    return None
