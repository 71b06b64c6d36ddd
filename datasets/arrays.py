"""Embeddings that were computed elsewhere become a cache, without a CLIP.

One file per kind, .npy, .pt or .safetensors:

    <root>/<split>/image.npy (N, D)   text.npy (M, D)   image_of_caption.npy (M,)
                   captions.txt or captions.json, images.txt or images.json, if they are known

Without image_of_caption, M = N, and text k belongs to image k. Or many files, as clip-retrieval
writes them; text k of text_emb_<i> belongs to image k of img_emb_<i>:

    <root>/<split>/img_emb/img_emb_0.npy  text_emb/text_emb_0.npy  metadata/metadata_0.parquet

Embeddings are read 32,768 rows at a time, through a memory map where possible; each such part
becomes a shard of the cache.
"""

import logging
import re
from pathlib import Path

import numpy as np
import torch

from datasets.checks import first_bad_row, is_list, listing, one_file
from datasets.embedding import NORMALISED, have_norm_1
from datasets.source import Split
from datasets.write import move_shards, write_shard
from utils.cli import UserError, need, reason_of
from utils.embed import to_dtype
from utils.files import digest, load_json, load_tensors, not_utf8

ARRAY_SUFFIXES = (".npy", ".pt", ".safetensors")
PART = 32_768  # rows that are read at a time, and the rows of a shard
CURE_OF_SOURCE_ROW = "leave it out, or compute it again"


class ArraySplit(Split):
    """A split of embeddings in files.

    Args:
        layout: of no use here.
        logit_scale: what the encoder multiplies its cosines by; None: not known.
    Raises: UserError that says what was expected and what was found.
    """

    def __init__(self, root, split, layout=None, logit_scale=None):
        self.folder = Path(root) / split
        self.logit_scale = logit_scale
        self.pieces = _pieces_of(self.folder)
        self.file_states = []  # name, size and time of last change of every file
        for piece in self.pieces:
            for file in filter(None, piece.file_of.values()):
                self.file_states.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])

    def fingerprint(self):
        """The number of files, and a digest of their names, sizes and times of last change.

        A metadata file of clip-retrieval counts twice, for captions and for images.
        """
        return {"files": f"{len(self.file_states)} files, {digest(sorted(self.file_states))}"}

    def state(self):
        """The logit scale, if it is given."""
        return {} if self.logit_scale is None else {"logit_scale": self.logit_scale}

    def units(self):
        """No units: nothing is encoded."""
        return []

    def assemble(self, store, folder, meta):
        """Write the embeddings as shards, each in the cache's dtype.

        They are moved to `folder` when all are written: until then, an older cache stays whole.
        """
        try:
            index, image_of_caption = self._write_shards(store, meta)
        except BaseException:
            store.remove()
            raise
        move_shards(store.folder, folder, index, image_of_caption, meta)
        return meta

    def _write_shards(self, store, meta):
        """Write shards to the folder of the units, and what they are to `meta`.

        Returns: the index of the shards; the image row of every text, (M,) int64.
        """
        writers = {
            kind: _ShardWriter(store.folder, kind, store.dtype) for kind in ("image", "text")
        }
        maps = []
        width = None
        for piece in self.pieces:
            first_image = writers["image"].rows
            maps.append(first_image + piece.image_of_caption())
            for kind, writer in writers.items():
                names = piece.names(kind)
                for start, part in piece.parts(kind):
                    width = width or part.shape[1]
                    problem = f"{part.shape[1]} wide, the others are {width} wide"
                    cure = "give images and texts of one CLIP"
                    need(part.shape[1] == width, f"{piece.file_of[kind]}: {problem}; {cure}")
                    writer.write(part, names[start : start + len(part)], piece.file_of[kind], start)
        meta["embed_dim"] = width
        meta["image_count"] = writers["image"].rows
        meta["caption_count"] = writers["text"].rows
        meta["logit_scale"] = self.logit_scale
        meta["skipped"] = []
        if all(writer.is_normalised for writer in writers.values()):
            logging.warning(NORMALISED, self.folder)
        index = {kind: writer.index for kind, writer in writers.items()}
        return index, torch.cat(maps)


class _ShardWriter:
    """Writes parts of the embeddings of one kind, each as a shard with the names of its rows."""

    def __init__(self, folder, kind, dtype):
        self.folder = folder
        self.kind = kind
        self.dtype = dtype
        self.rows = 0
        self.index = []
        self.is_normalised = True  # so far

    def write(self, part, names, source, start):
        """Write embeddings (n, D), which are rows of a file from `start` on."""
        bad, problem = first_bad_row(part)
        if problem:
            raise UserError(f"{source}: row {start + bad} {problem}; {CURE_OF_SOURCE_ROW}")
        self.is_normalised = self.is_normalised and have_norm_1(part)
        z = to_dtype(part, self.dtype, names)
        self.index.append(write_shard(self.folder, self.kind, len(self.index), z, names))
        self.rows += len(part)


class _Piece:
    """Files whose rows belong together: all, or those of one number in clip-retrieval's layout.

    Attributes:
        file_of: {kind: file}; that of "map", "captions" or "images" may be None.
        rows: {"image": how many rows, "text": how many}.
    """

    def __init__(self, file_of):
        self.file_of = file_of
        self.rows = {kind: len(open_array(file_of[kind])) for kind in ("image", "text")}

    def parts(self, kind):
        """Yield (first row, embeddings (n, D)) of PART rows at a time."""
        for start in range(0, self.rows[kind], PART):
            # Opened anew, so that pages that were read do not add up in memory.
            part = open_array(self.file_of[kind])[start : start + PART]
            yield start, part.to(torch.float32, copy=True)  # a view would save its whole storage

    def image_of_caption(self):
        """The image row of every text, (M,) int64."""
        images = self.rows["image"]
        texts = self.rows["text"]
        file = self.file_of["map"]
        if file is None:
            problem = f"{self.file_of['text']} has {texts} rows, {self.file_of['image']} {images}"
            cure = "give image.npy, text.npy and image_of_caption.npy, the image row of each text"
            need(texts == images, f"{problem}; {cure}")
            return torch.arange(texts)
        rows = open_array(file, dimensions=1)
        is_whole = not rows.is_floating_point() and len(rows) == texts
        in_range = is_whole and len(rows) and rows.min() >= 0 and rows.max() < images
        expected = f"expected {texts} image rows from 0 to {images - 1}, whole numbers"
        need(in_range, f"{file}: {expected}")
        return rows.to(torch.int64)

    def names(self, kind):
        """A name for every row: the file's, or the row's number."""
        file = self.file_of["images" if kind == "image" else "captions"]
        rows = self.rows[kind]
        if file is None:
            return [str(row) for row in range(rows)]
        if file.suffix == ".parquet":
            names = _column(file, "image_path" if kind == "image" else "caption")
        else:
            names = load_json(file) if file.suffix == ".json" else _lines(file)
        found = f"{len(names)} of them" if isinstance(names, list) else "none"
        expected = f"expected {rows} texts, one for each row"
        need(is_list(names, str, rows), f"{file}: {expected}, found {found}")
        return names


def _pieces_of(folder):
    """The pieces of a split, in the order of their numbers."""
    found = listing(folder)
    numbered = _numbered(folder / "img_emb", "img_emb")
    if numbered:
        texts = _numbered(folder / "text_emb", "text_emb")
        tables = _numbered(folder / "metadata", "metadata")
        problem = (
            f"the numbers of the files in img_emb/ and text_emb/ differ ({len(numbered)} and "
            f"{len(texts)} files)"
        )
        need(numbered.keys() == texts.keys(), f"{folder}: {problem}; give both of every number")
        pieces = []
        for n in sorted(numbered):
            files = {"image": numbered[n], "text": texts[n], "map": None}
            files["captions"] = tables.get(n)
            files["images"] = tables.get(n)
            pieces.append(_Piece(files))
        return pieces
    files = {"image": _one_file(folder, "image"), "text": _one_file(folder, "text")}
    expected = "expected image.npy and text.npy (or .pt, .safetensors), or img_emb/ and text_emb/"
    need(None not in files.values(), f"--data-root: {folder}: {expected}, found {found}")
    files["map"] = _one_file(folder, "image_of_caption")
    files["captions"] = _one_file(folder, "captions", (".txt", ".json"))
    files["images"] = _one_file(folder, "images", (".txt", ".json"))
    return [_Piece(files)]


def _numbered(folder, stem):
    """{number: file} of <stem>_0.npy and so on in a folder."""
    files = {}
    for file in folder.glob(f"{stem}_*"):
        match = re.fullmatch(rf"{stem}_(\d+)", file.stem)
        if match:
            files[int(match[1])] = file
    return files


def _one_file(folder, stem, suffixes=ARRAY_SUFFIXES):
    """The file of this stem with one of these suffixes; None if there is none."""
    return one_file(folder, [f"{stem}{suffix}" for suffix in suffixes])


def open_array(file, dimensions=2):
    """The array of a file as a tensor, (N, D) or (N,), through a memory map where possible.

    Raises: UserError if the file holds something else.
    """
    suffix = file.suffix.lower()
    if suffix == ".npy":
        content = _load_npy(file)
    elif suffix == ".safetensors":
        content = _load_safetensors(file)
    else:
        content = load_tensors(file)
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    is_one = len(tensors) == 1 and isinstance(tensors[0], torch.Tensor)
    need(is_one, f"{file}: expected one tensor")
    shape = tuple(tensors[0].shape)
    fits = len(shape) == dimensions and 0 not in shape
    need(fits, f"{file}: expected an array of {dimensions} dimensions, found shape {shape}")
    return tensors[0]


def _load_npy(file):
    try:
        array = np.load(file, mmap_mode="c", allow_pickle=False)
        is_array = isinstance(array, np.ndarray)  # not an .npz file under another name
        need(is_array, f"{file}: expected one array, found {type(array).__name__}")
        need(array.dtype.kind in "fiu", f"{file}: expected numbers, found {array.dtype}")
        return torch.from_numpy(array)
    except (ValueError, EOFError, TypeError) as error:  # TypeError: float128
        problem = f"not an array of numbers ({reason_of(error)})"
        raise UserError(f"{file}: {problem}; save it again as float32") from None


def _load_safetensors(file):
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:  # noqa: BLE001  the package raises its own errors
        raise UserError(f"{file}: not a .safetensors file ({error})") from None


def _lines(file):
    """The lines of a text file; a blank one is a text, too."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            return [line.rstrip("\n") for line in lines]
    except UnicodeDecodeError:
        raise not_utf8(file) from None


def _column(file, name):
    """A column of a .parquet file as texts; row numbers if there is no such column."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file}: needs the package pyarrow: pip install pyarrow") from None
    table = parquet.read_table(file)
    if name not in table.column_names:
        return [str(row) for row in range(table.num_rows)]
    return [str(value) if value is not None else "" for value in table[name].to_pylist()]


def read_text_arrays(file):
    """Embeddings of texts, FILE.npy (or .pt, .safetensors), and the texts, FILE.txt beside it.

    Returns: (T, D) float32; T texts.
    """
    lines = file.with_suffix(".txt")
    need(file.is_file(), f"--texts {file}: no such file")
    need(lines.is_file(), f"--texts {file}: {lines} is missing; give the texts, one per line")
    z = open_array(file).float()
    bad, problem = first_bad_row(z)
    need(not problem, f"{file}: row {bad} {problem}; {CURE_OF_SOURCE_ROW}")
    texts = _lines(lines)
    need(
        len(texts) == len(z),
        f"{lines}: expected {len(z)} lines, one for each row, found {len(texts)}",
    )
    return z, texts
