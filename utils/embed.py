"""Pictures and texts through a frozen CLIP: the same bytes whatever the batch size, the workers or the ranks."""

import copy
import logging
import signal
from collections import Counter
from importlib.metadata import version
from typing import NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from utils.cli import UserError, need
from utils.distributed import is_first, rank, sum_over_ranks, world_size
from utils.preprocess import tokenize

CHUNK = 64  # rows of every call of an encoder: a row's last bits depend on how many there are
STEP = 4  # texts are encoded at a multiple of so many tokens: fewer lengths fill more chunks
PACKAGES = ("torch", "torchvision", "open_clip_torch", "pillow")  # what the embeddings' last bits depend on


class Unit(Protocol):
    """What is encoded at once and kept when a run is stopped. `embed_units` needs this of it, and knows no data set."""

    texts: list | None  # those to embed; None: there are none; empty: they come with the pictures, as in a tar
    pictures: int | None  # how many there are; None: only reading them tells

    def streams(self, size):
        """Functions of the CLIP's transform that yield `Samples`, at most `size` of them at a time: a list."""

    def name(self, key):
        """A sample in a message."""

    def describe(self, key, reason):
        """A broken sample in a message."""

    def left_out(self, folder):
        """The broken samples without which it is kept in a folder, {key: reason}; None if it is still to be made."""

    def save(self, folder, embedded):
        """Keep what it became, an `Embedded`, in a folder."""


class Samples(NamedTuple):
    """B samples as a stream hands them over."""

    keys: list  # B names or rows; none if the stream cannot be read to its end, for the one reason in errors
    captions: list  # B texts; none where pictures come alone
    pictures: torch.Tensor | None  # (B, 3, H, W), black where one is broken; None if all are
    errors: list  # B reasons; None where nothing is broken


class Embedded:
    """What a unit becomes: image (n, D) of n keys, text (m, D) of m captions, in the cache's dtype; None where none.

    left_out: {key: reason} of what was broken. notes: what `embed_texts` noted of the captions.
    """

    def __init__(self, unit):
        self.unit, self.captions = unit, None if unit.texts is None else list(unit.texts)
        self.keys, self.left_out, self.notes = [], {}, {}
        self.image = self.text = None
        self._pieces = []

    def add(self, samples, clip):
        """Encode the pictures of some samples: a broken one, black, keeps its place in a chunk, and is left out."""
        good = [row for row, error in enumerate(samples.errors) if not error]
        self.left_out |= {key: error for key, error in zip(samples.keys, samples.errors, strict=True) if error}
        self.keys += [samples.keys[row] for row in good]
        if samples.captions:
            self.captions += [samples.captions[row] for row in good]
        if samples.pictures is not None:
            self._pieces.append(in_chunks(clip.model.encode_image, samples.pictures.to(clip.dtype), clip.device)[good])

    def finish(self, clip, dtype, bar):
        """Embed the captions, bring everything into the cache's dtype, and return self."""
        if self.captions is not None:
            text, self.notes = embed_texts(clip, self.captions, bar)
            self.text = to_dtype(text, dtype, self.captions)
            self._pieces = self._pieces or [text[:0]]  # the width, where there is no picture
        names = [self.unit.name(key) for key in self.keys]
        self.image = to_dtype(torch.cat(self._pieces) if self._pieces else torch.empty(0), dtype, names)
        return self


class Broken:
    """The broken samples so far; when there are more than may be left out, all are named in the log."""

    def __init__(self, allowed):
        self.allowed, self.messages = allowed, []

    def add(self, messages):
        """Count some more, and name them if there are too many."""
        unnamed = messages if self.too_many() else [*self.messages, *messages]
        self.messages += messages
        for message in unnamed if self.too_many() else ():
            logging.error("%s", message)

    def too_many(self):
        """Whether there are more than may be left out."""
        return len(self.messages) > self.allowed

    def check(self):
        """Raise a UserError if there are too many."""
        count, last = len(self.messages), (self.messages or [""])[-1]
        cure = f"mend them, or leave them out with --skip-broken or --max-broken {count}"
        need(not self.too_many(), f"{last} ({count} broken samples in all; {cure})")


@torch.inference_mode()
def embed_units(units, clip, store, batch_size=CHUNK, workers=0):
    """Embed this rank's share of the units, as far as they are missing, and keep each as soon as it is done.

    When more samples are broken than may be, nothing more is encoded, but all is still read, so that all are named.
    Args:
        units: list of `Unit`, the same on every rank; of R ranks, each takes every R-th one.
        clip: Clip.
        store: UnitStore: the folder, the dtype and how many samples may be broken.
        batch_size: pictures that a decoding process hands over at a time.
        workers: decoding processes; 0: this one decodes.
    Raises: UserError if too many samples are broken, a stream cannot be read or an embedding is not finite.
    """
    left_out = {unit: unit.left_out(store.folder) for unit in units[rank() :: world_size()]}
    may_be_mended = sum_over_ranks(sum(len(samples or ()) for samples in left_out.values())) > store.max_broken
    missing = [unit for unit, samples in left_out.items() if samples is None or (samples and may_be_mended)]
    broken = Broken(store.max_broken)
    broken.add([unit.describe(*each) for unit in left_out if unit not in missing for each in left_out[unit].items()])
    streams = [(unit, stream) for unit in missing for stream in unit.streams(-(-batch_size // CHUNK) * CHUNK)]
    decoding = _Decoding([stream for _, stream in streams], clip.transform)
    loader = DataLoader(decoding, batch_size=None, num_workers=min(workers, len(streams)))
    running = Counter(unit for unit, _ in streams)
    embedded = {unit: Embedded(unit) for unit in missing}
    with _bar("texts", [len(unit.texts or ()) for unit in missing]) as texts_bar:
        with _bar("images", [unit.pictures for unit in missing]) as bar:
            for number, samples in loader:
                unit = streams[number][0]
                if samples is None:  # the end of a stream
                    running[unit] -= 1
                else:
                    need(samples.keys, samples.errors[0])
                    errors = zip(samples.keys, samples.errors, strict=True)
                    broken.add([unit.describe(key, error) for key, error in errors if error])
                    bar.update(len(samples.keys))
                    if not broken.too_many():
                        embedded[unit].add(samples, clip)
                if not running[unit] and not broken.too_many():
                    unit.save(store.begin(), embedded.pop(unit).finish(clip, store.dtype, texts_bar))
        broken.check()
        for unit, texts in embedded.items():  # those without pictures
            unit.save(store.begin(), texts.finish(clip, store.dtype, texts_bar))


class _Decoding(IterableDataset):
    """Streams for a DataLoader, whose workers take one in turn: (number of the stream, Samples, or None at its end)."""

    def __init__(self, streams, transform):
        self.streams, self.transform = list(enumerate(streams)), transform

    def __iter__(self):
        worker = get_worker_info()
        if worker is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
        for number, stream in self.streams if worker is None else self.streams[worker.id :: worker.num_workers]:
            for samples in stream(self.transform):
                yield number, samples
            yield number, None


def _bar(what, counts):
    total = None if None in counts else sum(counts)
    is_off = not is_first() or total == 0
    return tqdm(total=total, desc=what, unit=what.removesuffix("s"), mininterval=0.5, disable=is_off)


def encode_texts(clip, texts):
    """The embeddings of M texts, (M, D) float32 on the CPU; a warning says which of them the CLIP cannot read."""
    with _bar("texts", [len(texts)]) as bar:
        z, notes = embed_texts(clip, texts, bar)
    say_notes([notes], clip.info["context_length"])
    return z


@torch.inference_mode()
def embed_texts(clip, texts, bar):
    """Embed M texts, which may be none, each distinct one once.

    Returns: (M, D) float32 on the CPU; notes, {"cut": how many distinct texts are too long, "unknown": how many have
        unknown words, "example": one of these}.
    """
    distinct, row_of_text = distinct_texts(texts)
    tokens, is_cut, is_unknown = tokenize(clip, distinct or ["a"])  # without any text, one for the width
    unknown = [text for text, flag in zip(distinct, is_unknown, strict=False) if flag]
    notes = {"cut": sum(is_cut[: len(distinct)]), "unknown": len(unknown), "example": (unknown or [""])[0]}
    return encode_tokens(clip, tokens, bar)[row_of_text], notes


def encode_tokens(clip, tokens, bar):
    """The embeddings of N token rows (N, L), (N, D) float32 on the CPU, each encoded no longer than its text is.

    What stands behind the token that it is read off does not matter to it. The length depends on a text alone, not on
    what else there is, and so do the last bits of its embedding.
    """
    lengths = (-(-text_ends(clip.model, tokens) // STEP) * STEP).clamp(max=tokens.shape[1])
    parts, order = [], lengths.argsort(stable=True)
    for length, count in zip(*(numbers.tolist() for numbers in lengths.unique(return_counts=True)), strict=True):
        some = tokens[order[sum(map(len, parts)) :][:count], :length]
        encode = clip.model.encode_text if length == tokens.shape[1] else shortened(clip.model, length).encode_text
        parts.append(in_chunks(encode, some, clip.device))
        bar.update(count)
    return torch.cat(parts)[order.argsort()]


def text_ends(model, tokens):
    """How many tokens of each row (N, L) matter: (N,) int64; all of them unless each token sees only those before it
    and the embedding is read off the end-of-text token, as in OpenAI's and most of open_clip's CLIPs.
    """
    tower = getattr(model, "text", model)
    mask, pool = getattr(tower, "attn_mask", None), getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    is_causal = mask is not None and torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))
    if is_causal and getattr(tower, "cls_emb", None) is None and pool in ("argmax", "eos"):
        ends = tokens if pool == "argmax" else tokens == getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
        return ends.int().argmax(dim=1) + 1
    return torch.full((len(tokens),), tokens.shape[1])


def shortened(model, length):
    """A CLIP with the same weights whose text tower reads so many tokens and no more."""
    tower = getattr(model, "text", model)
    short = copy.copy(tower)
    positions = torch.nn.Parameter(tower.positional_embedding[:length], requires_grad=False)
    short._parameters = tower._parameters | {"positional_embedding": positions}
    short._buffers = tower._buffers | {"attn_mask": tower.attn_mask[:length, :length]}
    if tower is model:
        return short
    around = copy.copy(model)
    around._modules = model._modules | {"text": short}
    return around


def distinct_texts(texts):
    """Each text once, in order of first appearance; and where each of the M texts stands among these, M rows."""
    row_of = {}
    rows = [row_of.setdefault(text, len(row_of)) for text in texts]
    return list(row_of), rows


def say_notes(notes, context_length):
    """Warn of texts that the CLIP cannot read to the end, or has no words for: notes as `embed_texts` makes them."""
    cut, unknown = (sum(note[key] for note in notes) for key in ("cut", "unknown"))
    if cut:
        note = "note: %d texts are longer than the model reads (%d tokens); their ends are left out"
        logging.warning(note, cut, context_length)
    if unknown:
        example = next(note["example"] for note in notes if note["unknown"])[:80]
        note = "note: %d texts have words that this CLIP has never seen, such as %r; do not trust their embeddings"
        logging.warning(note, unknown, example)


def in_chunks(encode, inputs, device):
    """encode(inputs), (N, ...) -> (N, D) float32 on the CPU, CHUNK rows a call: the last row fills the last one up."""
    rows = torch.arange(-(-len(inputs) // CHUNK) * CHUNK).clamp(max=len(inputs) - 1)
    return torch.cat([encode(inputs[some].to(device)).float().cpu() for some in rows.split(CHUNK)])[: len(inputs)]


def to_dtype(z, dtype, names):
    """Embeddings (N, D) in the dtype of a cache.

    Raises: UserError that gives the first of the N names whose embedding is not finite then.
    """
    z = z.to(dtype)
    bad = (~torch.isfinite(z).all(dim=-1)).nonzero().flatten().tolist()
    if bad:
        name = str(names[bad[0]])[:200]
        raise UserError(f"the embedding of {name!r} is not finite; try --precision fp32 --dtype float32")
    return z


def versions():
    """The packages that the embeddings' last bits depend on: {name: version}."""
    return {package: version(package) for package in PACKAGES}
