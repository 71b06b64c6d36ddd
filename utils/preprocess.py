"""Load a CLIP by its name and weights: model, transform and tokenizer, and what identifies it.

open_clip is imported inside the functions that use it: it takes seconds, and it reads the
environment, which `_give_up_early_if_offline` sets.
"""

import contextlib
import difflib
import logging
import os
import socket
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.cli import UserError, need, reason_of
from utils.device import PRECISIONS, pick_precision, precision_name
from utils.files import (
    check_is_fetched,
    differences,
    leaves,
    load_json,
    sha256,
    without_prefixes,
)

REPOSITORY = Path(__file__).resolve().parent.parent
HUB = ("huggingface.co", 443)
# If one of these is set, the user has configured the access to the hub; it is not tested.
HUB_VARIABLES = (
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
)
FILE_SUFFIXES = (".json", ".pt", ".pth", ".bin", ".safetensors")  # a name that ends so is no tag
IDENTITY = ("model", "model_sha256", "pretrained", "pretrained_sha256")  # in meta.json
MAX_LAYERS = 1000  # in a configuration; a model of more would take hours to build
MAX_NUMBER = 2**20  # of any other number there; more would not fit into memory
SCHEMES = ("hf-hub:", "local-dir:")  # of --model: configuration and weights in one place
TORCHSCRIPT_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # no weights


@dataclass
class Clip:
    """A frozen CLIP."""

    model: torch.nn.Module  # of open_clip, in eval mode
    transform: object  # PIL image -> (3, H, W)
    tokenizer: object  # list of texts -> (N, L)
    device: object
    dtype: torch.dtype  # of the images that it takes
    info: dict  # plain types: what meta.json says of it


@dataclass(frozen=True)
class ClipId:
    """What identifies a CLIP, as the meta.json of a cache has it; None where it does not say."""

    model: str | None  # as it was asked for
    pretrained: str | None
    model_sha256: str | None = None  # if it is a file
    pretrained_sha256: str | None = None
    precision: str | None = None  # of its matrix products, as --precision names it
    dtype: torch.dtype | None = None  # of the cache's embeddings
    origin: object = None  # where this was read, for messages

    @classmethod
    def of(cls, model, pretrained, precision=None):
        """The CLIP that these flags name.

        Raises: UserError if a file is missing.
        """
        if model.startswith(SCHEMES):
            return cls(model, model, None, None, precision)
        weights = _find("--pretrained", pretrained)
        weights_sum = sha256(weights) if weights else None
        model_sum = sha256(_find("--model", model)) if model.endswith(".json") else None
        return cls(model, pretrained, model_sum, weights_sum, precision)

    @classmethod
    def of_meta(cls, meta, origin=None):
        """The CLIP that the content of a meta.json names."""
        if not isinstance(meta, dict):
            meta = {}
        precision = meta.get("precision")
        if precision not in tuple(PRECISIONS):
            precision = None
        dtypes = {"float16": torch.float16, "float32": torch.float32}
        dtype = dtypes.get(str(meta.get("dtype")))
        identity = {key: meta.get(key) for key in IDENTITY}
        return cls(**identity, precision=precision, dtype=dtype, origin=origin)

    def is_complete(self):
        """Whether it says everything that is needed to embed a further text."""
        has_names = isinstance(self.model, str) and isinstance(self.pretrained, str)
        return has_names and self.precision is not None and self.dtype is not None

    def identity(self):
        """Model and weights with their SHA-256, as they stand in meta.json."""
        return {key: getattr(self, key) for key in IDENTITY}

    def readable(self):
        """{"model", "pretrained"}: a tag, or the name of a file with its sum."""
        return {
            "model": _readable(self.model, self.model_sha256),
            "pretrained": _readable(self.pretrained, self.pretrained_sha256),
        }

    def difference(self, other):
        """What changes from this CLIP to another, in words; empty if nothing does."""
        return differences(self.readable(), other.readable())

    def contradicts(self, other):
        """Whether another CLIP is different, as far as is known.

        The checksums decide if both have one, else the names without folders.
        """
        models_differ = _differ(self.model, self.model_sha256, other.model, other.model_sha256)
        weights_differ = _differ(
            self.pretrained, self.pretrained_sha256, other.pretrained, other.pretrained_sha256
        )
        return models_differ or weights_differ

    def load(self, device="cpu", model=None, pretrained=None, precision="auto"):
        """This very CLIP, as a Clip.

        Args:
            model, pretrained: where its files are now, if elsewhere.
            precision: as --precision names it; "auto": as it was.
        Raises: UserError if it cannot be loaded, or is another one.
        """
        if precision == "auto":
            precision = self.precision
        dtype = pick_precision(precision, torch.device(device))
        clip = load_clip(model or self.model, pretrained or self.pretrained, device, dtype)
        changed = self.difference(ClipId.of_meta(clip.info))
        cure = "embed texts with the CLIP of their cache"
        need(not changed, f"{self.origin}: was made with another CLIP: {changed}; {cure}")
        return clip


def _readable(name, file_sum):
    return f"{Path(str(name)).name} (SHA-256 {str(file_sum)[:16]})" if file_sum else name


def _differ(name, file_sum, other_name, other_sum):
    if file_sum and other_sum:
        return file_sum != other_sum
    if name is None or other_name is None:  # nothing is known
        return False
    return Path(str(name)).name != Path(str(other_name)).name


def load_clip(name, pretrained, device="cpu", dtype=torch.float32):
    """A CLIP, as a Clip. Relative paths are also looked for in the repository itself.

    Args:
        name: an open_clip model, the path of a model configuration (.json), or hf-hub:owner/name
            or local-dir:FOLDER, which name the weights as well.
        pretrained: an open_clip tag, or the path of weights: a state dict (.safetensors, .pt) or
            OpenAI's archive.
        device: where it is to run.
        dtype: of the weights of its matrix products, and of the activations between them; layer
            norms compute in float32.
    Raises: UserError if the name, the tag or the file does not exist, or if they do not belong
        together.
    """
    if name.startswith(SCHEMES):
        return _load_by_scheme(name, device, dtype)
    weights = _find("--pretrained", pretrained)
    if weights is None:
        _give_up_early_if_offline()
    import open_clip

    model_name = _register(name)
    has_quick_gelu = bool(open_clip.get_model_config(model_name).get("quick_gelu"))
    quick_gelu_name = f"{model_name}-quickgelu"
    has_twin = not has_quick_gelu and quick_gelu_name in open_clip.list_models()
    twin = quick_gelu_name if has_twin else None
    precision = precision_name(dtype)
    with _quiet():
        if weights is None:
            model = _create_by_tag(model_name, pretrained, precision, twin)
        else:
            model = _create_from_file(model_name, weights, precision, pretrained, has_quick_gelu)
        with _refused(f"--model {model_name}: its tokenizer cannot be loaded"):
            tokenizer = open_clip.get_tokenizer(model_name)
    if weights is not None and twin:
        note = "note: %s has no QuickGELU; weights that OpenAI trained need --model %s"
        logging.warning(note, model_name, twin)
    return _as_clip(model, tokenizer, name, pretrained, device, dtype)


def _load_by_scheme(name, device, dtype):
    """A CLIP whose configuration and weights lie in one place, hf-hub:owner/name or a folder."""
    if name.startswith("hf-hub:"):
        _give_up_early_if_offline()
    import open_clip

    cure = "it needs open_clip_config.json and weights, such as open_clip_model.safetensors"
    with _quiet(), _refused(f"--model {name}: cannot be loaded", cure):
        model = open_clip.create_model(
            name, precision=precision_name(dtype), require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    return _as_clip(model, tokenizer, name, name, device, dtype)


def _as_clip(model, tokenizer, name, pretrained, device, dtype):
    """A model of open_clip as a Clip."""
    import open_clip

    model.eval().requires_grad_(False).to(device)
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False  # else convolutions round to 10 bits on CUDA
    settings = open_clip.get_model_preprocess_cfg(model)
    configuration = open_clip.transform.PreprocessCfg(**settings)
    transform = open_clip.transform.image_transform_v2(configuration, is_train=False)
    info = {**ClipId.of(name, pretrained).identity(), "precision": precision_name(dtype)}
    info.update(_facts(model, tokenizer, settings))
    return Clip(model, transform, tokenizer, device, dtype, info)


def _facts(model, tokenizer, settings):
    """What meta.json says of a model besides its name."""
    size = model.visual.image_size
    logit_scale = None
    if hasattr(model, "logit_scale"):
        logit_scale = float(model.logit_scale.detach().float().exp())
    return {
        "image_size": list(size) if isinstance(size, tuple | list) else [size, size],
        "mean": [float(value) for value in settings["mean"]],
        "std": [float(value) for value in settings["std"]],
        "context_length": int(getattr(tokenizer, "context_length", 0) or 0),
        "logit_scale": logit_scale,
    }


def tokenize(tokenizer, texts):
    """Turn texts into rows of tokens. A text longer than the context is cut, as by every CLIP.

    Returns: tokens (N, L), int64; N bools, whether a text is cut.
    """
    tokens = tokenizer(texts)
    length = tokens.shape[1]
    padding = tokenizer([""])[0, -1]
    # This is also true if a text fits exactly; the loop finds these.
    is_cut = (tokens[:, -1] != padding).tolist()
    for row, text in enumerate(texts):
        if is_cut[row]:
            one_longer = tokenizer([text], context_length=length + 1)[0, :length]
            is_cut[row] = not torch.equal(one_longer, tokens[row])
    return tokens, is_cut


def have_unknown_words(clip, tokens):
    """Whether each row of tokens (N, L) has a word that the model does not know: N bools.

    A word is unknown if the model's embedding of it is zero. Only the built-in CLIP has such words,
    since its vocabulary is that of its small world.
    Raises: UserError if the model has fewer tokens than its tokenizer.
    """
    embedding = getattr(getattr(clip.model, "text", clip.model), "token_embedding", None)
    if embedding is None:
        return [False] * len(tokens)
    is_empty = (embedding.weight == 0).all(dim=1).cpu()
    problem = f"a vocabulary of {len(is_empty)} is too small for its tokenizer"
    fits = tokens.max() < len(is_empty)
    need(fits, f"--model {clip.info['model']}: {problem}; fix vocab_size")
    is_empty[0] = False  # padding
    return is_empty[tokens].any(dim=1).tolist()


def _find(flag, name):
    """The absolute path of a file, here or in the repository; None if the name is that of a tag.

    Links are not followed.
    """
    problem = "is empty: without weights the embeddings would be random"
    need(name, f"{flag} {problem}; give a tag or a local file")
    for path in (Path(os.path.expanduser(name)).absolute(), REPOSITORY / name):
        if path.is_file():
            return path
    is_tag = "/" not in name and not name.endswith(FILE_SUFFIXES)
    need(is_tag, f"{flag} {name}: no such file")
    return None


def _register(name):
    """The open_clip name of --model; a configuration file is added to open_clip's list."""
    import open_clip

    if not name.endswith(".json"):
        models = open_clip.list_models()
        close = ", ".join(difflib.get_close_matches(name, models, n=4, cutoff=0.4)) or "none"
        need(name in models, f"--model {name}: open_clip has no such model; close to it: {close}")
        return name
    path = _find("--model", name)
    config = load_json(path)
    is_config = (
        isinstance(config, dict) and {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys()
    )
    fields = "embed_dim, vision_cfg, text_cfg"
    need(is_config, f"--model {name}: not an open_clip model configuration ({fields})")
    for key, value in leaves(config):
        if isinstance(value, int | float):
            limit = MAX_LAYERS if key == "layers" else MAX_NUMBER
            fits = abs(value) <= limit  # False for NaN
            problem = f"{key} is {value}, which no model has"
            need(fits, f"--model {name}: {problem}; fix the configuration")
    open_clip.add_model_config(path)
    return path.stem


def _create_by_tag(name, tag, precision, twin):
    """The model with downloaded weights on the CPU; refused if they need its QuickGELU twin."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    which = f"its tags are {', '.join(tags)}" if tags else "it has no published weights"
    problem = f"no such file, and no tag of {name}: {which}"
    need(tag in tags, f"--pretrained {tag}: {problem}; or give a local file")
    tag_config = open_clip.get_pretrained_cfg(name, tag) or {}
    needs_twin = twin and tag_config.get("quick_gelu")
    problem = f"the weights of {tag} need QuickGELU"
    need(not needs_twin, f"--model {name}: {problem}: --model {twin}")
    cure = "give the path of a local weights file instead, "
    cure += "or try --dataset shapes, which needs no download"
    with _refused(f"--pretrained {tag}: cannot be downloaded", cure):
        return open_clip.create_model(name, pretrained=tag, precision=precision)


def _create_from_file(name, path, precision, pretrained, has_quick_gelu):
    """The model with the weights of a file on the CPU; `pretrained` names it in messages."""
    import open_clip

    check_is_fetched(path, f"--pretrained {pretrained}")
    what = f"--pretrained {pretrained}: not weights of {name}"
    cure = "give a --model and a --pretrained that belong together"
    if path.suffix in (".npz", ".npy"):  # of SigLIP's authors, which open_clip converts
        with _refused(what, cure):
            return open_clip.create_model(name, pretrained=str(path), precision=precision)
    is_archive = _is_torchscript(path)
    problem = f"{path.name} is OpenAI's archive, whose weights need QuickGELU"
    fits = not is_archive or has_quick_gelu
    need(fits, f"--model {name}: {problem}: --model {name}-quickgelu")
    weights, is_plain = _read_weights(path, pretrained, is_archive)
    with _refused(what, cure):
        if not is_archive:
            with _as_plain_file(path, weights, is_plain) as file:
                return open_clip.create_model(name, pretrained=file, precision=precision)
        model = open_clip.create_model(name, pretrained=None, precision=precision)
        model.load_state_dict(weights)
        return model


def _read_weights(path, pretrained, is_archive):
    """The state dict of a file, without what training adds around it and before its names.

    Returns: {name: tensor}; whether the file has just this.
    """
    cure = "save its state dict alone as .safetensors"
    with _refused(f"--pretrained {pretrained}: not readable", cure):
        if is_archive:
            weights = torch.jit.load(str(path), map_location="cpu").state_dict()
            names = [name for name in weights if name not in TORCHSCRIPT_EXTRAS]
            return {name: weights[name].float() for name in names}, True
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals(_numpy_scalars()):
                content = torch.load(path, map_location="cpu", weights_only=True)
        is_plain = True
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not weights")
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
                is_plain = False
        weights = dict(content)
    plain_weights = without_prefixes(weights)
    is_plain = is_plain and plain_weights.keys() == weights.keys()
    weights = plain_weights
    is_of_transformers = any(name.startswith("text_model.") for name in weights)
    problem = (
        "its weights have the names of the package transformers, which open_clip does not read"
    )
    cure = "use open_clip's own, such as --pretrained openai or laion2b_s34b_b79k"
    need(not is_of_transformers, f"--pretrained {pretrained}: {problem}; {cure}")
    return weights, is_plain


def _numpy_scalars():
    """What a checkpoint with numpy numbers, such as its best accuracy, is made of: plain data."""
    import numpy

    kinds = [type(numpy.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
    return [numpy.core.multiarray.scalar, numpy.dtype, *kinds]


@contextlib.contextmanager
def _as_plain_file(path, weights, is_plain):
    """A file with nothing but these weights, as open_clip reads it: its path as a string.

    Args: is_plain: whether the file itself is one.
    """
    if is_plain:
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "weights.pt")
        torch.save(weights, file)
        yield str(file)


def _is_torchscript(path):
    """Whether a file was written by torch.jit.save, as OpenAI's archives are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("constants.pkl") or "/code/" in name for name in names)


@contextlib.contextmanager
def _refused(what, cure=None):
    """Turn whatever a library raises in the block into a UserError."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  hub, files and tokenizers raise many things
        message = f"{what} ({reason_of(error)})"
        if cure:
            message += f"; {cure}"
        raise UserError(message) from None


@contextlib.contextmanager
def _quiet():
    """Without log or warnings: what open_clip logs as an error it also raises."""
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(level)


def _give_up_early_if_offline():
    """If the hub cannot be reached, tell its client, which would else try for most of a minute.

    Weights that it has cached still load.
    """
    if any(os.environ.get(key) for key in HUB_VARIABLES):
        return
    try:
        socket.create_connection(HUB, timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
