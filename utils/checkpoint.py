"""A trained adaptor in, a file that a stranger can load safely out; and the way back, also from the paper repository."""

from dataclasses import asdict
from pathlib import Path

import torch

from models import METHODS
from utils.cli import UserError
from utils.files import load_tensors, save_tensors
from utils.paper import translate

ROOT = Path("checkpoints")


def checkpoint_path(name, seed, method, root=ROOT):
    """checkpoints/<name>/<seed>/<method>.pt"""
    return Path(root) / name / str(seed) / f"{method}.pt"


def save_adaptor(adaptor, method, recipe, config, path):
    """Write what `describe` returns to a file, whole or not at all."""
    save_tensors(describe(adaptor, method, recipe, config), path)


def describe(adaptor, method, recipe, config):
    """All that is kept of an adaptor, plain types only, its weights copied to the CPU.

    Args:
        adaptor: Adaptor.
        method: its name in METHODS.
        recipe: Recipe as it was used.
        config: dict of plain types: what else it was trained with.
    Returns: {"state_dict", "method", "embed_dim", "recipe", "config"}.
    """
    return {
        "state_dict": copied(adaptor.state_dict()),
        "method": method,
        "embed_dim": adaptor.embed_dim,
        "recipe": asdict(recipe),
        "config": config,
    }


def copied(content):
    """Plain content with its tensors copied to the CPU: in a file, a view would drag its whole storage along."""
    if isinstance(content, dict):
        return {key: copied(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(copied(value) for value in content)
    return content.detach().cpu().clone() if isinstance(content, torch.Tensor) else content


def load_adaptor(path, device="cpu", method=None):
    """Rebuild an adaptor from its checkpoint alone, one of ours or a bare state dict of the paper's repository.

    Args:
        path: file.
        device: where it goes.
        method: its name in METHODS, needed only where neither the file nor its name tells: the two asymvlm methods have
            the same parameters in the paper's repository.
    Returns: Adaptor in eval mode, float32.
    Raises: UserError naming the file and what is wrong with it; FileNotFoundError if there is none.
    """
    content = load_tensors(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        found, embed_dim, weights = content.get("method"), content.get("embed_dim"), content["state_dict"]
    else:
        found, embed_dim, weights = translate(content, Path(path), method)
    if not isinstance(found, str) or found not in METHODS:
        raise UserError(f"{path}: a checkpoint of the unknown method {found!r}; known are {', '.join(METHODS)}")
    if method is not None and found != method:
        raise UserError(f"{path}: a checkpoint of {found}, not of {method}")
    if type(embed_dim) is not int or not 1 <= embed_dim <= 65536:
        raise UserError(f"{path}: embed_dim is {embed_dim!r}, expected a whole number")
    with torch.device("meta"):  # no memory is taken before the shapes are known to fit
        expected = {key: value.shape for key, value in METHODS[found](embed_dim).state_dict().items()}
    for key in sorted(expected.keys() | weights.keys(), key=str):
        tensor = weights.get(key)
        fits = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.shape == expected.get(key)
        if not fits:
            raise UserError(f"{path}: its weights do not fit {found} at width {embed_dim} ({key!r}); train again")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {key!r} is not finite; train again")
    adaptor = METHODS[found](embed_dim)
    adaptor.load_state_dict(weights)
    return adaptor.to(device).eval()
