"""Images and texts through a frozen CLIP.

The result has the same bytes whatever the batch size, the workers or the ranks.
"""

import contextlib
import copy
import logging
import shutil
import signal
from collections import Counter
from importlib.metadata import version
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from utils.cli import UserError, need
from utils.device import sent
from utils.distributed import is_first, rank, sum_over_ranks, world_size
from utils.preprocess import have_unknown_words, tokenize

# Rows of every call of an encoder. The last bits of a row depend on how many there are.
CHUNK = 64
CHUNK_ON_GPU = 256  # fewer keep it waiting for the host
STEP = 4  # texts have a multiple of this many tokens; fewer different lengths make fuller chunks
PACKAGES = ("torch", "torchvision", "open_clip_torch", "pillow")  # the last bits depend on them


class Unit(Protocol):
    """A part of a split that is embedded and saved as a whole.

    `embed_units` needs this of a unit, and knows no data set.
    """

    texts: list | None  # to embed; None: there are none; empty: they come with the images (tars)
    image_count: int | None  # how many images; None: only reading them tells

    def streams(self, size):
        """A list of functions; each takes the CLIP's transform and yields `Samples` of `size`."""

    def name(self, key):
        """The name of a sample in messages."""

    def left_out(self, folder):
        """The broken samples that the finished unit in a folder leaves out, {key: reason}.

        None if it is not finished.
        """

    def save(self, folder, embedded):
        """Save this unit's `Embedded` in a folder."""


class Samples(NamedTuple):
    """B samples as a stream hands them over."""

    keys: list  # B names or rows; empty if the stream cannot be read on, for the reason in errors
    captions: list  # B lists of texts; empty if images come alone
    # (B, 3, H, W), zeros where one is broken; None if all are. `_Decoding` makes bytes of it.
    images: np.ndarray | torch.Tensor | None
    errors: list  # B reasons; None where nothing is broken


class Embedded:
    """What a unit becomes.

    Attributes:
        image: (n, D), of n keys; None until it is finished.
        text: (m, D), of m captions; None if the unit has no texts.
        keys: of the images.
        image_of_caption: for captions that come with the images, the position of each one's key.
        left_out: {key: reason} of what was broken.
        notes: what `embed_texts` noted of the captions.
    """

    def __init__(self, unit):
        self.unit = unit
        self.captions = None if unit.texts is None else list(unit.texts)
        self.keys = []
        self.image_of_caption = []
        self.left_out = {}
        self.notes = {}
        self.image = None
        self.text = None
        self._pieces = []

    def add(self, samples, clip):
        """Encode the images of some samples. A broken one stays in its chunk, as zeros."""
        good = []
        for row, (key, error) in enumerate(zip(samples.keys, samples.errors, strict=True)):
            if error:
                self.left_out[key] = error
                continue
            good.append(row)
            self.keys.append(key)
            if samples.captions:
                self.captions += samples.captions[row]
                self.image_of_caption += [len(self.keys) - 1] * len(samples.captions[row])
        if samples.images is not None:
            images = torch.as_tensor(samples.images).view(clip.dtype)  # numbers again
            encoded = in_chunks(clip.model.encode_image, images, clip.device)
            if len(good) < len(encoded):
                encoded = encoded[good]
            self._pieces.append(encoded)

    def finish(self, clip, dtype, bar, tokenized=None):
        """Embed the captions, and bring everything into the cache's dtype; returns itself.

        Args: tokenized: as for `embed_texts`.
        """
        if self.captions is not None:
            text, self.notes = embed_texts(clip, self.captions, bar, tokenized)
            self.text = to_dtype(text, dtype, self.captions)
            if not self._pieces:
                self._pieces.append(text[:0])  # no images, but their width
        names = [self.unit.name(key) for key in self.keys]
        image = torch.cat(self._pieces).cpu() if self._pieces else torch.empty(0)
        self.image = to_dtype(image, dtype, names)
        return self


class Broken:
    """The broken samples so far. Once there are too many, all of them are named in the log."""

    def __init__(self, allowed):
        self.allowed = allowed
        self.messages = []
        self.named = 0  # of the messages

    def add(self, messages):
        """Count some more; name all that are not named yet if there are too many."""
        self.messages += messages
        if self.too_many():
            for message in self.messages[self.named :]:
                logging.error("%s", message)
            self.named = len(self.messages)

    def too_many(self):
        """Whether there are more than may be left out."""
        return len(self.messages) > self.allowed

    def check(self):
        """Raise a UserError if there are too many."""
        if self.too_many():
            count = len(self.messages)
            cure = (
                f"fix them, or leave them out with --skip-broken, or --max-broken {count} or more"
            )
            raise UserError(f"{self.messages[-1]} ({count} broken samples so far; {cure})")


@torch.inference_mode()
def embed_units(units, clip, store, batch_size=CHUNK, workers=0):
    """Embed this rank's share of the missing units, and keep each as soon as it is finished.

    If more samples are broken than allowed, nothing more is encoded, but everything is still read,
    so that all broken samples are named.

    Args:
        units: list of `Unit`, the same on every rank; of R ranks, each takes every R-th one.
        clip: Clip.
        store: UnitStore: the folder, the dtype and how many samples may be broken.
        batch_size: images that a decoding process hands over at a time; it is rounded up to whole
            chunks.
        workers: decoding processes; 0: this process decodes.
    Raises: UserError if too many samples are broken, a stream cannot be read or an embedding is
        not finite.
    """
    broken = Broken(store.max_broken)
    missing = missing_units(units, store, broken)
    embedded = {unit: Embedded(unit) for unit in missing}
    streams = []
    unit_of_stream = []
    chunk = chunk_size(clip.device)
    chunked_size = -(-batch_size // chunk) * chunk
    for unit in missing:
        for stream in unit.streams(chunked_size):
            streams.append(stream)
            unit_of_stream.append(unit)
    running = Counter(unit_of_stream)  # streams that are not at their end
    loader = _loader(_Decoding(streams, clip), min(workers, len(streams)))
    text_counts = [len(unit.texts or ()) for unit in missing]
    with _tell_of_a_dead_worker(), _bar("texts", text_counts) as texts_bar:
        with _bar("images", [unit.image_count for unit in missing]) as bar:
            for number, samples in loader:
                unit = unit_of_stream[number]
                if samples is None:  # the end of a stream
                    running[unit] -= 1
                else:
                    need(samples.keys, samples.errors[0])
                    broken.add(_messages(unit, zip(samples.keys, samples.errors, strict=True)))
                    bar.update(len(samples.keys))
                    if not broken.too_many():
                        embedded[unit].add(samples, clip)
                if not running[unit] and not broken.too_many():
                    finished = embedded.pop(unit).finish(clip, store.dtype, texts_bar)
                    unit.save(store.prepared_folder(), finished)
        broken.check()
        text_units = list(embedded)  # those without images
        tokenising = _Tokenising(text_units, clip.tokenizer)
        loader = _loader(tokenising, workers if len(text_units) > 1 else 0)
        for unit, tokenized in zip(text_units, loader, strict=True):
            finished = embedded.pop(unit).finish(clip, store.dtype, texts_bar, tokenized)
            unit.save(store.prepared_folder(), finished)


def missing_units(units, store, broken):
    """This rank's units that are still to be made.

    The broken samples of its finished units are added to `broken`. If the finished units of all
    ranks have more broken samples than allowed, the units with any are made again, since their
    files may have been fixed.
    """
    left_out = {unit: unit.left_out(store.folder) for unit in units[rank() :: world_size()]}
    broken_here = sum(len(samples) for samples in left_out.values() if samples)
    may_be_mended = sum_over_ranks(broken_here) > store.max_broken
    missing = []
    for unit, samples in left_out.items():
        if samples is None or (samples and may_be_mended):
            missing.append(unit)
            continue
        broken.add(_messages(unit, samples.items()))
    return missing


def _messages(unit, reasons):
    """The broken ones of some samples, given as (key, reason or None), in words."""
    return [f"{unit.name(key)}: {reason}" for key, reason in reasons if reason]


def _loader(work, workers):
    """A DataLoader over this Dataset with this many worker processes; 0: in this one."""
    return DataLoader(
        work,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_ctrl_c,
    )


def _as_it_is(item):
    """Keeps the DataLoader from turning arrays into tensors, for which it needs shared memory."""
    return item


def _ignore_ctrl_c(worker):
    """Leaves the answer to Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _tell_of_a_dead_worker():
    """Turn the death of a worker process, in the block, into a UserError."""
    try:
        yield
    except RuntimeError as error:  # torch raises it wherever this process is just then
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a worker process was killed, perhaps for want of memory; run the same "
            "command again with --workers 0, or in a container with more memory"
        ) from None


class _Decoding(IterableDataset):
    """Streams for a DataLoader, whose workers take them in turn.

    Yields (number of the stream, Samples), and (number, None) at the end of a stream. The images
    are bytes of the CLIP's dtype, (B, 3, H, W * bytes per value) uint8, an array or a tensor.

    A stream of image files yields one `Samples`, and the workers are asked in turn. So the images
    of a unit arrive in order, although several workers decode them.
    """

    def __init__(self, streams, clip):
        self.streams = list(enumerate(streams))
        self.transform = clip.transform
        self.dtype = clip.dtype

    def __iter__(self):
        streams = self.streams
        worker = get_worker_info()
        if worker is not None:
            streams = streams[worker.id :: worker.num_workers]
        for number, stream in streams:
            for samples in stream(self.transform):
                if samples.images is not None:
                    samples = samples._replace(images=as_bytes(samples.images, self.dtype))
                yield number, samples
            yield number, None


def as_bytes(images, dtype):
    """The bytes of an array (..., W) in a torch dtype: (..., W * bytes per value) uint8.

    A worker hands over a tensor through shared memory. Many containers have little of it. Then this
    is an array, which goes through a pipe and takes longer.
    """
    content = torch.from_numpy(images).to(dtype).view(torch.uint8)
    worker = get_worker_info()
    if worker is None:
        return content
    needed = 3 * worker.num_workers * content.nbytes  # each has two batches waiting, and a new one
    if free_shared_memory() > needed:
        return content
    return content.numpy()


def free_shared_memory():
    """The bytes that are free in shared memory; 0 if this system does not say."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


class _Tokenising(Dataset):
    """The tokens of the distinct texts of units, what `tokenize` returns, for a DataLoader."""

    def __init__(self, units, tokenizer):
        self.units = units
        self.tokenizer = tokenizer

    def __len__(self):
        return len(self.units)

    def __getitem__(self, number):
        distinct, _ = distinct_texts(self.units[number].texts)
        tokens, is_cut = tokenize(self.tokenizer, distinct)
        return tokens.numpy(), is_cut


def _bar(what, counts):
    """A progress bar of "images" or "texts", as many as these counts; None: unknown."""
    total = None if None in counts else sum(counts)
    is_off = not is_first() or total == 0
    unit = what.removesuffix("s")
    return tqdm(total=total, desc=what, unit=unit, mininterval=0.5, disable=is_off)


def encode_texts(clip, texts):
    """The embeddings of M texts, (M, D) float32 on the CPU; warns of texts the CLIP cannot read."""
    with _bar("texts", [len(set(texts))]) as bar:  # each distinct text is embedded once
        z, notes = embed_texts(clip, texts, bar)
    say_notes([notes], clip.info["context_length"])
    return z


@torch.inference_mode()
def embed_texts(clip, texts, bar, tokenized=None):
    """Embed M texts, each distinct one once; M may be 0.

    Args:
        tokenized: what `tokenize` returns for the distinct texts, if it is known already.
    Returns: (M, D) float32 on the CPU; and notes, {"cut": how many distinct texts are too long,
        "unknown": how many have unknown words, "example": one of these}.
    """
    distinct, row_of_text = distinct_texts(texts)
    if tokenized is None:
        tokenized = tokenize(clip.tokenizer, distinct or ["a"])  # without texts: for the width
    tokens, is_cut = tokenized
    tokens = torch.as_tensor(tokens)
    is_unknown = have_unknown_words(clip, tokens)
    unknown = [text for text, flag in zip(distinct, is_unknown, strict=False) if flag]
    notes = {
        "cut": sum(is_cut[: len(distinct)]),
        "unknown": len(unknown),
        "example": unknown[0] if unknown else "",
    }
    return encode_tokens(clip, tokens, bar)[row_of_text], notes


def encode_tokens(clip, tokens, bar):
    """The embeddings of N token rows (N, L), (N, D) float32 on the CPU.

    Each row is cut at the first multiple of STEP that holds its text: what comes after the token
    that the embedding is read from does not matter. The length depends on the text alone, not on
    other texts, and so do the last bits of its embedding.
    """
    ends = text_ends(clip.model, tokens)
    lengths = (-(-ends // STEP) * STEP).clamp(max=tokens.shape[1])
    parts = []
    order = []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        model = clip.model
        if length < tokens.shape[1]:
            model = shortened(clip.model, length)
        parts.append(in_chunks(model.encode_text, tokens[rows, :length], clip.device))
        order.append(rows)
        bar.update(len(rows))
    return torch.cat(parts).cpu()[torch.cat(order).argsort()]


def text_ends(model, tokens):
    """How many tokens of each row (N, L) matter, (N,) int64.

    It is all of them, unless each token attends only to those before it and the embedding is read
    from the end-of-text token, as in OpenAI's and most of open_clip's CLIPs.
    """
    tower = getattr(model, "text", model)
    mask = getattr(tower, "attn_mask", None)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    is_causal = False
    if mask is not None:
        is_causal = torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))
    has_class_token = getattr(tower, "cls_emb", None) is not None
    if is_causal and not has_class_token and pool == "argmax":
        return tokens.int().argmax(dim=1) + 1
    if is_causal and not has_class_token and pool == "eos":
        end = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
        return (tokens == end).int().argmax(dim=1) + 1
    return torch.full((len(tokens),), tokens.shape[1])


def shortened(model, length):
    """A CLIP with the same weights whose text tower reads this many tokens and no more."""
    tower = getattr(model, "text", model)
    positions = torch.nn.Parameter(tower.positional_embedding[:length], requires_grad=False)
    mask = tower.attn_mask[:length, :length]
    short = copy.copy(tower)
    short._parameters = {**tower._parameters, "positional_embedding": positions}
    short._buffers = {**tower._buffers, "attn_mask": mask}
    if tower is model:
        return short
    whole = copy.copy(model)
    whole._modules = {**model._modules, "text": short}
    return whole


def distinct_texts(texts):
    """Each text once, in order of first appearance; and the row of each of the M texts there."""
    row_of = {}
    rows = [row_of.setdefault(text, len(row_of)) for text in texts]
    return list(row_of), rows


def say_notes(notes, context_length):
    """Warn of texts that the CLIP cannot read to the end, or whose words it does not know.

    Args:
        notes: a list of what `embed_texts` noted.
    """
    cut = sum(note["cut"] for note in notes)
    if cut:
        message = "note: %d texts are longer than the model reads (%d tokens); their ends are cut"
        logging.warning(message, cut, context_length)
    unknown = sum(note["unknown"] for note in notes)
    if unknown:
        examples = [note["example"] for note in notes if note["unknown"]]
        message = "note: %d texts have words that this CLIP has never seen, such as %r; "
        message += "do not trust their embeddings"
        logging.warning(message, unknown, examples[0][:80])


def chunk_size(device):
    """How many rows every call of an encoder on a device has."""
    return CHUNK if torch.device(device).type == "cpu" else CHUNK_ON_GPU


def in_chunks(encode, inputs, device):
    """encode(inputs), (N, ...) -> (N, D) float32 on the device, the same number of rows per call.

    The last call is filled up with copies of the last row. Nothing here waits for a GPU.
    """
    size = chunk_size(device)
    chunks = []
    for chunk in inputs.split(size):
        missing = size - len(chunk)
        if missing:
            chunk = torch.cat([chunk, *[chunk[-1:]] * missing])
        encoded = encode(sent(chunk, device))
        chunks.append(encoded.float())
    return torch.cat(chunks)[: len(inputs)]


def to_dtype(z, dtype, names):
    """Embeddings (N, D) in the dtype of a cache.

    Raises: UserError that gives the first of the N names whose embedding is not finite then.
    """
    z = z.to(dtype)
    bad = (~torch.isfinite(z).all(dim=-1)).nonzero().flatten()
    if len(bad):
        name = str(names[int(bad[0])])[:200]
        cure = "give cache_embeddings.py --overwrite --precision fp32 --dtype float32"
        raise UserError(f"the embedding of {name!r} is not finite; {cure}")
    return z


def versions():
    """The packages that the last bits of the embeddings depend on: {name: version}."""
    return {package: version(package) for package in PACKAGES}
