"""A CLIP by name and weights in; its model, image transform and tokenizer, and what is worth writing down about them, out."""

import difflib
import logging
import os
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.cli import UserError
from utils.device import precision_name
from utils.files import load_json, sha256

REPOSITORY = Path(__file__).resolve().parent.parent
HUB = ("huggingface.co", 443)
MOST_LAYERS, LARGEST = (
    1000,
    2**20,
)  # in a configuration: beyond, a model takes hours to build, or more memory than there is
TORCHSCRIPT_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives, and no weights


@dataclass
class Clip:
    """A frozen CLIP. model: open_clip model in eval mode. transform: PIL image -> (3, H, W). tokenizer: list of texts -> (N, L).
    device, dtype: where it is, and of what type the pictures that it takes.
    info: plain types: model, pretrained, their SHA-256 if they are files, precision, image_size, mean, std, context_length, logit_scale."""

    model: torch.nn.Module
    transform: object
    tokenizer: object
    device: object
    dtype: torch.dtype
    info: dict


def load_clip(name, pretrained, device="cpu", dtype=torch.float32):
    """Load a CLIP.

    Args: name: an open_clip model, or the path of a model configuration (.json). pretrained: an open_clip tag, or the path of weights: a
    state dict (.safetensors, .pt) or OpenAI's TorchScript archive. device: where it is to run. Relative paths are also looked for in the
    repository itself. dtype: of the weights of its matrix products; sums and norms stay in float32.
    Returns: Clip. Raises: UserError where the name, the tag or the file is not there or they do not belong together.
    """
    weights = _local_file(pretrained)
    if weights is None:
        _say_at_once_if_offline()
    import open_clip  # slow to import, and the environment must be set first

    model_name = _register(open_clip, name)
    if weights is None:
        _check_tag(open_clip, model_name, pretrained)
    quiet = logging.getLogger()
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)  # what open_clip logs as an error it also raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _create(open_clip, model_name, pretrained, weights, precision_name(dtype))
            tokenizer = _tokenizer(open_clip, model_name)
    finally:
        quiet.setLevel(level)
    if (
        weights is not None
        and not _quick_gelu(open_clip, model_name)
        and f"{model_name}-quickgelu" in open_clip.list_models()
    ):
        logging.warning(
            "note: %s has no QuickGELU; weights that OpenAI trained need --model %s-quickgelu", model_name, model_name
        )
    model.eval().requires_grad_(False).to(device)
    settings = open_clip.get_model_preprocess_cfg(model)
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**settings), is_train=False)
    size = model.visual.image_size
    info = {
        **identity(name, pretrained),
        "precision": precision_name(dtype),
        "image_size": list(size) if isinstance(size, tuple | list) else [size, size],
        "mean": [float(value) for value in settings["mean"]],
        "std": [float(value) for value in settings["std"]],
        "context_length": int(getattr(tokenizer, "context_length", 0) or 0),
        "logit_scale": float(model.logit_scale.detach().float().exp()) if hasattr(model, "logit_scale") else None,
    }
    return Clip(model, transform, tokenizer, device, dtype, info)


def identity(name, pretrained):
    """What a CLIP is: the model and weights as they are asked for, and the SHA-256 of those that are local files.

    Args: as of load_clip. Returns: {"model", "model_sha256", "pretrained", "pretrained_sha256"}: strings, None for the sum of what is no file.
    Raises: UserError where a file is not there.
    """
    files = {"model": _config_file(name) if name.endswith(".json") else None, "pretrained": _local_file(pretrained)}
    sums = {f"{key}_sha256": sha256(path) if path else None for key, path in files.items()}
    return {
        "model": name,
        "model_sha256": sums["model_sha256"],
        "pretrained": pretrained,
        "pretrained_sha256": sums["pretrained_sha256"],
    }


def known_as(info):
    """What tells one CLIP from another, readable: a tag, or the name of a file and its sum. Args: info: what `identity` returned, or a meta.json."""
    files = {key: info.get(f"{key}_sha256") for key in ("model", "pretrained")}
    return {
        key: f"{Path(str(info.get(key))).name} (SHA-256 {str(found)[:16]})" if found else info.get(key)
        for key, found in files.items()
    }


def tokenize(clip, texts):
    """Texts to token rows. Args: texts: N strings. Returns: ((N, L) int64, N bools: cut off at the end, N bools: has an unknown word).

    A text that is longer than the context is cut, as every CLIP does. A word is unknown if the model's embedding of it is zero, which
    only the built-in CLIP's are: it has a vocabulary of its own little world.
    """
    tokens = clip.tokenizer(texts)
    length = tokens.shape[1]
    cut = (clip.tokenizer(texts, context_length=length + 1)[:, :length] != tokens).any(
        dim=1
    )  # with more room it would go on
    unknown = torch.zeros(len(texts), dtype=torch.bool)
    embedding = getattr(getattr(clip.model, "text", clip.model), "token_embedding", None)
    if embedding is not None:
        empty = (embedding.weight == 0).all(dim=1).cpu()
        if tokens.max() >= len(empty):
            raise UserError(
                f"--model {clip.info['model']}: a vocabulary of {len(empty)} is too small for its tokenizer; mend vocab_size"
            )
        empty[0] = False  # padding
        unknown = empty[tokens].any(dim=1)
    return tokens, cut.tolist(), unknown.tolist()


def _local_file(pretrained):
    """The file that --pretrained names, or None if it names a tag."""
    if not pretrained:
        raise UserError(
            "--pretrained is empty: without weights the embeddings would be random; give a tag or a local file"
        )
    path = _find(pretrained)
    if path is not None:
        return path
    if "/" in pretrained or Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raise UserError(f"--pretrained {pretrained}: no such file")
    return None


def _find(name):
    """The absolute path of a file in the current folder or else in the repository, or None. (Not resolved: a link may have another suffix.)"""
    paths = (Path(os.path.expanduser(name)).absolute(), REPOSITORY / name)
    return next((path for path in paths if path.is_file()), None)


def _register(open_clip, name):
    """The open_clip name of --model, after adding a configuration file to open_clip's list."""
    if not name.endswith(".json"):
        if name not in open_clip.list_models():
            close = difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.4)
            raise UserError(f"--model {name}: open_clip has no such model; close to it: {', '.join(close) or 'none'}")
        return name
    path = _config_file(name)
    config = load_json(path)
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise UserError(f"--model {name}: not an open_clip model configuration (embed_dim, vision_cfg, text_cfg)")
    for key, value in _numbers(config):
        if abs(value) > (MOST_LAYERS if key == "layers" else LARGEST):
            raise UserError(f"--model {name}: {key} is {value}, which no model has; mend the configuration")
    open_clip.add_model_config(path)
    return path.stem


def _numbers(tree, key=None):
    """The numbers in a configuration, each with the key that it stands under."""
    if isinstance(tree, int | float):
        yield key, tree
    for inner, value in (
        tree.items() if isinstance(tree, dict) else ((key, value) for value in tree) if isinstance(tree, list) else ()
    ):
        yield from _numbers(value, inner)


def _config_file(name):
    path = _find(name)
    if path is None:
        raise UserError(f"--model {name}: no such file")
    return path


def _check_tag(open_clip, name, tag):
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        known = f"its tags are {', '.join(tags)}" if tags else "it has no published weights"
        raise UserError(f"--pretrained {tag}: no such file, and no tag of {name}: {known}; or give a local file")
    needs_quick_gelu = (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False)
    if needs_quick_gelu and not _quick_gelu(open_clip, name) and f"{name}-quickgelu" in open_clip.list_models():
        raise UserError(f"--model {name}: the weights of {tag} need QuickGELU: --model {name}-quickgelu")


def _tokenizer(open_clip, name):
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # noqa: BLE001  it may need a download, or a library that is not there
        raise UserError(
            f"--model {name}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:160]})"
        ) from None


def _quick_gelu(open_clip, name):
    return bool(open_clip.get_model_config(name).get("quick_gelu"))


def _create(open_clip, name, pretrained, weights, precision):
    """The model with its weights, in this precision, on the CPU."""
    if weights is None:
        try:
            return open_clip.create_model(name, pretrained=pretrained, precision=precision)
        except Exception as error:  # noqa: BLE001  the hub's libraries raise many things
            raise UserError(
                f"--pretrained {pretrained}: cannot be downloaded ({str(error).splitlines()[0][:90]}); "
                "give the path of a local weights file instead, or try --dataset shapes, which needs no download"
            ) from None
    try:
        archive = torch.jit.load(str(weights), map_location="cpu") if _is_torchscript(weights) else None
    except Exception as error:  # noqa: BLE001  as above
        raise UserError(f"--pretrained {pretrained}: not readable ({str(error).splitlines()[0][:90]})") from None
    if archive is not None and not _quick_gelu(open_clip, name):
        raise UserError(
            f"--model {name}: {weights.name} is OpenAI's archive, whose weights need QuickGELU: --model {name}-quickgelu"
        )
    try:
        if archive is None:
            return open_clip.create_model(name, pretrained=str(weights), precision=precision)
        model = open_clip.create_model(name, pretrained=None, precision=precision)
        state = {key: value.float() for key, value in archive.state_dict().items() if key not in TORCHSCRIPT_EXTRAS}
        model.load_state_dict(state)
        return model
    except Exception as error:  # noqa: BLE001  as above
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--pretrained {pretrained}: not weights of {name} ({reason})") from None


def _is_torchscript(path):
    """Whether a file is a zip archive with code in it, as torch.jit.save writes."""
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") or "/code/" in name for name in archive.namelist())


def _say_at_once_if_offline():
    """Without a network the hub's client would try for most of a minute; it fails at once when told. Cached weights still load."""
    if any(
        os.environ.get(key)
        for key in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return
    try:
        socket.create_connection(HUB, timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
