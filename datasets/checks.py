"""Files of a cache or a data set in, their content out if it has the right form and range; else a UserError.

Every message names the file, and what is to be done.
"""

import json
import re

import numpy as np
import torch

from utils.cli import UserError, need
from utils.files import load_json, load_tensors, sha256

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what an embedding may be stored in
ANEW = "make the cache anew"
PLAIN_MAP = re.compile(rb'\{("N": N, )*+"N": N\}\n?'.replace(b"N", rb"(?:0|[1-9]\d{,17})"))  # of 64 bits at most


def has_fields(content, fields):
    """Whether a value is a dict with these fields, {name: type}, or more."""
    return isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in fields.items())


def is_list(content, kind, length):
    """Whether a value is a list of so many entries of a type."""
    return isinstance(content, list) and len(content) == length and {*map(type, content)} <= {kind}


def are_rows(content, count):
    """Whether a value is a list of row numbers below `count`."""
    return isinstance(content, list) and all(type(row) is int and 0 <= row < count for row in content)


def existing(path):
    """The path of a cache's file, which is there."""
    need(path.exists(), f"{path}: no such file; {ANEW}")
    return path


def load_embeddings(path):
    """An embedding matrix, (N, D), finite."""
    z = load_tensors(existing(path))
    if not isinstance(z, torch.Tensor) or z.ndim != 2 or z.dtype not in FLOATS or 0 in z.shape:
        kind = f"shape {tuple(z.shape)}, {z.dtype}" if isinstance(z, torch.Tensor) else type(z).__name__
        raise UserError(f"{path}: expected a float tensor of shape (rows, width), found {kind}")
    check_finite(z, path)
    return z.detach()  # a tensor that was saved with a gradient to come would get one in training


def check_finite(z, file):
    """Raise a UserError that names the first row of a file, (n, D), that is not finite."""
    if z.numel() and not torch.isfinite(torch.stack(z.aminmax())).all():  # a nan is both; isfinite of all takes longer
        finite = (torch.isfinite(part).all(dim=1) for part in z.split(65536))  # it needs a copy of what it looks at
        row = int((~torch.cat([*finite])).nonzero()[0])
        raise UserError(f"{file}: row {row} is not finite; {ANEW}, in --precision fp32")


def check_sum(file, expected):
    """Raise a UserError if a file has not the SHA-256 that it should have."""
    need(sha256(file) == expected, f"{file}: not the file that meta.json names: its SHA-256 differs; {ANEW}")


def load_image_of_caption(folder, meta, captions, images):
    """The image row of every caption of a split with this meta.json: (M,) int64, from M captions to N images."""
    if "shards" in meta:
        path = existing(folder / "image_of_caption.pt")
        check_sum(path, meta["shards"]["image_of_caption"])
        rows = load_tensors(path, check_sums=False)
        fits = isinstance(rows, torch.Tensor) and (rows.shape, rows.dtype) == ((captions,), torch.int64)
        fits = fits and all((part >= 0).all() and (part < images).all() for part in rows.split(2**20))
        need(fits, f"{path}: expected {captions} image rows from 0 to {images - 1}; {ANEW}")
        return rows
    path = existing(folder / "cap_id_to_img_id.json")
    rows = _plain_map(path)
    if rows is not None and len(rows) == captions and rows.min() >= 0 and rows.max() < images:
        return torch.from_numpy(rows)
    content = load_json(path)
    what = f"expected an object with {captions} entries, one for every row of text.pt"
    need(isinstance(content, dict) and len(content) == captions, f"{path}: {what}")
    rows = [content.get(str(caption)) for caption in range(captions)]
    for caption, row in enumerate(rows):
        if type(row) is not int or not 0 <= row < images:
            expected = f"expected an image row from 0 to {images - 1}"
            raise UserError(f"{path}: caption {caption} belongs to {row!r}, {expected}")
    return torch.tensor(rows, dtype=torch.int64)


def _plain_map(path):
    """The values of {"0": 5, "1": 5, ...}, (M,) int64, as caches are written; None where a file has another form.

    A dict of so many entries takes far longer to read.
    """
    content = path.read_bytes()
    if not PLAIN_MAP.fullmatch(content):
        return None
    numbers = np.fromstring(content.translate(bytes.maketrans(b":", b","), b'{}" \n'), dtype=np.int64, sep=",")
    captions, rows = numbers.reshape(-1, 2).T
    return rows.copy() if (captions == np.arange(len(rows))).all() else None


def load_list(path, length, kind):
    """A JSON list of so many entries of a type."""
    content = load_json(path)
    need(is_list(content, kind, length), f"{path}: expected a list of {length} entries; {ANEW}")
    return content


def load_relevance(path, captions, images):
    """The right answers of a split with M captions and N images, as `ListSplit.relevance` has them."""
    content = load_json(path)
    if not isinstance(content, dict) or not content:
        relevance = load_list(path, captions, list)
        _check_rows(path, relevance, images, "image", "with at least one entry", least=1)
        return relevance
    directions = {"t2i": (captions, images, "image"), "i2t": (images, captions, "caption")}
    for name, both in content.items():
        for direction, (queries, answers, kind) in directions.items():
            lists = both.get(direction) if isinstance(both, dict) else None
            what = f"{name} {direction}: expected {queries} lists of {kind} rows"
            need(is_list(lists, list, queries), f"{path}: {what}; {ANEW}")
            _check_rows(path, lists, answers, kind, f"({name} {direction})")
    return content


def _check_rows(path, lists, count, kind, what, least=0):
    for query, rows in enumerate(lists):
        if len(rows) < least or not are_rows(rows, count):
            raise UserError(f"{path}: entry {query} is not a list of {kind} rows from 0 to {count - 1} {what}")


def check_meta(path, meta, captions):
    """Raise a UserError if what evaluation reads of a meta.json is out of range, for M captions."""
    rows, scale = meta.get("annotated"), meta.get("logit_scale")
    what = f"'annotated' is not a list of caption rows from 0 to {captions - 1}"
    need(rows is None or (rows and are_rows(rows, captions)), f"{path}: {what}; {ANEW}")
    is_scale = scale is None or (isinstance(scale, int | float) and 0 < scale < float("inf"))
    need(is_scale, f"{path}: logit_scale is {scale!r}, expected a positive number; {ANEW}")


def check_index(path, meta):
    """The width and the dtype of a cache in shards, as its meta.json has them; its index of shards is checked too."""

    def is_shard(entry):
        return isinstance(entry, list) and [type(part) for part in entry] == [int, str] and entry[0] >= 0

    index = meta["shards"]
    fits = has_fields(index, {"image": list, "text": list, "image_of_caption": str}) and all(
        all(map(is_shard, index[kind])) and sum(rows for rows, _ in index[kind]) for kind in ("image", "text")
    )
    need(fits, f"{path}: 'shards' is not the index of a cache in many files; {ANEW}")
    width, dtype = meta.get("embed_dim"), getattr(torch, str(meta.get("dtype")), None)
    fits = type(width) is int and width >= 1 and dtype in FLOATS
    need(fits, f"{path}: does not tell embed_dim and dtype of its files; {ANEW}")
    return width, dtype


def check_widths(meta, image, text):
    """Raise a UserError if the model that meta names gives images and texts of different widths."""
    what = f"--model {meta['model']}: image embeddings are {image} wide, text embeddings {text}"
    need(image == text, f"{what}; choose a CLIP")


def check_fields(entry, fields, where):
    """Raise a UserError if an entry of a JSON file is no object, or a field is missing, of another type or blank.

    Args:
        fields: {name: int or str}, the one that names the entry first.
        where: file and place, for the message.
    """
    need(isinstance(entry, dict), f"{where} is not an object")
    name = next(iter(fields))
    for field, kind in fields.items():
        value = entry.get(field)
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is str and not value.strip()):
            found = f"'{field}' is {json.dumps(value)[:80]}"
            wanted = "a whole number" if kind is int else "a text that is not blank"
            raise UserError(f"{where} ({name} {entry.get(name)}): {found}, expected {wanted}")


def inside(folder, name, where):
    """The path of an image that a file names, at a place for the message; not out of the folder, over a link either."""
    path = folder / name
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (ValueError, RuntimeError):  # a character that no file name can have; a link that leads to itself
        raise UserError(f"{where}: the image file {name!r} cannot be the name of a file; mend it") from None
    need(is_inside, f"{where}: the image file {name!r} lies outside {folder}; give names inside it")
    return path


def listing(folder):
    """What is in a folder, for an error message."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return f"only {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "an empty folder"
