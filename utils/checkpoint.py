"""Checkpoints of trained adaptors: written by us, read also from the paper's repository."""

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch

from models import METHODS
from models.base import Adaptor
from utils.cli import UserError, need
from utils.files import differences, load_tensors, save_tensors, sha256, without_prefixes
from utils.paper import translate

UNVALIDATED = {"validation": None, "keep": None}  # what a config without these stands for
LARGEST_WIDTH = 65536


def checkpoint_path(name, seed, method):
    """checkpoints/<name>/<seed>/<method>.pt"""
    return Path("checkpoints", name, str(seed), f"{method}.pt")


def lock_path(path):
    """The file that a run locks while it trains a checkpoint."""
    return path.with_name(f".{path.stem}.lock")


def save_adaptor(adaptor, method, recipe, config, path):
    """Write what `describe` returns to a file, whole or not at all."""
    save_tensors(on_cpu(describe(adaptor, method, recipe, config)), path)


def describe(adaptor, method, recipe, config):
    """The content of a checkpoint: a dict of plain types and of copied tensors.

    Args: config: dict of plain types, the data and settings of the training.
    """
    return {
        "state_dict": deepcopy(adaptor.state_dict()),  # on its device, so that nothing waits
        "method": method,
        "embed_dim": adaptor.embed_dim,
        "recipe": asdict(recipe),
        "config": config,
    }


def on_cpu(content):
    """Plain content with its tensors copied to the CPU.

    A tensor that is a view would be saved together with all of the storage behind it.
    """
    if isinstance(content, dict):
        return {key: on_cpu(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(on_cpu(value) for value in content)
    if isinstance(content, torch.Tensor):
        return content.cpu().clone()
    return content


def load_run(path, recipes, config, cure):
    """Read the checkpoint, or the state, of a run with this config and one of these recipes.

    Args: cure: what to do if it is of another run.
    Returns: the content of the file, or None if there is no file.
    Raises: UserError that names the differences if it is of another run.
    """
    if not path.exists():
        return None
    content = load_tensors(path)
    for key in ("config", "recipe"):
        is_run = isinstance(content, dict) and isinstance(content.get(key), dict)
        need(is_run, f"{path}: does not say which run it is of; {cure}")

    saved_config = {**UNVALIDATED, **content["config"]}
    current_config = {**UNVALIDATED, **config}
    if isinstance(saved_config.get("clip"), dict):
        # Older files lack the SHA-256 of the CLIP's files.
        current_config["clip"] = _entries_of(saved_config["clip"], current_config["clip"])
    changed = differences(saved_config, current_config)
    changed = changed or _differences_of_recipes(content["recipe"], recipes)
    need(not changed, f"{path}: belongs to a run with other settings: {changed}; {cure}")
    return content


def check_replaceable(path, recipe, config):
    """Raise a UserError if a new run would replace the checkpoint of another one.

    A damaged checkpoint may be replaced.
    """
    try:
        load_tensors(path)
    except (FileNotFoundError, UserError):
        return
    load_run(
        path, [recipe], config, "add --overwrite to replace it, or rename its folder to keep it"
    )


def _differences_of_recipes(saved, recipes):
    """How a saved recipe differs from the first of these recipes; "" if it equals one of them."""
    changes = []
    for recipe in recipes:
        # Older files lack newer fields of the recipe.
        changes.append(differences(saved, _entries_of(saved, asdict(recipe))))
    return "" if "" in changes else changes[0]


def _entries_of(saved, current):
    """The entries of `current` that are in `saved`, too."""
    return {key: value for key, value in current.items() if key in saved}


def load_adaptor(
    path: str | Path, device: str | torch.device = "cpu", method: str | None = None
) -> Adaptor:
    """Rebuild an adaptor from a checkpoint, one of ours or a state dict of the paper's repository.

    Args:
        device: where the adaptor goes.
        method: its name in METHODS. It is needed only if neither the file nor the file's name says
            it: the two asymvlm methods have the same parameters in the paper's repository.
    Returns: Adaptor in eval mode, float32. Its attribute `method` is its name, `config` and
        `recipe` are what the file says of its training, or {}, and `checkpoint` is the SHA-256 of
        the file.
    Raises: UserError that names the file and what is wrong with it; FileNotFoundError if there is
        none.
    """
    content = load_tensors(path)
    config = {}
    recipe = {}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        name = content.get("method")
        embed_dim = content.get("embed_dim")
        weights = content["state_dict"]
        if isinstance(content.get("config"), dict):
            config = content["config"]
        if isinstance(content.get("recipe"), dict):
            recipe = content["recipe"]
    else:
        if isinstance(content, dict):
            content = without_prefixes(content)
        name, embed_dim, weights = translate(content, Path(path), method)

    is_known = isinstance(name, str) and name in METHODS
    need(is_known, f"{path}: unknown method {name!r}; known are {', '.join(METHODS)}")
    need(method in (None, name), f"{path}: a checkpoint of {name}, not of {method}")
    is_width = type(embed_dim) is int and 1 <= embed_dim <= LARGEST_WIDTH
    need(is_width, f"{path}: embed_dim is {embed_dim!r}, expected a whole number")
    check_weights(path, weights, name, embed_dim)

    adaptor = METHODS[name](embed_dim)
    adaptor.load_state_dict(dict(weights))
    adaptor.method = name
    adaptor.config = config
    adaptor.recipe = recipe
    adaptor.checkpoint = sha256(path)
    return adaptor.to(device).eval()


def check_weights(path, weights, method, embed_dim):
    """Check that weights, a state dict, are finite and fit a method at this width.

    A method of your own may have integers in its state, such as the batch count of an
    nn.BatchNorm1d. A file may lack it, and `load_state_dict` then sets it to 0.

    Raises: UserError that names a tensor that does not fit.
    """
    with torch.device("meta"):  # This takes no memory, however large the width claims to be.
        expected = METHODS[method](embed_dim).state_dict()
    for key in sorted(expected.keys() | weights.keys(), key=str):
        expected_tensor = expected.get(key)
        if key not in weights and not expected_tensor.is_floating_point():
            continue
        tensor = weights.get(key)
        fits = (
            isinstance(tensor, torch.Tensor)
            and expected_tensor is not None
            and tensor.shape == expected_tensor.shape
            and tensor.is_floating_point() == expected_tensor.is_floating_point()
        )
        need(fits, f"{path}: {key!r} does not fit {method} at width {embed_dim}; train again")
        need(torch.isfinite(tensor).all(), f"{path}: {key!r} is not finite; train again")
