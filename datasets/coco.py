"""Captions in COCO's format: a folder with images, and a captions file.

The built-in data set has this format too. A `Layout` says where the files are; for COCO 2017:

    <root>/train2017/*.jpg  <root>/val2017/*.jpg  <root>/annotations/captions_{train,val}2017.json
"""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from pycocotools.coco import COCO

from datasets.checks import check_fields, image_path, listing
from datasets.source import ListSplit
from utils.cli import UserError, need
from utils.files import load_json


@dataclass(frozen=True)
class Layout:
    """Where a data set in COCO's format keeps a split; "{split}" stands for its name."""

    images: str
    captions: str
    relevance: str  # {caption id: [ids of all right images]}; the file may be missing


class CocoCaptions(ListSplit):
    """The captions of a split by ascending annotation id, and images by ascending image id.

    Captions and file names are as they stand in the file.

    Raises: UserError that says what was expected and what was found.
    """

    def __init__(self, root, split, layout):
        root = Path(root)
        folder = root / layout.images.format(split=split)
        file = root / layout.captions.format(split=split)
        for path in (file, folder):
            if not path.exists():
                expected = f"expected {path.relative_to(root)}, found {listing(root)}"
                raise UserError(f"--data-root {root}: {expected}")
        coco, broken = _read(file)
        image_ids = sorted(coco.getImgIds())
        caption_ids = sorted(coco.getAnnIds())
        annotations = coco.loadAnns(caption_ids)
        names = [image["file_name"] for image in coco.loadImgs(image_ids)]
        row_of_image = {image_id: row for row, image_id in enumerate(image_ids)}
        super().__init__(
            image_ids=image_ids,
            image_files=[image_path(folder, name, file) for name in names],
            image_names=names,
            caption_ids=caption_ids,
            captions=[annotation["caption"] for annotation in annotations],
            image_of_caption=[row_of_image[annotation["image_id"]] for annotation in annotations],
            broken=broken,
        )
        relevance_file = root / layout.relevance.format(split=split)
        if relevance_file.exists():
            self.relevance = _load_relevance(relevance_file, caption_ids, row_of_image)


def _read(file):
    """A checked captions file as pycocotools has it, and what is broken: its blank captions."""
    document = load_json(file)
    _check(document, file)
    broken = []
    sound = []
    for row, entry in enumerate(document["annotations"]):
        if entry["caption"].strip():
            sound.append(entry)
        else:
            place = f"{file}: annotations[{row}] (id {entry['id']})"
            broken.append([place, "has a blank caption; fill it in or remove it"])
    need(sound, f"{file}: all captions are blank; fill them in")
    coco = COCO()
    # Other sections, which are not checked, are left out.
    coco.dataset = {"images": document["images"], "annotations": sound}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        coco.createIndex()
    return coco, broken


def _load_relevance(path, caption_ids, row_of_image):
    """The image rows that are right for each caption, ascending."""
    image_ids_of = load_json(path)
    cure = "regenerate it together with its captions file"
    relevance = []
    for caption_id in caption_ids:
        try:
            rows = sorted({row_of_image[image_id] for image_id in image_ids_of[str(caption_id)]})
        except (KeyError, TypeError) as error:
            problem = f"no list of known image ids for every caption ({error})"
            raise UserError(f"{path}: {problem}; {cure}") from None
        need(rows, f"{path}: caption {caption_id} has no image; {cure}")
        relevance.append(rows)
    return relevance


def _check(document, path):
    """Raise a UserError that names the first entry that is not of COCO's format."""
    expected = "expected an object with 'images' and 'annotations'"
    is_object = isinstance(document, dict)
    need(is_object, f"{path}: not a COCO captions file: {expected}")
    image_ids = _check_section(document, "images", {"id": int, "file_name": str}, path)
    fields = {"id": int, "image_id": int, "caption": str}
    _check_section(document, "annotations", fields, path)
    for row, entry in enumerate(document["annotations"]):
        image_id = entry["image_id"]
        problem = f"belongs to image {image_id}, which is not among 'images'"
        is_known = image_id in image_ids
        need(is_known, f"{path}: annotations[{row}] (id {entry['id']}) {problem}")


def _check_section(document, section, fields, path):
    """Check the entries of a section; returns the set of their ids."""
    entries = document.get(section)
    problem = f"'{section}' is missing or empty; expected a list with at least one entry"
    need(isinstance(entries, list) and entries, f"{path}: {problem}")
    ids = set()
    for row, entry in enumerate(entries):
        place = f"{path}: {section}[{row}]"
        check_fields(entry, fields, place, may_be_blank=("caption",))
        is_new = entry["id"] not in ids
        need(is_new, f"{place}: the id {entry['id']} comes twice; ids must be unique")
        ids.add(entry["id"])
    return ids
