"""A trained adaptor in, a file that a stranger can load safely out; and the way back."""

from dataclasses import asdict
from pathlib import Path

import torch

from models import METHODS
from utils.cli import UserError
from utils.files import load_tensors, save_tensors

ROOT = Path("checkpoints")


def checkpoint_path(name, seed, method, root=ROOT):
    """checkpoints/<name>/<seed>/<method>.pt"""
    return Path(root) / name / str(seed) / f"{method}.pt"


def save_adaptor(adaptor, method, recipe, config, path):
    """Write {"state_dict", "method", "embed_dim", "recipe", "config"}, plain types only, whole or not at all.

    Args: adaptor: Adaptor. method: its name in METHODS. recipe: Recipe as it was used. config: dict of plain types. path: file.
    """
    weights = {key: value.detach().cpu().clone() for key, value in adaptor.state_dict().items()}  # a view would drag its whole storage along
    save_tensors({"state_dict": weights, "method": method, "embed_dim": adaptor.embed_dim, "recipe": asdict(recipe), "config": config}, path)


def load_adaptor(path, device="cpu", method=None):
    """Rebuild an adaptor from its checkpoint alone.

    Args: path: file. device: where it goes. method: its name in METHODS, if the file does not tell.
    Returns: Adaptor in eval mode.
    Raises: UserError naming the file and what is wrong with it; FileNotFoundError if there is none.
    """
    content = load_tensors(path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint (no state_dict in it)")
    found, embed_dim = content.get("method"), content.get("embed_dim")
    if not isinstance(found, str) or found not in METHODS:
        raise UserError(f"{path}: a checkpoint of the unknown method {found!r}; known are {', '.join(METHODS)}")
    if method is not None and found != method:
        raise UserError(f"{path}: a checkpoint of {found}, not of {method}")
    if not isinstance(embed_dim, int) or not 1 <= embed_dim <= 65536:
        raise UserError(f"{path}: embed_dim is {embed_dim!r}, expected a whole number")
    with torch.device("meta"):  # no memory is taken before the shapes are known to fit
        adaptor = METHODS[found](embed_dim)
    expected = {key: value.shape for key, value in adaptor.state_dict().items()}
    weights = content["state_dict"]
    for key in expected.keys() | weights.keys():
        tensor = weights.get(key)
        if key not in expected or not isinstance(tensor, torch.Tensor) or tensor.shape != expected[key] or not tensor.is_floating_point():
            raise UserError(f"{path}: its weights do not fit {found} at width {embed_dim} ({key!r}); train again")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {key!r} is not finite; train again")
    adaptor = METHODS[found](embed_dim)
    adaptor.load_state_dict(weights)
    return adaptor.to(device).eval()
