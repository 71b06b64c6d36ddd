"""Read and check files of a cache or a data set.

Every error is a UserError whose message names the file and what is wrong with it.
"""

import json
from pathlib import Path

import torch

from utils.cli import UserError, need
from utils.files import load_json, load_tensors, sha256

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types of embeddings
# What to do, for messages.
ANEW = "rebuild the cache: give the same cache_embeddings.py command with --overwrite"
CURE_OF_ROW = "rebuild the cache with --overwrite --precision fp32 --dtype float32, or leave it out"


# The form of a value.


def has_fields(content, fields):
    """Whether a value is a dict with these fields, {name: type}. It may have more of them."""
    if not isinstance(content, dict):
        return False
    return all(isinstance(content.get(name), kind) for name, kind in fields.items())


def is_list(content, kind, length):
    """Whether a value is a list of `length` entries of a type."""
    if not isinstance(content, list) or len(content) != length:
        return False
    return all(type(entry) is kind for entry in content)


def are_rows(content, count):
    """Whether a value is a list of row numbers below `count`."""
    if not isinstance(content, list):
        return False
    return all(type(row) is int and 0 <= row < count for row in content)


# Embeddings.


def existing(path):
    """The path of a file of a cache. Raises: UserError if there is no such file."""
    need(path.exists(), f"{path}: no such file; {ANEW}")
    return path


def load_embeddings(path):
    """The embeddings in a file, (N, D). All are finite, and no row is all zeros."""
    z = load_tensors(existing(path))
    expected = "expected a float tensor of shape (rows, width)"
    if not isinstance(z, torch.Tensor):
        raise UserError(f"{path}: {expected}, found {type(z).__name__}")
    is_matrix = z.ndim == 2 and z.dtype in FLOATS and z.numel() > 0
    if not is_matrix:
        raise UserError(f"{path}: {expected}, found shape {tuple(z.shape)}, {z.dtype}")
    check_rows(z, path)
    return z.detach()  # a tensor saved with requires_grad would get a gradient in training


def check_rows(z, file):
    """Raise a UserError if a row of z (n, D), from a file, is all zeros or not finite."""
    rows_before = 0
    for part in z.split(65536):
        row, problem = first_bad_row(part)
        if problem:
            raise UserError(f"{file}: row {rows_before + row} {problem}; {CURE_OF_ROW}")
        rows_before += len(part)


def first_bad_row(z):
    """Find the first row of z (n, D) that is all zeros or not finite.

    Returns: its number and what is wrong with it, or (None, "") if there is none.
    """
    if z.numel() == 0:
        return None, ""
    smallest = z.amin(dim=1)  # (n,); NaN if the row has a NaN
    largest = z.amax(dim=1)
    is_finite = torch.isfinite(smallest) & torch.isfinite(largest)
    is_zero = (smallest == 0) & (largest == 0)
    bad_rows = (~is_finite | is_zero).nonzero().flatten()
    if len(bad_rows) == 0:
        return None, ""
    row = int(bad_rows[0])
    if is_zero[row]:
        return row, "is all zeros, which has no direction"
    return row, "is not finite"


def check_sum(file, expected):
    """Raise a UserError if a file does not have this SHA-256."""
    problem = "not the file that meta.json names: its SHA-256 differs"
    need(sha256(file) == expected, f"{file}: {problem}; {ANEW}")


# The image of every caption, and the right answers.


def load_image_of_caption(folder, meta, captions, images):
    """The image row of every caption of a split.

    Args:
        folder: the folder of the split.
        meta: the content of its meta.json.
        captions: M, the number of captions.
        images: N, the number of images.
    Returns: (M,) int64, each in [0, N).
    """
    if "shards" in meta:
        return _load_map_of_shards(folder, meta, captions, images)
    path = existing(folder / "cap_id_to_img_id.json")
    content = load_json(path)
    if not isinstance(content, dict) or len(content) != captions:
        expected = f"expected an object with {captions} entries, one for every row of text.pt"
        raise UserError(f"{path}: {expected}")
    rows = []
    for caption in range(captions):
        row = content.get(str(caption))
        if type(row) is not int or not 0 <= row < images:
            expected = f"expected an image row from 0 to {images - 1}"
            raise UserError(f"{path}: caption {caption} belongs to {row!r}, {expected}")
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)


def _load_map_of_shards(folder, meta, captions, images):
    """`load_image_of_caption` for a cache in shards, which has it as a tensor."""
    path = existing(folder / "image_of_caption.pt")
    check_sum(path, meta["shards"]["image_of_caption"])
    rows = load_tensors(path, check_sums=False)
    message = f"{path}: expected {captions} image rows from 0 to {images - 1}; {ANEW}"
    need(isinstance(rows, torch.Tensor), message)
    need(rows.shape == (captions,) and rows.dtype == torch.int64, message)
    need(rows.min() >= 0 and rows.max() < images, message)
    return rows


def load_list(path, length, kind):
    """A JSON list of `length` entries of a type."""
    content = load_json(path)
    need(is_list(content, kind, length), f"{path}: expected a list of {length} entries; {ANEW}")
    return content


def load_relevance(path, captions, images):
    """The right answers for M captions and N images, in the form of `ListSplit.relevance`.

    That is a list of image rows per caption, or {name of judgements: {"t2i": such lists, "i2t":
    lists of caption rows per image}}.
    """
    content = load_json(path)
    if not isinstance(content, dict) or not content:
        relevance = load_list(path, captions, list)
        _check_answers(path, relevance, images, "image", "with at least one entry", least=1)
        return relevance
    for name, judgements in content.items():
        if not isinstance(judgements, dict):
            judgements = {}
        t2i = judgements.get("t2i")
        i2t = judgements.get("i2t")
        _check_judgements(path, t2i, f"{name} t2i", captions, images, "image")
        _check_judgements(path, i2t, f"{name} i2t", images, captions, "caption")
    return content


def _check_judgements(path, lists, name, queries, answers, kind):
    """Check the judgements of one direction: a list of right answers for every query."""
    expected = f"{name}: expected {queries} lists of {kind} rows"
    need(is_list(lists, list, queries), f"{path}: {expected}; {ANEW}")
    _check_answers(path, lists, answers, kind, f"({name})")


def _check_answers(path, lists, count, kind, note, least=0):
    """Check lists of at least `least` row numbers below `count` of a kind, image or caption."""
    for query, rows in enumerate(lists):
        if len(rows) < least or not are_rows(rows, count):
            problem = f"is not a list of {kind} rows from 0 to {count - 1} {note}"
            raise UserError(f"{path}: entry {query} {problem}")


# What a cache says of itself, and entries of data sets.


def check_meta(path, meta, captions):
    """Raise a UserError if a meta.json has a wrong value that evaluation would use.

    Args:
        captions: M, the number of captions of the split.
    """
    annotated = meta.get("annotated")
    if annotated is not None:
        problem = f"'annotated' is not a list of caption rows from 0 to {captions - 1}"
        has_rows = bool(annotated) and are_rows(annotated, captions)
        need(has_rows, f"{path}: {problem}; {ANEW}")
    scale = meta.get("logit_scale")
    if scale is not None:
        is_positive = isinstance(scale, int | float) and 0 < scale < float("inf")
        problem = f"logit_scale is {scale!r}, expected a positive number"
        need(is_positive, f"{path}: {problem}; {ANEW}")


def check_index(path, meta):
    """Check the meta.json of a cache in shards. Returns: the width and the dtype of its rows."""
    index = meta["shards"]
    message = f"{path}: 'shards' is not the index of a cache in many files; {ANEW}"
    need(has_fields(index, {"image": list, "text": list, "image_of_caption": str}), message)
    need(_is_index(index["image"]), message)
    need(_is_index(index["text"]), message)
    width = meta.get("embed_dim")
    dtype = getattr(torch, str(meta.get("dtype")), None)
    message = f"{path}: does not give embed_dim and dtype of its files; {ANEW}"
    need(type(width) is int and width >= 1, message)
    need(dtype in FLOATS, message)
    return width, dtype


def _is_index(shards):
    """Whether a list is [[rows, SHA-256], ...] with at least one row in all."""
    total_rows = 0
    for entry in shards:
        if not isinstance(entry, list) or [type(part) for part in entry] != [int, str]:
            return False
        rows, _ = entry
        if rows < 0:
            return False
        total_rows += rows
    return total_rows > 0


def check_widths(meta, image, text):
    """Raise a UserError if a model gives images and texts of different widths."""
    problem = f"image embeddings are {image} wide, text embeddings {text}"
    need(image == text, f"--model {meta['model']}: {problem}; choose a CLIP")


def check_fields(entry, fields, where, may_be_blank=()):
    """Check the fields of an entry of a JSON file.

    A whole number may be written as a float or a text of digits (`id_as_int`); the entry gets
    the int instead.

    Args:
        entry: dict, which is changed in place.
        fields: {name: int or str}. The message names the entry by the first field.
        where: file and place, for the message.
        may_be_blank: names of the fields whose text may be blank.
    Raises: UserError if the entry is no object, or a field is missing, of another type or blank.
    """
    need(isinstance(entry, dict), f"{where} is not an object")
    first_field = next(iter(fields))
    for field, kind in fields.items():
        value = entry.get(field)
        if kind is int:
            expected = "a whole number"
            value = id_as_int(value)
            is_right = value is not None
        else:
            expected = "a text that is not blank"
            is_right = isinstance(value, str) and (value.strip() or field in may_be_blank)
        if not is_right:
            which = f"{first_field} {entry.get(first_field)}"
            found = json.dumps(entry.get(field))[:80]
            raise UserError(f"{where} ({which}): '{field}' is {found}, expected {expected}")
        entry[field] = value


def id_as_int(value):
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
        folder: Path.
        name: str, from the file.
        where: file and place, for the message.
    """
    path = Path(name)
    if not path.is_absolute() and ".." in path.parts:
        problem = f"the image file {name!r} leads out of {folder} by '..'"
        raise UserError(f"{where}: {problem}; give names inside it, or absolute ones")
    if "\0" in name:
        problem = f"the image file {name!r} cannot be the name of a file"
        raise UserError(f"{where}: {problem}; fix it")
    return folder / path


def one_file(folder, names):
    """The file in a folder that has one of these names; None if there is none.

    Raises: UserError if there are several.
    """
    existing = [name for name in names if (folder / name).is_file()]
    need(len(existing) < 2, f"{folder}: found {' and '.join(existing)}; keep one of them")
    return folder / existing[0] if existing else None


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
