"""COCO captions: a folder with pictures and a captions file in; checked images and captions, in a fixed order, out.

Any captions file in COCO's format is read, so also the built-in data set's. A `Layout` says where; for COCO 2017:

    <root>/train2017/*.jpg  <root>/val2017/*.jpg  <root>/annotations/captions_{train,val}2017.json
"""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from pycocotools.coco import COCO

from datasets.checks import check_fields, inside, listing, need
from datasets.source import ListSplit
from utils.cli import UserError
from utils.files import load_json


@dataclass(frozen=True)
class Layout:
    """Where a COCO-format data set keeps a split; "{split}" stands for its name."""

    images: str
    captions: str
    relevance: str  # {caption id: [image ids]}, where more than one image is right for a caption; may be missing


class CocoCaptions(ListSplit):
    """The captions of a split by ascending annotation id, and the images they belong to by ascending image id.

    Captions and file names are as they stand in the file.
    Raises: UserError that says what was expected and what was found.
    """

    def __init__(self, root, split, layout):
        root = Path(root)
        folder, file = root / layout.images.format(split=split), root / layout.captions.format(split=split)
        for path in (file, folder):
            if not path.exists():
                raise UserError(f"--data-root {root}: expected {path.relative_to(root)}, found {listing(root)}")
        document = load_json(file)
        _check(document, file)
        coco = COCO()
        coco.dataset = {section: document[section] for section in ("images", "annotations")}  # others are not checked
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
            coco.createIndex()
        image_ids, caption_ids = sorted(coco.getImgIds()), sorted(coco.getAnnIds())
        row_of_image = {image_id: row for row, image_id in enumerate(image_ids)}
        annotations = coco.loadAnns(caption_ids)
        names = [image["file_name"] for image in coco.loadImgs(image_ids)]
        captions = [annotation["caption"] for annotation in annotations]
        image_of_caption = [row_of_image[annotation["image_id"]] for annotation in annotations]
        files = [inside(folder, name, file) for name in names]
        super().__init__(image_ids, files, names, caption_ids, captions, image_of_caption)
        relevance_file = root / layout.relevance.format(split=split)
        if relevance_file.exists():
            self.relevance = _load_relevance(relevance_file, caption_ids, row_of_image)


def _load_relevance(path, caption_ids, row_of_image):
    """The image rows that are right for each caption, ascending."""
    relevant = load_json(path)
    try:
        rows = [sorted({row_of_image[i] for i in relevant[str(caption_id)]}) for caption_id in caption_ids]
    except (KeyError, TypeError) as error:
        cure = "make it anew with its captions file"
        raise UserError(f"{path}: no list of known image ids for every caption ({error}); {cure}") from None
    for caption_id, images in zip(caption_ids, rows, strict=True):
        need(images, f"{path}: caption {caption_id} has no image; make it anew with its captions file")
    return rows


def _check(document, path):
    """Raise a UserError at the first thing that is not as COCO's format has it; the message names file and entry."""
    sections = {"images": {"id": int, "file_name": str}, "annotations": {"id": int, "image_id": int, "caption": str}}
    what = "not a COCO captions file: expected an object with 'images' and 'annotations'"
    need(isinstance(document, dict), f"{path}: {what}")
    known = {}
    for section, fields in sections.items():
        entries, known[section] = document.get(section), set()
        what = f"'{section}' is missing or empty; expected a list with at least one entry"
        need(isinstance(entries, list) and entries, f"{path}: {what}")
        for row, entry in enumerate(entries):
            place = f"{path}: {section}[{row}]"
            check_fields(entry, fields, place)
            need(entry["id"] not in known[section], f"{place}: the id {entry['id']} comes twice; ids must be unique")
            known[section].add(entry["id"])
    for row, entry in enumerate(document["annotations"]):
        place, image = f"{path}: annotations[{row}] (id {entry['id']})", entry["image_id"]
        need(image in known["images"], f"{place} belongs to image {image}, which is not among 'images'")
