"""A trained adaptor in, a file that a stranger can load safely out; and back, from the paper repository's files too."""

import itertools
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from models import METHODS
from utils.cli import need
from utils.files import differences, load_tensors, save_tensors, sha256
from utils.paper import translate
from utils.preprocess import ClipId

OPTIONAL = ("validation", "keep")  # of a config: what a run without held-out images does not have


def checkpoint_path(name, seed, method):
    """checkpoints/<name>/<seed>/<method>.pt"""
    return Path("checkpoints", name, str(seed), f"{method}.pt")


def save_adaptor(adaptor, method, recipe, config, path):
    """Write what `describe` returns to a file, whole or not at all."""
    save_tensors(describe(adaptor, method, recipe, config), path)


def describe(adaptor, method, recipe, config):
    """What is kept of an adaptor, plain types and tensors on the CPU: a dict.

    Args: config: plain types: the data and settings of its training.
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


def load_run(path, recipe, config):
    """What the checkpoint, or the state, of a run with this recipe and config holds; None if there is no such file.

    Raises: UserError that names the difference if it is of another run.
    """
    if not path.exists():
        return None
    content = load_tensors(path)
    tells = isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in ("config", "recipe"))
    need(tells, f"{path}: does not tell of which run it is; start anew, without --resume")
    saved = content["config"]
    if isinstance(saved.get("clip"), dict):  # once without the sums of files
        config = config | {"clip": {key: config["clip"].get(key) for key in saved["clip"]}}
    config = {key: None for key in OPTIONAL if key in saved} | config
    known = {field: value for field, value in asdict(recipe).items() if field in content["recipe"]}  # not of later ones
    changed = differences(saved, config) or differences(content["recipe"], known)
    cure = "resume it with those, or start anew, without --resume"
    need(not changed, f"{path}: of a run with other settings: {changed}; {cure}")
    return content


def load_adaptor(path, device="cpu", method=None):
    """Rebuild an adaptor from its checkpoint alone, one of ours or a bare state dict of the paper's repository.

    Args:
        device: where it goes.
        method: its name in METHODS, needed only where neither the file nor its name tells: the two asymvlm methods have
            the same parameters in the paper's repository.
    Returns: Adaptor in eval mode, float32; `method` is its name, `config` what the file tells of its training, or {},
        `checkpoint` its SHA-256.
    Raises: UserError naming the file and what is wrong with it; FileNotFoundError if there is none.
    """
    content = load_tensors(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        name, embed_dim, weights = content.get("method"), content.get("embed_dim"), content["state_dict"]
    else:
        name, embed_dim, weights = translate(content, Path(path), method)
    is_known = isinstance(name, str) and name in METHODS
    need(is_known, f"{path}: a checkpoint of the unknown method {name!r}; known are {', '.join(METHODS)}")
    need(method in (None, name), f"{path}: a checkpoint of {name}, not of {method}")
    is_width = type(embed_dim) is int and 1 <= embed_dim <= 65536
    need(is_width, f"{path}: embed_dim is {embed_dim!r}, expected a whole number")
    with torch.device("meta"):  # no memory is taken before the shapes are known to fit
        expected = {key: value.shape for key, value in METHODS[name](embed_dim).state_dict().items()}
    for key in sorted(expected.keys() | weights.keys(), key=str):
        tensor = weights.get(key)
        fits = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.shape == expected.get(key)
        need(fits, f"{path}: its weights do not fit {name} at width {embed_dim} ({key!r}); train again")
        need(torch.isfinite(tensor).all(), f"{path}: {key!r} is not finite; train again")
    adaptor = METHODS[name](embed_dim)
    adaptor.load_state_dict(weights)
    config = content.get("config")
    adaptor.method, adaptor.config = name, config if isinstance(config, dict) else {}
    adaptor.checkpoint = sha256(path)
    return adaptor.to(device).eval()


def check_fits(adaptor, path, cache, other_clip=False):
    """Raise a UserError if an adaptor is not for the embeddings of a cache; note it if nothing tells their CLIPs.

    Args: other_clip: whether an adaptor for another CLIP will do.
    """
    widths = f"{adaptor.embed_dim} wide, those of {cache.folder} are {cache.embed_dim} wide"
    need(adaptor.embed_dim == cache.embed_dim, f"{path}: trained on embeddings {widths}; train again")
    trained_on = ClipId.of_meta(adaptor.config.get("clip"))
    if not trained_on.pretrained or not cache.clip_id.pretrained:
        logging.warning("note: nothing tells whether %s was trained on the CLIP of %s", path, cache.folder)
        return
    clips = f"{trained_on.readable()}, those of {cache.folder} are of {cache.clip_id.readable()}"
    will_do = other_clip or not trained_on.contradicts(cache.clip_id)
    need(will_do, f"{path}: trained on embeddings of {clips}; train again, or insist with --other-clip")


def load_adaptors(dataset, methods, seeds, cache, other_clip):
    """The trained adaptors of a data set: {(method, seed): Adaptor}.

    Raises: UserError if one is missing or does not fit the cache.
    """
    adaptors = {}
    for method, seed in itertools.product(methods, seeds):
        path = checkpoint_path(dataset, seed, method)
        command = f"python train.py --dataset {dataset} --method {method} --seed {seed}"
        need(path.exists(), f"{path}: no such checkpoint; make it with {command}")
        adaptor = adaptors[method, seed] = load_adaptor(path, cache.device, method)
        check_fits(adaptor, path, cache, other_clip)
    return adaptors
