"""Captions with Karpathy's splits: a folder with images, and one JSON file for all splits.

The JSON is {"images": [{"filename", "split", "imgid", "sentences": [{"raw", "sentid"}]}]}. COCO's
also needs "cocoid" and "filepath"; other fields are ignored.

    <root>/dataset_flickr30k.json  <root>/flickr30k-images/*.jpg or <root>/images/*.jpg
    <root>/dataset_flickr8k.json   <root>/Flicker8k_Dataset/*.jpg or <root>/images/*.jpg
    <root>/dataset_coco.json       <root>/train2014/*.jpg  <root>/val2014/*.jpg
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import eccv
from datasets.checks import check_fields, id_as_int, image_path, listing
from datasets.source import ListSplit
from utils.cli import UserError, need
from utils.files import load_json


@dataclass(frozen=True)
class KarpathyLayout:
    """Where a data set with Karpathy's splits lies."""

    captions: str  # the JSON
    folders: tuple  # of images: the first that exists, or, if by_filepath, those that are allowed
    by_filepath: bool = False  # whether every image names its folder as "filepath"
    image_id: str = "imgid"  # the field that becomes its id
    train: tuple = ("train",)  # the splits that "train" consists of
    judgements: object = None  # function of datasets/eccv.py: right answers in the split "test"


FLICKR30K = KarpathyLayout(
    captions="dataset_flickr30k.json", folders=("flickr30k-images", "images")
)
FLICKR8K = KarpathyLayout(
    captions="dataset_flickr8k.json",
    folders=("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images"),
)
COCO = KarpathyLayout(
    captions="dataset_coco.json",
    folders=("train2014", "val2014"),
    by_filepath=True,
    image_id="cocoid",
    train=("train", "restval"),
    judgements=eccv.judgements,
)


class KarpathyCaptions(ListSplit):
    """The captions of a split by ascending sentid, and their images by ascending imgid.

    COCO's train is `train` and `restval` together, as in the papers that report on these splits.
    Every caption is kept, also the sixth of an image. Image ids are cocoids for COCO, which do not
    ascend, and imgids otherwise; caption ids are sentids. Image names are those of the JSON, for
    COCO with the folder.

    Raises: UserError that says what was expected and what was found.
    """

    def __init__(self, root, split, layout):
        root = Path(root)
        path = root / layout.captions
        expected = f"{layout.captions} and {_alternatives(layout)}"
        need(path.is_file(), f"--data-root {root}: expected {expected}, found {listing(root)}")
        document = load_json(path)
        _check(document, layout, path)
        images = _images_of_split(document["images"], split, layout, path)
        names = []
        files = []
        sentences = []  # (sentid, caption, image row)
        broken = []
        for row, image in enumerate(images):
            folder = _folder_of(image, layout, root)
            name = image["filename"]
            names.append(f"{folder}/{name}" if layout.by_filepath else name)
            files.append(image_path(root / folder, name, f"{path}: images[{image['position']}]"))
            for sentence in image["sentences"]:
                sentid = sentence["sentid"]
                if sentence["raw"].strip():
                    sentences.append((sentid, sentence["raw"], row))
                else:
                    place = f"{path}: images[{image['position']}], sentid {sentid}"
                    broken.append([place, "is a blank sentence; fill it in or remove it"])
        problem = f"the images of the split {split} have no captions"
        need(sentences, f"{path}: {problem}; choose another with --split")
        sentences.sort()
        super().__init__(
            image_ids=[image[layout.image_id] for image in images],
            image_files=files,
            image_names=names,
            caption_ids=[sentid for sentid, _, _ in sentences],
            captions=[caption for _, caption, _ in sentences],
            image_of_caption=[row for _, _, row in sentences],
            broken=broken,
        )
        if layout.judgements and split == "test":
            judgements = layout.judgements(
                self.image_ids, self.caption_ids, self.image_of_caption, path
            )
            self.relevance = judgements or None


def _alternatives(layout):
    """The folders of a layout in a message: "flickr30k-images/ or images/"."""
    return " or ".join(f"{name}/" for name in layout.folders)


def _images_of_split(all_images, split, layout, path):
    """The images of a split by ascending imgid, each with its "position" in the JSON."""
    splits = layout.train if split == "train" else (split,)
    images = []
    for position, image in enumerate(all_images):
        if image["split"] in splits:
            images.append({**image, "position": position})
    found = ", ".join(sorted({image["split"] for image in all_images}))
    problem = f"no image of the split {split} (found: {found})"
    need(images, f"{path}: {problem}; choose among these with --split")
    return sorted(images, key=lambda image: image["imgid"])


def _folder_of(image, layout, root):
    """The name of the folder in which an image lies, which exists."""
    existing = [name for name in layout.folders if (root / name).is_dir()]
    if layout.by_filepath:
        folder = image["filepath"]
        expected = f"{folder}/"
    else:
        folder = existing[0] if existing else None
        expected = _alternatives(layout)
    if folder not in existing:
        expected = f"expected {expected} with the images of {layout.captions}"
        raise UserError(f"--data-root {root}: {expected}, found {listing(root)}")
    return folder


def _check(document, layout, path):
    """Raise a UserError that names the first place that is not of Karpathy's format."""
    images = document.get("images") if isinstance(document, dict) else None
    problem = "expected an object with a list 'images' of at least one entry"
    is_list = isinstance(images, list) and len(images) > 0
    need(is_list, f"{path}: not a file of Karpathy's format: {problem}")
    seen = set()  # (field, value) of all ids
    for row, image in enumerate(images):
        place = f"{path}: images[{row}]"
        _check_image(image, layout, place, seen)
        for number, sentence in enumerate(image["sentences"]):
            _check_sentence(sentence, image, f"{place}.sentences[{number}]", seen)


def _check_image(image, layout, place, seen):
    fields = {"imgid": int, "filename": str, "split": str}
    if layout.by_filepath:
        fields["filepath"] = str
    fields[layout.image_id] = int
    check_fields(image, fields, place)
    _check_new("imgid", image["imgid"], place, seen)
    if layout.image_id != "imgid":
        _check_new(layout.image_id, image[layout.image_id], place, seen)
    owner = f"{place} (imgid {image['imgid']})"
    if layout.by_filepath:
        folder = image["filepath"]
        problem = f"'filepath' is {folder!r}, expected {' or '.join(layout.folders)}"
        need(folder in layout.folders, f"{owner}: {problem}")
    is_list = isinstance(image.get("sentences"), list)
    need(is_list, f"{owner}: 'sentences' is missing or no list; give a list of captions")


def _check_sentence(sentence, image, place, seen):
    check_fields(sentence, {"sentid": int, "raw": str}, place, may_be_blank=("raw",))
    _check_new("sentid", sentence["sentid"], place, seen)
    imgid = id_as_int(sentence.get("imgid", image["imgid"]))
    problem = f"says imgid {sentence.get('imgid')!r} but stands under imgid {image['imgid']}"
    is_own = imgid == image["imgid"]
    need(is_own, f"{place} (sentid {sentence['sentid']}) {problem}")


def _check_new(field, value, place, seen):
    """Raise a UserError if an id was seen before; else note it."""
    is_new = (field, value) not in seen
    need(is_new, f"{place}: the {field} {value} comes twice; it must be unique")
    seen.add((field, value))
