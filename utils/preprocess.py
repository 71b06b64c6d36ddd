"""A CLIP by name and weights in; its model, transform and tokenizer, and what tells it from another, out."""

import contextlib
import difflib
import logging
import os
import socket
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.cli import UserError
from utils.device import PRECISIONS, pick_precision, precision_name
from utils.files import differences, load_json, sha256

REPOSITORY = Path(__file__).resolve().parent.parent
HUB = ("huggingface.co", 443)
PROXIES = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
MOST = {"layers": 1000}  # in a configuration: a model of more takes hours to build
LARGEST = 2**20  # of any other number: more memory than there is
TORCHSCRIPT_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives, and no weights


@dataclass
class Clip:
    """A frozen CLIP.

    model: open_clip model in eval mode. transform: PIL image -> (3, H, W). tokenizer: list of texts -> (N, L).
    device, dtype: where it is, and of what type the pictures are that it takes.
    info: plain types: model, pretrained, their SHA-256 if they are files, precision, image_size, mean, std,
        context_length, logit_scale.
    """

    model: torch.nn.Module
    transform: object
    tokenizer: object
    device: object
    dtype: torch.dtype
    info: dict


@dataclass(frozen=True)
class ClipId:
    """What tells one CLIP from another, as the meta.json of a cache has it; None where it does not tell.

    model, pretrained: as they were asked for. model_sha256, pretrained_sha256: of those that are files.
    precision: of its matrix products, as --precision names it. dtype: in which the cache stores its embeddings.
    origin: where this stands, for messages.
    """

    model: str | None
    pretrained: str | None
    model_sha256: str | None = None
    pretrained_sha256: str | None = None
    precision: str | None = None
    dtype: torch.dtype | None = None
    origin: object = None

    @classmethod
    def of(cls, model, pretrained, precision=None):
        """The CLIP that these flags name. Raises: UserError where a file is not there."""
        config, weights = _config_file(model) if model.endswith(".json") else None, _local_file(pretrained)
        return cls(model, pretrained, config and sha256(config), weights and sha256(weights), precision)

    @classmethod
    def of_meta(cls, meta, origin=None):
        """The CLIP that a meta.json names. Args: meta: its content."""
        meta = meta if isinstance(meta, dict) else {}
        known = {key: meta.get(key) for key in ("model", "pretrained", "model_sha256", "pretrained_sha256")}
        precision = meta.get("precision") if meta.get("precision") in tuple(PRECISIONS) else None
        dtype = {"float16": torch.float16, "float32": torch.float32}.get(str(meta.get("dtype")))
        return cls(**known, precision=precision, dtype=dtype, origin=origin)

    def is_complete(self):
        """Whether it tells all that it takes to embed a further text."""
        return isinstance(self.model, str) and isinstance(self.pretrained, str) and self.precision and self.dtype

    def sums(self):
        """Model and weights with their SHA-256, as they stand in meta.json."""
        return {key: getattr(self, key) for key in ("model", "model_sha256", "pretrained", "pretrained_sha256")}

    def readable(self):
        """{"model", "pretrained"}: a tag, or the name of a file with its sum."""
        pairs = {"model": (self.model, self.model_sha256), "pretrained": (self.pretrained, self.pretrained_sha256)}
        return {
            key: f"{Path(str(name)).name} (SHA-256 {str(found)[:16]})" if found else name
            for key, (name, found) in pairs.items()
        }

    def difference(self, other):
        """What changes from this CLIP to another, in words; empty where nothing does."""
        return differences(self.readable(), other.readable())

    def contradicts(self, other):
        """Whether a name, of a file without its folder, is another one; where both tell a sum, that alone counts."""
        mine, theirs = self.sums(), other.sums()
        for key in ("model", "pretrained"):
            sums = mine[f"{key}_sha256"], theirs[f"{key}_sha256"]
            if len(set(sums if all(sums) else (Path(str(of[key])).name for of in (mine, theirs)))) > 1:
                return True
        return False

    def load(self, device="cpu", model=None, pretrained=None, precision="auto"):
        """This very CLIP.

        Args: model, pretrained: where it is now, if elsewhere. precision: "auto": as it was.
        Returns: Clip.
        Raises: UserError if it cannot be loaded or is another one.
        """
        dtype = pick_precision(self.precision if precision == "auto" else precision, torch.device(device))
        clip = load_clip(model or self.model, pretrained or self.pretrained, device, dtype)
        changed = self.difference(ClipId.of_meta(clip.info))
        if changed:
            cure = "embed texts with the CLIP of their cache"
            raise UserError(f"{self.origin}: was made with another CLIP: {changed}; {cure}")
        return clip


def load_clip(name, pretrained, device="cpu", dtype=torch.float32):
    """Load a CLIP.

    Relative paths are also looked for in the repository itself.
    Args:
        name: an open_clip model, or the path of a model configuration (.json).
        pretrained: an open_clip tag, or the path of weights: a state dict (.safetensors, .pt) or OpenAI's archive.
        device: where it is to run.
        dtype: of the weights of its matrix products; sums and norms stay in float32.
    Returns: Clip.
    Raises: UserError where the name, the tag or the file is not there or they do not belong together.
    """
    weights = _local_file(pretrained)
    if weights is None:
        _say_at_once_if_offline()
    import open_clip  # slow to import, and the environment must be set first

    model_name = _register(open_clip, name)
    has_quick_gelu = bool(open_clip.get_model_config(model_name).get("quick_gelu"))
    twin = (
        None if has_quick_gelu else next((n for n in open_clip.list_models() if n == f"{model_name}-quickgelu"), None)
    )
    if weights is None:
        _check_tag(open_clip, model_name, pretrained, twin)
    with _quiet():
        model = _create(open_clip, model_name, pretrained, weights, precision_name(dtype), has_quick_gelu)
        with _refused(f"--model {model_name}: its tokenizer cannot be loaded"):
            tokenizer = open_clip.get_tokenizer(model_name)
    if weights is not None and twin:
        logging.warning("note: %s has no QuickGELU; weights that OpenAI trained need --model %s", model_name, twin)
    model.eval().requires_grad_(False).to(device)
    settings = open_clip.get_model_preprocess_cfg(model)
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**settings), is_train=False)
    size = model.visual.image_size
    info = {
        **ClipId.of(name, pretrained).sums(),
        "precision": precision_name(dtype),
        "image_size": list(size) if isinstance(size, tuple | list) else [size, size],
        "mean": [float(value) for value in settings["mean"]],
        "std": [float(value) for value in settings["std"]],
        "context_length": int(getattr(tokenizer, "context_length", 0) or 0),
        "logit_scale": float(model.logit_scale.detach().float().exp()) if hasattr(model, "logit_scale") else None,
    }
    return Clip(model, transform, tokenizer, device, dtype, info)


def tokenize(clip, texts):
    """Texts to token rows; a text that is longer than the context is cut, as by every CLIP.

    A word is unknown if the model's embedding of it is zero, which only the built-in CLIP's are: it has a vocabulary
    of its own little world.
    Args: clip: Clip. texts: N strings.
    Returns: ((N, L) int64, N bools: whether a text is cut, N bools: whether it has an unknown word).
    Raises: UserError if the model has fewer tokens than its tokenizer.
    """
    tokens = clip.tokenizer(texts)
    length = tokens.shape[1]
    with_more_room = clip.tokenizer(texts, context_length=length + 1)[:, :length]  # where a text is cut it goes on
    unknown = torch.zeros(len(texts), dtype=torch.bool)
    embedding = getattr(getattr(clip.model, "text", clip.model), "token_embedding", None)
    if embedding is not None:
        empty = (embedding.weight == 0).all(dim=1).cpu()
        if tokens.max() >= len(empty):
            what = f"a vocabulary of {len(empty)} is too small for its tokenizer"
            raise UserError(f"--model {clip.info['model']}: {what}; mend vocab_size")
        empty[0] = False  # padding
        unknown = empty[tokens].any(dim=1)
    return tokens, (with_more_room != tokens).any(dim=1).tolist(), unknown.tolist()


def _local_file(pretrained):
    """The file that --pretrained names, or None if it names a tag."""
    if not pretrained:
        cure = "give a tag or a local file"
        raise UserError(f"--pretrained is empty: without weights the embeddings would be random; {cure}")
    path = _find(pretrained)
    if path is None and ("/" in pretrained or Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors")):
        raise UserError(f"--pretrained {pretrained}: no such file")
    return path


def _config_file(name):
    path = _find(name)
    if path is None:
        raise UserError(f"--model {name}: no such file")
    return path


def _find(name):
    """The absolute path of a file in the current folder or else in the repository, or None; links are not followed."""
    paths = (Path(os.path.expanduser(name)).absolute(), REPOSITORY / name)
    return next((path for path in paths if path.is_file()), None)


def _register(open_clip, name):
    """The open_clip name of --model, after adding a configuration file to open_clip's list."""
    if not name.endswith(".json"):
        if name not in open_clip.list_models():
            close = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.4))
            raise UserError(f"--model {name}: open_clip has no such model; close to it: {close or 'none'}")
        return name
    path = _config_file(name)
    config = load_json(path)
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise UserError(f"--model {name}: not an open_clip model configuration (embed_dim, vision_cfg, text_cfg)")
    for key, value in _numbers(config):
        if abs(value) > MOST.get(key, LARGEST):
            raise UserError(f"--model {name}: {key} is {value}, which no model has; mend the configuration")
    open_clip.add_model_config(path)
    return path.stem


def _numbers(tree, key=None):
    """The numbers in a configuration, each with the key that it stands under."""
    if isinstance(tree, int | float):
        yield key, tree
    elif isinstance(tree, dict | list):
        for inner, value in tree.items() if isinstance(tree, dict) else ((key, value) for value in tree):
            yield from _numbers(value, inner)


def _check_tag(open_clip, name, tag, twin):
    """Raise a UserError if a model has no such tag, or the tag's weights need the model's twin with QuickGELU."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        known = f"its tags are {', '.join(tags)}" if tags else "it has no published weights"
        raise UserError(f"--pretrained {tag}: no such file, and no tag of {name}: {known}; or give a local file")
    if twin and (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu"):
        raise UserError(f"--model {name}: the weights of {tag} need QuickGELU: --model {twin}")


def _create(open_clip, name, pretrained, weights, precision, has_quick_gelu):
    """The model with its weights, in this precision, on the CPU."""
    if weights is None:
        cure = "give the path of a local weights file instead, or try --dataset shapes, which needs no download"
        with _refused(f"--pretrained {pretrained}: cannot be downloaded", cure):
            return open_clip.create_model(name, pretrained=pretrained, precision=precision)
    with _refused(f"--pretrained {pretrained}: not readable"):
        archive = torch.jit.load(str(weights), map_location="cpu") if _is_torchscript(weights) else None
    if archive is not None and not has_quick_gelu:
        what = f"{weights.name} is OpenAI's archive, whose weights need QuickGELU"
        raise UserError(f"--model {name}: {what}: --model {name}-quickgelu")
    with _refused(f"--pretrained {pretrained}: not weights of {name}"):
        if archive is None:
            return open_clip.create_model(name, pretrained=str(weights), precision=precision)
        model = open_clip.create_model(name, pretrained=None, precision=precision)
        state = {key: value.float() for key, value in archive.state_dict().items() if key not in TORCHSCRIPT_EXTRAS}
        model.load_state_dict(state)
        return model


def _is_torchscript(path):
    """Whether a file is a zip archive with code in it, as torch.jit.save writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") or "/code/" in name for name in archive.namelist())


@contextlib.contextmanager
def _refused(what, cure=None):
    """Turn whatever a library raises in the block into a UserError."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  the hub, pickled files and tokenizers raise many things
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{what} ({reason})" + (f"; {cure}" if cure else "")) from None


@contextlib.contextmanager
def _quiet():
    """Without log or warnings: what open_clip logs as an error it also raises."""
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _say_at_once_if_offline():
    """Without a network the hub's client tries for most of a minute, unless it is told. Cached weights still load."""
    if any(os.environ.get(key) for key in PROXIES):
        return
    try:
        socket.create_connection(HUB, timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
