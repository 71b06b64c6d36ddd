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

from utils.cli import UserError, need
from utils.device import PRECISIONS, pick_precision, precision_name
from utils.files import differences, leaves, load_json, sha256
from utils.lazy import Lazy

open_clip = Lazy("open_clip")  # loaded after _say_at_once_if_offline, which sets what it reads of the environment
REPOSITORY = Path(__file__).resolve().parent.parent
HUB = ("huggingface.co", 443)
PROXIES = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
FILES = (".json", ".pt", ".pth", ".bin", ".safetensors")  # what ends so is no tag
SUMS = ("model", "model_sha256", "pretrained", "pretrained_sha256")  # in meta.json
MOST = {"layers": 1000}  # in a configuration: a model of more takes hours to build
LARGEST = 2**20  # of any other number: more memory than there is
TORCHSCRIPT_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives, and no weights


@dataclass
class Clip:
    """A frozen CLIP."""

    model: torch.nn.Module  # of open_clip, in eval mode
    transform: object  # PIL image -> (3, H, W)
    tokenizer: object  # list of texts -> (N, L)
    device: object
    dtype: torch.dtype  # of the pictures that it takes
    info: dict  # plain types: what meta.json says of it


@dataclass(frozen=True)
class ClipId:
    """What tells one CLIP from another, as the meta.json of a cache has it; None where it does not tell."""

    model: str | None  # as it was asked for
    pretrained: str | None
    model_sha256: str | None = None  # if it is a file
    pretrained_sha256: str | None = None
    precision: str | None = None  # of its matrix products, as --precision names it
    dtype: torch.dtype | None = None  # of the cache's embeddings
    origin: object = None  # where this stands, for messages

    @classmethod
    def of(cls, model, pretrained, precision=None):
        """The CLIP that these flags name.

        Raises: UserError where a file is not there.
        """
        weights = _find("--pretrained", pretrained)
        config = _find("--model", model) if model.endswith(".json") else None
        return cls(model, pretrained, config and sha256(config), weights and sha256(weights), precision)

    @classmethod
    def of_meta(cls, meta, origin=None):
        """The CLIP that the content of a meta.json names."""
        meta = meta if isinstance(meta, dict) else {}
        precision = meta.get("precision") if meta.get("precision") in tuple(PRECISIONS) else None
        dtype = {"float16": torch.float16, "float32": torch.float32}.get(str(meta.get("dtype")))
        return cls(**{key: meta.get(key) for key in SUMS}, precision=precision, dtype=dtype, origin=origin)

    def is_complete(self):
        """Whether it tells all that it takes to embed a further text."""
        return isinstance(self.model, str) and isinstance(self.pretrained, str) and self.precision and self.dtype

    def sums(self):
        """Model and weights with their SHA-256, as they stand in meta.json."""
        return {key: getattr(self, key) for key in SUMS}

    def readable(self):
        """{"model", "pretrained"}: a tag, or the name of a file with its sum."""

        def words(name, found):
            return f"{Path(str(name)).name} (SHA-256 {str(found)[:16]})" if found else name

        model, model_sha256, pretrained, pretrained_sha256 = self.sums().values()
        return {"model": words(model, model_sha256), "pretrained": words(pretrained, pretrained_sha256)}

    def difference(self, other):
        """What changes from this CLIP to another, in words; empty where nothing does."""
        return differences(self.readable(), other.readable())

    def contradicts(self, other):
        """Whether a name, of a file without its folder, is another one; where both tell a sum, that alone counts."""

        def is_another(key):
            sums = [getattr(clip, f"{key}_sha256") for clip in (self, other)]
            names = [Path(str(getattr(clip, key))).name for clip in (self, other)]
            mine, theirs = sums if all(sums) else names
            return mine != theirs

        return is_another("model") or is_another("pretrained")

    def load(self, device="cpu", model=None, pretrained=None, precision="auto"):
        """This very CLIP, as a Clip.

        Args:
            model, pretrained: where it is now, if elsewhere.
            precision: as --precision names it; "auto": as it was.
        Raises: UserError if it cannot be loaded or is another one.
        """
        dtype = pick_precision(self.precision if precision == "auto" else precision, torch.device(device))
        clip = load_clip(model or self.model, pretrained or self.pretrained, device, dtype)
        changed = self.difference(ClipId.of_meta(clip.info))
        cure = "embed texts with the CLIP of their cache"
        need(not changed, f"{self.origin}: was made with another CLIP: {changed}; {cure}")
        return clip


def load_clip(name, pretrained, device="cpu", dtype=torch.float32):
    """A CLIP, as a Clip; relative paths are also looked for in the repository itself.

    Args:
        name: an open_clip model, or the path of a model configuration (.json).
        pretrained: an open_clip tag, or the path of weights: a state dict (.safetensors, .pt) or OpenAI's archive.
        device: where it is to run.
        dtype: of the weights of its matrix products; sums and norms stay in float32.
    Raises: UserError where the name, the tag or the file is not there or they do not belong together.
    """
    weights = _find("--pretrained", pretrained)
    if weights is None:
        _say_at_once_if_offline()
    model_name = _register(name)
    has_quick_gelu = bool(open_clip.get_model_config(model_name).get("quick_gelu"))
    twin = f"{model_name}-quickgelu"
    twin = twin if not has_quick_gelu and twin in open_clip.list_models() else None
    with _quiet():
        if weights is None:
            model = _create_by_tag(model_name, pretrained, precision_name(dtype), twin)
        else:
            model = _create_from_file(model_name, weights, precision_name(dtype), pretrained, has_quick_gelu)
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
    Returns: tokens (N, L), int64; N bools: whether a text is cut; N bools: whether it has an unknown word.
    Raises: UserError if the model has fewer tokens than its tokenizer.
    """
    tokens = clip.tokenizer(texts)
    length = tokens.shape[1]
    is_cut = (tokens[:, -1] != clip.tokenizer([""])[0, -1]).tolist()  # or fits: no padding follows
    for row, text in enumerate(texts):
        if is_cut[row]:
            with_more_room = clip.tokenizer([text], context_length=length + 1)[0, :length]  # it goes on if it was cut
            is_cut[row] = not torch.equal(with_more_room, tokens[row])
    unknown = torch.zeros(len(texts), dtype=torch.bool)
    embedding = getattr(getattr(clip.model, "text", clip.model), "token_embedding", None)
    if embedding is not None:
        empty = (embedding.weight == 0).all(dim=1).cpu()
        what = f"a vocabulary of {len(empty)} is too small for its tokenizer"
        need(tokens.max() < len(empty), f"--model {clip.info['model']}: {what}; mend vocab_size")
        empty[0] = False  # padding
        unknown = empty[tokens].any(dim=1)
    return tokens, is_cut, unknown.tolist()


def _find(flag, name):
    """The absolute path of a file, here or else in the repository, links not followed; None if the name is a tag's."""
    need(name, f"{flag} is empty: without weights the embeddings would be random; give a tag or a local file")
    paths = (Path(os.path.expanduser(name)).absolute(), REPOSITORY / name)
    path = next((path for path in paths if path.is_file()), None)
    need(path or not ("/" in name or name.endswith(FILES)), f"{flag} {name}: no such file")
    return path


def _register(name):
    """The open_clip name of --model, after adding a configuration file to open_clip's list."""
    if not name.endswith(".json"):
        close = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.4)) or "none"
        need(name in open_clip.list_models(), f"--model {name}: open_clip has no such model; close to it: {close}")
        return name
    path = _find("--model", name)
    config = load_json(path)
    is_config = isinstance(config, dict) and {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys()
    need(is_config, f"--model {name}: not an open_clip model configuration (embed_dim, vision_cfg, text_cfg)")
    for key, value in leaves(config):
        fits = not isinstance(value, int | float) or abs(value) <= MOST.get(key, LARGEST)  # NaN is never
        need(fits, f"--model {name}: {key} is {value}, which no model has; mend the configuration")
    open_clip.add_model_config(path)
    return path.stem


def _create_by_tag(name, tag, precision, twin):
    """The model with downloaded weights on the CPU; refused if they need its twin with QuickGELU."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    which = f"its tags are {', '.join(tags)}" if tags else "it has no published weights"
    need(tag in tags, f"--pretrained {tag}: no such file, and no tag of {name}: {which}; or give a local file")
    needs_twin = twin and (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu")
    need(not needs_twin, f"--model {name}: the weights of {tag} need QuickGELU: --model {twin}")
    cure = "give the path of a local weights file instead, or try --dataset shapes, which needs no download"
    with _refused(f"--pretrained {tag}: cannot be downloaded", cure):
        return open_clip.create_model(name, pretrained=tag, precision=precision)


def _create_from_file(name, path, precision, pretrained, has_quick_gelu):
    """The model with the weights of a file on the CPU; --pretrained names it in messages."""
    archive = None
    with _refused(f"--pretrained {pretrained}: not readable"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as content:
                has_code = any(file.endswith("constants.pkl") or "/code/" in file for file in content.namelist())
            archive = torch.jit.load(str(path), map_location="cpu") if has_code else None  # of torch.jit.save
    what = f"{path.name} is OpenAI's archive, whose weights need QuickGELU"
    need(archive is None or has_quick_gelu, f"--model {name}: {what}: --model {name}-quickgelu")
    with _refused(f"--pretrained {pretrained}: not weights of {name}"):
        if archive is None:
            return open_clip.create_model(name, pretrained=str(path), precision=precision)
        model = open_clip.create_model(name, pretrained=None, precision=precision)
        weights = {key: value.float() for key, value in archive.state_dict().items() if key not in TORCHSCRIPT_EXTRAS}
        model.load_state_dict(weights)
        return model


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
        with warnings.catch_warnings(action="ignore"):
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
