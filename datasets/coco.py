"""COCO captions: a folder with pictures and a captions file in; checked images and captions, in a fixed order, out.

Any captions file in COCO's format is read, so also the built-in data set's. The expected layout is a `Layout`; for COCO 2017:

    <root>/train2017/*.jpg  <root>/val2017/*.jpg  <root>/annotations/captions_{train,val}2017.json
"""

import contextlib
import copy
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import Dataset

from utils.cli import UserError
from utils.files import check_fields, inside, listing, load_json


@dataclass(frozen=True)
class Layout:
    """Where a COCO-format data set keeps a split; "{split}" stands for its name."""

    images: str
    captions: str
    relevance: str | None = None  # {caption id: [image ids]}, where more than one image is right for a caption


class CocoCaptions:
    """The captions of a split, in order of ascending annotation id, and the images they belong to, in order of ascending image id.

    Args: root: folder. split: "train", "val", ... layout: Layout.
    Attributes:
        image_ids, caption_ids: lists of N and M ints, ascending.
        image_files: N paths. image_names: N file names as the captions file gives them.
        captions: M texts, as they stand in the file. image_of_caption: M image rows.
        relevance: M lists of image rows, ascending, or None. annotated: the caption rows for which relevance was looked into, or None: for all.
    Raises: UserError that says what was expected and what was found.
    """

    annotated = None

    def __init__(self, root, split, layout):
        root = Path(root)
        self.folder = root / layout.images.format(split=split)
        self.captions_file = root / layout.captions.format(split=split)
        for path in (self.captions_file, self.folder):
            if not path.exists():
                raise UserError(f"--data-root {root}: expected {path.relative_to(root)}, found {listing(root)}")
        document = load_json(self.captions_file)
        _check(document, self.captions_file)
        coco = COCO()
        coco.dataset = {
            section: document[section] for section in ("images", "annotations")
        }  # others are not ours, and not checked
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
            coco.createIndex()
        self.image_ids = sorted(coco.getImgIds())
        self.caption_ids = sorted(coco.getAnnIds())
        row_of_image = {image_id: row for row, image_id in enumerate(self.image_ids)}
        annotations = coco.loadAnns(self.caption_ids)
        self.captions = [annotation["caption"] for annotation in annotations]
        self.image_of_caption = [row_of_image[annotation["image_id"]] for annotation in annotations]
        self.image_names = [image["file_name"] for image in coco.loadImgs(self.image_ids)]
        self.image_files = [inside(self.folder, name, self.captions_file) for name in self.image_names]
        self.relevance = self._load_relevance(root, split, layout, row_of_image)

    def _load_relevance(self, root, split, layout, row_of_image):
        path = root / (layout.relevance or "").format(split=split)
        if layout.relevance is None or not path.exists():
            return None
        relevant = load_json(path)
        try:
            rows = [sorted({row_of_image[i] for i in relevant[str(caption_id)]}) for caption_id in self.caption_ids]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: no list of known image ids for every caption ({error}); make it anew with its captions file"
            ) from None
        if not all(rows):
            raise UserError(
                f"{path}: caption {self.caption_ids[rows.index([])]} has no image; make it anew with its captions file"
            )
        return rows


def without(data, rows):
    """The same split without some images and their captions. Args: data: CocoCaptions or its like. rows: set of image rows. Returns: a copy."""
    images = [row for row in range(len(data.image_ids)) if row not in rows]
    captions = [caption for caption, row in enumerate(data.image_of_caption) if row not in rows]
    new_row = {row: new for new, row in enumerate(images)}
    left = copy.copy(data)
    left.image_ids, left.image_files, left.image_names = (
        [of[row] for row in images] for of in (data.image_ids, data.image_files, data.image_names)
    )
    left.caption_ids, left.captions = (
        [of[caption] for caption in captions] for of in (data.caption_ids, data.captions)
    )
    left.image_of_caption = [new_row[data.image_of_caption[caption]] for caption in captions]
    if data.relevance is not None:
        kept = [[new_row[row] for row in data.relevance[caption] if row in new_row] for caption in captions]
        left.relevance = [rows or [own] for rows, own in zip(kept, left.image_of_caption, strict=True)]
    if data.annotated is not None:
        known = set(data.annotated)
        left.annotated = [new for new, caption in enumerate(captions) if caption in known]
    return left


class CocoImages(Dataset):
    """The pictures of a split, decoded and transformed, in row order: for a DataLoader, so that worker processes do the work.

    Args: files: N paths. transform: PIL image -> (3, H, W) tensor.
    Returns by index: (tensor, None), or (None, what is wrong with the file), so that a broken file never stops a worker.
    """

    def __init__(self, files, transform):
        self.files = [str(path) for path in files]
        self.transform = transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        try:
            return self.transform(read_rgb(self.files[row])), None
        except Exception as error:  # noqa: BLE001  Pillow raises nearly anything on a broken file
            reason = (
                "no such file"
                if isinstance(error, FileNotFoundError)
                else str(error).replace(repr(self.files[row]), "the file")
            )
            return None, f"{self.files[row]}: {reason or type(error).__name__}"


def collate(batch):
    """What CocoImages gave for some rows as (pictures (B, 3, H, W), black where one is broken, or None if all are; B reasons or None).

    One tensor a batch: every tensor that a worker hands over takes an open file, of which there may be 1024, and without any the loader hangs.
    """
    whole = next((picture for picture, _ in batch if picture is not None), None)
    pictures = (
        None
        if whole is None
        else torch.stack([torch.zeros_like(whole) if picture is None else picture for picture, _ in batch])
    )
    return pictures, [error for _, error in batch]


def read_rgb(path):
    """A picture, a path or an open file, of any mode as RGB, 8 bits a channel; orientation tags are ignored, as in the paper's code.

    Grey of 16 bits, 32 bits or floats is scaled to 8 bits rather than clipped, transparency is dropped.
    Raises: whatever Pillow does on a broken file; Image.DecompressionBombWarning on one of over 89 megapixels; ValueError on nan or infinity.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.mode.startswith("I") or image.mode == "F":
                return _scaled(image)
            if image.mode == "P" and "transparency" in image.info:
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")


def _scaled(image):
    """Grey of more than 8 bits as RGB. White is 65535 if the file says that it has 16 bits; else the least of 1 (floats only), 255, 65535 and the
    largest value that leaves no value above white."""
    grey = np.asarray(image, dtype=np.float64)
    if not np.isfinite(grey).all():
        raise ValueError("it has pixels that are not finite")
    has_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    whites = (65535,) if has_16_bits else (1, 255, 65535) if image.mode == "F" else (255, 65535)
    white = next((white for white in whites if grey.max() <= white), grey.max())
    return Image.fromarray((grey / white * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _check(document, path):
    """Raise a UserError at the first thing that is not as COCO's format has it; the message names the file and the entry."""

    def need(condition, what):
        if not condition:
            raise UserError(f"{path}: {what}")

    need(isinstance(document, dict), "not a COCO captions file: expected an object with 'images' and 'annotations'")
    for section, fields in (
        ("images", {"id": int, "file_name": str}),
        ("annotations", {"id": int, "image_id": int, "caption": str}),
    ):
        entries = document.get(section)
        need(
            isinstance(entries, list) and entries,
            f"'{section}' is missing or empty; expected a list with at least one entry",
        )
        seen = set()
        for row, entry in enumerate(entries):
            check_fields(entry, fields, f"{path}: {section}[{row}]")
            need(entry["id"] not in seen, f"{section}[{row}]: the id {entry['id']} comes twice; ids must be unique")
            seen.add(entry["id"])
        if section == "images":
            known = seen
    for row, entry in enumerate(document["annotations"]):
        need(
            entry["image_id"] in known,
            f"annotations[{row}] (id {entry['id']}) belongs to image {entry['image_id']}, which is not among 'images'",
        )
