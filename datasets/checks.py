"""Read and check files of a cache or a data set.

Every message names the file, and what to do.
"""

import json
from pathlib import Path

import torch

from utils.cli import UserError, need
from utils.files import load_json, load_tensors, sha256

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types of embeddings
ANEW = "make the cache anew"
CURE_OF_ROW = f"{ANEW} in --precision fp32, or leave the row out"


def has_fields(content, fields):
    """Whether a value is a dict that has these fields, {name: type}; it may have more."""
    if not isinstance(content, dict):
        return False
    return all(isinstance(content.get(name), kind) for name, kind in fields.items())


def is_list(content, kind, length):
    """Whether a value is a list of this many entries of a type."""
    if not isinstance(content, list) or len(content) != length:
        return False
    return all(type(entry) is kind for entry in content)


def are_rows(content, count):
    """Whether a value is a list of row numbers below `count`."""
    if not isinstance(content, list):
        return False
    return all(type(row) is int and 0 <= row < count for row in content)


def existing(path):
    """The path of a file of a cache, which must exist."""
    need(path.exists(), f"{path}: no such file; {ANEW}")
    return path


def load_embeddings(path):
    """An embedding matrix, (N, D), finite and without rows of zeros."""
    z = load_tensors(existing(path))
    expected = "expected a float tensor of shape (rows, width)"
    is_tensor = isinstance(z, torch.Tensor)
    need(is_tensor, f"{path}: {expected}, found {type(z).__name__}")
    is_matrix = z.ndim == 2 and z.dtype in FLOATS and 0 not in z.shape
    need(is_matrix, f"{path}: {expected}, found shape {tuple(z.shape)}, {z.dtype}")
    check_rows(z, path)
    return z.detach()  # a tensor saved with requires_grad would get a gradient in training


def check_rows(z, file):
    """Raise a UserError that names the first row of a file, (n, D), that is not finite or zero."""
    start = 0
    for part in z.split(65536):
        bad, problem = first_bad_row(part)
        if problem:
            raise UserError(f"{file}: row {start + bad} {problem}; {CURE_OF_ROW}")
        start += len(part)


def first_bad_row(z):
    """The first row of z (n, D) that is not finite or zero, and what is wrong; (None, "")."""
    if z.numel() == 0:
        return None, ""
    low = z.amin(dim=1)  # NaN if one of the row is
    high = z.amax(dim=1)
    is_finite = torch.isfinite(low) & torch.isfinite(high)
    is_zero = (low == 0) & (high == 0)
    bad = (~is_finite | is_zero).nonzero().flatten()
    if not len(bad):
        return None, ""
    row = int(bad[0])
    if is_zero[row]:
        return row, "is all zeros, which has no direction"
    return row, "is not finite"


def check_sum(file, expected):
    """Raise a UserError if a file does not have this SHA-256."""
    problem = "not the file that meta.json names: its SHA-256 differs"
    need(sha256(file) == expected, f"{file}: {problem}; {ANEW}")


def load_image_of_caption(folder, meta, captions, images):
    """The image row of every caption of a split.

    Args:
        folder: of the split.
        meta: content of its meta.json.
        captions: M.
        images: N.
    Returns: (M,) int64.
    """
    if "shards" in meta:
        return _load_map_of_shards(folder, meta, captions, images)
    path = existing(folder / "cap_id_to_img_id.json")
    content = load_json(path)
    expected = f"expected an object with {captions} entries, one for every row of text.pt"
    is_map = isinstance(content, dict) and len(content) == captions
    need(is_map, f"{path}: {expected}")
    rows = []
    for caption in range(captions):
        row = content.get(str(caption))
        if type(row) is not int or not 0 <= row < images:
            expected = f"expected an image row from 0 to {images - 1}"
            raise UserError(f"{path}: caption {caption} belongs to {row!r}, {expected}")
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)


def _load_map_of_shards(folder, meta, captions, images):
    path = existing(folder / "image_of_caption.pt")
    check_sum(path, meta["shards"]["image_of_caption"])
    rows = load_tensors(path, check_sums=False)
    problem = f"expected {captions} image rows from 0 to {images - 1}"
    is_tensor = isinstance(rows, torch.Tensor)
    fits = is_tensor and rows.shape == (captions,) and rows.dtype == torch.int64
    need(fits, f"{path}: {problem}; {ANEW}")
    for part in rows.split(2**20):
        in_range = (part >= 0).all() and (part < images).all()
        need(in_range, f"{path}: {problem}; {ANEW}")
    return rows


def load_list(path, length, kind):
    """A JSON list of this many entries of a type."""
    content = load_json(path)
    need(is_list(content, kind, length), f"{path}: expected a list of {length} entries; {ANEW}")
    return content


def load_relevance(path, captions, images):
    """The right answers for M captions and N images, as `ListSplit.relevance` has them."""
    content = load_json(path)
    if not isinstance(content, dict) or not content:
        relevance = load_list(path, captions, list)
        _check_rows(path, relevance, images, "image", "with at least one entry", least=1)
        return relevance
    for name, both in content.items():
        _check_judgements(path, both, f"{name} t2i", captions, images, "image")
        _check_judgements(path, both, f"{name} i2t", images, captions, "caption")
    return content


def _check_judgements(path, both, name, queries, answers, kind):
    """Check the judgements of one direction; name ends in "t2i" or "i2t"."""
    lists = both.get(name[-3:]) if isinstance(both, dict) else None
    expected = f"{name}: expected {queries} lists of {kind} rows"
    need(is_list(lists, list, queries), f"{path}: {expected}; {ANEW}")
    _check_rows(path, lists, answers, kind, f"({name})")


def _check_rows(path, lists, count, kind, what, least=0):
    for query, rows in enumerate(lists):
        if len(rows) < least or not are_rows(rows, count):
            problem = f"is not a list of {kind} rows from 0 to {count - 1} {what}"
            raise UserError(f"{path}: entry {query} {problem}")


def check_meta(path, meta, captions):
    """Raise a UserError if what evaluation reads of a meta.json is out of range, for M captions."""
    annotated = meta.get("annotated")
    if annotated is not None:
        problem = f"'annotated' is not a list of caption rows from 0 to {captions - 1}"
        fits = bool(annotated) and are_rows(annotated, captions)
        need(fits, f"{path}: {problem}; {ANEW}")
    scale = meta.get("logit_scale")
    if scale is not None:
        is_positive = isinstance(scale, int | float) and 0 < scale < float("inf")
        problem = f"logit_scale is {scale!r}, expected a positive number"
        need(is_positive, f"{path}: {problem}; {ANEW}")


def check_index(path, meta):
    """The width and the dtype of a cache in shards, from its meta.json, whose index is checked."""
    index = meta["shards"]
    fits = has_fields(index, {"image": list, "text": list, "image_of_caption": str})
    fits = fits and _is_index(index["image"]) and _is_index(index["text"])
    need(fits, f"{path}: 'shards' is not the index of a cache in many files; {ANEW}")
    width = meta.get("embed_dim")
    dtype = getattr(torch, str(meta.get("dtype")), None)
    fits = type(width) is int and width >= 1 and dtype in FLOATS
    need(fits, f"{path}: does not give embed_dim and dtype of its files; {ANEW}")
    return width, dtype


def _is_index(shards):
    """Whether a list is [[rows, SHA-256], ...] with at least one row in all."""
    total = 0
    for entry in shards:
        if not isinstance(entry, list) or [type(part) for part in entry] != [int, str]:
            return False
        if entry[0] < 0:
            return False
        total += entry[0]
    return total > 0


def check_widths(meta, image, text):
    """Raise a UserError if a model gives images and texts of different widths."""
    problem = f"image embeddings are {image} wide, text embeddings {text}"
    need(image == text, f"--model {meta['model']}: {problem}; choose a CLIP")


def check_fields(entry, fields, where, may_be_blank=()):
    """Check the fields of an entry, {name: int or str}, of which the first one names the entry.

    An id may be a whole float or a text of digits; it is replaced by the whole number.

    Args:
        where: file and place, for the message.
        may_be_blank: texts that may be blank.
    Raises: UserError if the entry is no object, or a field is missing, of another type or blank.
    """
    need(isinstance(entry, dict), f"{where} is not an object")
    name = next(iter(fields))
    for field, kind in fields.items():
        value = entry.get(field)
        if kind is int:
            value = whole_number(value)
            is_right = value is not None
        else:
            is_right = isinstance(value, str) and (value.strip() or field in may_be_blank)
        if not is_right:
            found = f"'{field}' is {json.dumps(entry.get(field))[:80]}"
            expected = "a whole number" if kind is int else "a text that is not blank"
            raise UserError(f"{where} ({name} {entry.get(name)}): {found}, expected {expected}")
        entry[field] = value


def whole_number(value):
    """An id as an int: 7, 7.0 as pandas writes it, or "7"; None if it is no whole number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value if isinstance(value, int) else None


def image_path(folder, name, where):
    """The path of an image that a file names: absolute, or relative to a folder.

    Links are followed. A relative name must not leave the folder by "..", since the file that names
    it may come from elsewhere.

    Args:
        where: file and place, for the message.
    """
    path = Path(name)
    leaves = not path.is_absolute() and ".." in path.parts
    problem = f"the image file {name!r} leads out of {folder} by '..'"
    need(not leaves, f"{where}: {problem}; give names inside it, or absolute ones")
    problem = f"the image file {name!r} cannot be the name of a file"
    need("\0" not in name, f"{where}: {problem}; mend it")
    return folder / path


def listing(folder):
    """What is in a folder, for an error message."""
    if not folder.is_dir():
        return "no such folder"
    names = []
    for path in sorted(folder.iterdir()):
        names.append(f"{path.name}/" if path.is_dir() else path.name)
    if not names:
        return "an empty folder"
    more = ", ..." if len(names) > 8 else ""
    return f"only {', '.join(names[:8])}{more}"
