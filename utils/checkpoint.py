"""A trained adaptor in, a file that a stranger can load safely out; and the way back, also from the paper repository's files.

The state of an unfinished run is such a file too, <method>.resume.pt: what `save_adaptor` writes, and what the next epoch depends on.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from models import METHODS
from utils.cli import UserError
from utils.files import differences, load_tensors, save_tensors

ROOT = Path("checkpoints")

# The paper repository's checkpoints are bare state dicts: the methods a file may hold, and the beginnings of its names -> ours.
PAPER_NAMES = [
    (("asymvlm-psd", "asymvlm-vmf"), {"text_adaptor.etta.": "text_mlp.", "text_adaptor.temperature": "temperature"}),
    (("pfe",), {"image_adaptor.logvar.": "image_mlp.", "text_adaptor.logvar.": "text_mlp."}),
    (
        ("pcmepp",),
        {
            "img_enc.logvar.": "image_head.log_var.",
            "txt_enc.logvar.": "text_head.log_var.",
            "loss_func.shift": "shift",
            "loss_func.negative_scale": "negative_scale",
        },
    ),
    (("prolip",), {"img_enc.logvar.": "image_head.log_var.", "txt_enc.logvar.": "text_head.log_var."}),
    (("probvlm",), {"img_BayesCap.": "image_bayescap.", "txt_BayesCap.": "text_bayescap."}),
]


def checkpoint_path(name, seed, method, root=ROOT):
    """checkpoints/<name>/<seed>/<method>.pt"""
    return Path(root) / name / str(seed) / f"{method}.pt"


def save_adaptor(adaptor, method, recipe, config, path):
    """Write {"state_dict", "method", "embed_dim", "recipe", "config"}, plain types only, whole or not at all.

    Args: adaptor: Adaptor. method: its name in METHODS. recipe: Recipe as it was used. config: dict of plain types. path: file.
    """
    save_tensors(describe(adaptor, method, recipe, config), path)


def describe(adaptor, method, recipe, config):
    """What `save_adaptor` writes, a copy on the CPU."""
    weights = _copy(adaptor.state_dict())
    return {
        "state_dict": weights,
        "method": method,
        "embed_dim": adaptor.embed_dim,
        "recipe": asdict(recipe),
        "config": config,
    }


def describe_progress(optimizer, schedule, order, log):
    """What the next epoch depends on beside the weights, a copy on the CPU; it does not depend on the number of processes.

    Args: order: the generator of the permutations. log: one record for every epoch that is done.
    """
    progress = {
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "order": order.get_state(),
        "random": torch.get_rng_state(),
    }
    return {"progress": _copy(progress), "log": list(log)}


def restore_progress(content, path, adaptor, optimizer, schedule, order):
    """Put a run where it was. Args: content: what `describe` and `describe_progress` returned, read from path. Returns: its log.

    Raises: UserError if it is not of this run.
    """
    try:
        adaptor.load_state_dict(content["state_dict"])
        optimizer.load_state_dict(content["progress"]["optimizer"])
        schedule.load_state_dict(content["progress"]["schedule"])
        order.set_state(content["progress"]["order"])
        torch.set_rng_state(content["progress"]["random"])
        return [{"epoch": epoch, **record} for epoch, record in enumerate(content["log"], start=1)]
    except Exception as error:  # noqa: BLE001  a file of other things raises nearly anything, and nothing but the restoring stands in this block
        raise UserError(
            f"{path}: not the state of such a run ({' '.join(str(error).split())[:120]}); start anew, without --resume"
        ) from None


def load_run(path, recipe, config):
    """The content of a checkpoint or of an unfinished run's state, if it is of the run with this recipe and config.

    Returns: dict, or None if there is no such file.
    Raises: UserError that names the difference if it is of another run.
    """
    if not path.exists():
        return None
    content = load_tensors(path)
    known = [content.get(key) for key in ("config", "recipe")] if isinstance(content, dict) else []
    if not known or not all(isinstance(part, dict) for part in known):
        raise UserError(f"{path}: does not tell of which run it is; start anew, without --resume")
    changed = differences(known[0], config) or differences(known[1], asdict(recipe))
    if changed:
        raise UserError(
            f"{path}: of a run with other settings: {changed}; resume it with those, or start anew, without --resume"
        )
    return content


def _copy(content):
    """Plain content with its tensors copied to the CPU: a view would drag its whole storage along."""
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_copy(value) for value in content)
    return content.detach().cpu().clone() if isinstance(content, torch.Tensor) else content


def load_adaptor(path, device="cpu", method=None):
    """Rebuild an adaptor from its checkpoint alone, one of ours or a bare state dict of the paper's repository.

    Args: path: file. device: where it goes. method: its name in METHODS, needed only where neither the file nor its name tells: the two
    asymvlm methods have the same parameters in the paper's repository.
    Returns: Adaptor in eval mode, float32.
    Raises: UserError naming the file and what is wrong with it; FileNotFoundError if there is none.
    """
    content = load_tensors(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        found, embed_dim, weights = content.get("method"), content.get("embed_dim"), content["state_dict"]
    else:
        found, embed_dim, weights = _from_the_papers_repository(content, Path(path), method)
    if not isinstance(found, str) or found not in METHODS:
        raise UserError(f"{path}: a checkpoint of the unknown method {found!r}; known are {', '.join(METHODS)}")
    if method is not None and found != method:
        raise UserError(f"{path}: a checkpoint of {found}, not of {method}")
    if not isinstance(embed_dim, int) or isinstance(embed_dim, bool) or not 1 <= embed_dim <= 65536:
        raise UserError(f"{path}: embed_dim is {embed_dim!r}, expected a whole number")
    with torch.device("meta"):  # no memory is taken before the shapes are known to fit
        expected = {key: value.shape for key, value in METHODS[found](embed_dim).state_dict().items()}
    for key in sorted(expected.keys() | weights.keys(), key=str):
        tensor = weights.get(key)
        if (
            key not in expected
            or not isinstance(tensor, torch.Tensor)
            or tensor.shape != expected[key]
            or not tensor.is_floating_point()
        ):
            raise UserError(f"{path}: its weights do not fit {found} at width {embed_dim} ({key!r}); train again")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {key!r} is not finite; train again")
    adaptor = METHODS[found](embed_dim)
    adaptor.load_state_dict(weights)
    return adaptor.to(device).eval()


def _from_the_papers_repository(content, path, method):
    """Method, width and renamed weights of a bare state dict. Raises: UserError if it is none, or may be of two methods."""
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: not a checkpoint: neither one of ours nor a state dict of the paper's repository")
    for methods, names in PAPER_NAMES:
        renamed = {
            ours + key.removeprefix(theirs): value
            for key, value in content.items()
            for theirs, ours in names.items()
            if key.startswith(theirs)
        }
        if len(renamed) < len(content) or not all(any(key.startswith(theirs) for key in content) for theirs in names):
            continue
        for key in ("shift", "negative_scale"):  # () here, (1,) there
            if isinstance(renamed.get(key), torch.Tensor) and renamed[key].numel() == 1:
                renamed[key] = renamed[key].reshape(())
        found = next(
            (name for name in (method, path.stem) if name in methods), methods[0] if len(methods) == 1 else None
        )
        if found is None:
            raise UserError(
                f"{path}: may be of {' or of '.join(methods)}; name the file <method>.pt or give load_adaptor its method"
            )
        bias = next((value for key, value in renamed.items() if key.endswith((".6.bias", ".mod.5.bias"))), None)
        return found, bias.numel() if isinstance(bias, torch.Tensor) else None, renamed
    raise UserError(f"{path}: parameters such as {next(iter(content))!r} belong to no method known here")
