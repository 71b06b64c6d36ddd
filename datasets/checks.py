"""Files of a cache or a data set in, their content out if it has the right form and range; else a UserError.

Every message names the file, and what is to be done.
"""

import json

import torch

from utils.cli import UserError
from utils.files import load_json, load_tensors, sha256

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what an embedding may be stored in
ANEW = "make the cache anew"


def load_embeddings(path):
    """An embedding matrix, (N, D), finite."""
    z = load_tensors(_there(path))
    if not isinstance(z, torch.Tensor) or z.ndim != 2 or z.dtype not in FLOATS or 0 in z.shape:
        kind = f"shape {tuple(z.shape)}, {z.dtype}" if isinstance(z, torch.Tensor) else type(z).__name__
        raise UserError(f"{path}: expected a float tensor of shape (rows, width), found {kind}")
    check_finite(z, path)
    return z.detach()  # a tensor that was saved with a gradient to come would get one in training


def check_finite(z, file):
    """Raise a UserError that names the first row of a file, (n, D), that is not finite."""
    for start in range(0, len(z), 65536):  # in pieces: the check needs a copy of what it looks at
        finite = torch.isfinite(z[start : start + 65536]).all(dim=1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise UserError(f"{file}: row {row} is not finite; {ANEW}, in --precision fp32")


def check_sum(file, expected):
    """Raise a UserError if a file has not the SHA-256 that it should have."""
    if sha256(file) != expected:
        raise UserError(f"{file}: not the file that meta.json names: its SHA-256 differs; {ANEW}")


def load_image_of_caption(folder, meta, captions, images):
    """The image row of every caption, (M,) int64. Args: folder: the split's. captions, images: M and N."""
    if "shards" in meta:
        path = _there(folder / "image_of_caption.pt")
        check_sum(path, meta["shards"]["image_of_caption"])
        rows = load_tensors(path, check_sums=False)
        fits = isinstance(rows, torch.Tensor) and (rows.shape, rows.dtype) == ((captions,), torch.int64)
        if not fits or not all((part >= 0).all() and (part < images).all() for part in rows.split(2**20)):
            raise UserError(f"{path}: expected {captions} image rows from 0 to {images - 1}; {ANEW}")
        return rows
    path = _there(folder / "cap_id_to_img_id.json")
    content = load_json(path)
    if not isinstance(content, dict) or len(content) != captions:
        raise UserError(f"{path}: expected an object with {captions} entries, one for every row of text.pt")
    rows = [content.get(str(caption)) for caption in range(captions)]
    for caption, row in enumerate(rows):
        if not is_row(row, images):
            expected = f"expected an image row from 0 to {images - 1}"
            raise UserError(f"{path}: caption {caption} belongs to {row!r}, {expected}")
    return torch.tensor(rows, dtype=torch.int64)


def load_list(path, length, kind):
    """A JSON list of so many entries of a type."""
    content = load_json(path)
    if not isinstance(content, list) or len(content) != length or not all(isinstance(entry, kind) for entry in content):
        raise UserError(f"{path}: expected a list of {length} entries; {ANEW}")
    return content


def load_relevance(path, captions, images):
    """What is right beside the own one: M lists of image rows, at least one each, or sets of judgements.

    Returns: as `ListSplit.relevance` has it.
    """
    content = load_json(path)
    if not isinstance(content, dict) or not content:
        relevance = load_list(path, captions, list)
        _check_rows(path, relevance, images, "image", "with at least one entry", least=1)
        return relevance
    for name, both in content.items():
        for direction, queries, answers, kind in (
            ("t2i", captions, images, "image"),
            ("i2t", images, captions, "caption"),
        ):
            lists = both.get(direction) if isinstance(both, dict) else None
            if (
                not isinstance(lists, list)
                or len(lists) != queries
                or not all(isinstance(rows, list) for rows in lists)
            ):
                raise UserError(f"{path}: {name} {direction}: expected {queries} lists of {kind} rows; {ANEW}")
            _check_rows(path, lists, answers, kind, f"({name} {direction})")
    return content


def _check_rows(path, lists, count, kind, what, least=0):
    for query, rows in enumerate(lists):
        if len(rows) < least or not all(is_row(row, count) for row in rows):
            expected = f"a list of {kind} rows from 0 to {count - 1} {what}"
            raise UserError(f"{path}: entry {query} is not {expected}")


def check_meta(path, meta, captions):
    """Raise a UserError if what evaluation reads of a meta.json is out of range. Args: captions: M."""
    annotated, scale = meta.get("annotated"), meta.get("logit_scale")
    is_list = isinstance(annotated, list) and annotated
    if annotated is not None and not (is_list and all(is_row(row, captions) for row in annotated)):
        raise UserError(f"{path}: 'annotated' is not a list of caption rows from 0 to {captions - 1}; {ANEW}")
    if scale is not None and not (isinstance(scale, int | float) and 0 < scale < float("inf")):
        raise UserError(f"{path}: logit_scale is {scale!r}, expected a positive number; {ANEW}")


def check_index(path, meta):
    """Check what meta.json says of the files of a cache in many.

    Args: path: of the meta.json, for the message. meta: its content.
    Returns: (width, dtype) of the embeddings.
    """

    def is_list(shards):
        return isinstance(shards, list) and all(
            isinstance(shard, list) and [type(part) for part in shard] == [int, str] and shard[0] >= 0
            for shard in shards
        )

    index = meta["shards"]
    fits = isinstance(index, dict) and isinstance(index.get("image_of_caption"), str)
    if not fits or not all(is_list(index.get(kind)) and sum(n for n, _ in index[kind]) for kind in ("image", "text")):
        raise UserError(f"{path}: 'shards' is not the index of a cache in many files; {ANEW}")
    width, dtype = meta.get("embed_dim"), getattr(torch, str(meta.get("dtype")), None)
    if type(width) is not int or width < 1 or dtype not in FLOATS:
        raise UserError(f"{path}: does not tell embed_dim and dtype of its files; {ANEW}")
    return width, dtype


def check_widths(meta, image, text):
    """Raise a UserError if a model gives images and texts of different widths. Args: meta: with the model's name."""
    if image != text:
        widths = f"image embeddings are {image} wide, text embeddings {text}"
        raise UserError(f"--model {meta['model']}: {widths}; choose a CLIP")


def need(condition, message):
    """Raise a UserError with this message unless a condition holds."""
    if not condition:
        raise UserError(message)


def is_row(value, rows):
    """Whether a value is a row number below `rows`."""
    return type(value) is int and 0 <= value < rows


def _there(path):
    if not path.exists():
        raise UserError(f"{path}: no such file; {ANEW}")
    return path


def check_fields(entry, fields, where):
    """Check an entry of a JSON file.

    Args: fields: {name: int or str}, the one that names the entry first. where: file and place, for the message.
    Raises: UserError if the entry is no object, or a field is missing, of another type or blank.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{where} is not an object")
    name = next(iter(fields))
    for field, kind in fields.items():
        value = entry.get(field)
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is str and not value.strip()):
            found = f"'{field}' is {json.dumps(value)[:80]}"
            wanted = "a whole number" if kind is int else "a text that is not blank"
            raise UserError(f"{where} ({name} {entry.get(name)}): {found}, expected {wanted}")


def inside(folder, name, where):
    """The path of an image in a folder.

    Args: name: as a file gives it. where: that file, and the place in it, for the message.
    Raises: UserError if it leads out of the folder, over a link too, or nowhere.
    """
    path = folder / name
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (ValueError, RuntimeError):  # a character that no file name can have; a link that leads to itself
        raise UserError(f"{where}: the image file {name!r} cannot be the name of a file; mend it") from None
    if not is_inside:
        raise UserError(f"{where}: the image file {name!r} lies outside {folder}; give names inside it")
    return path


def listing(folder):
    """What is in a folder, for an error message."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return f"only {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "an empty folder"
