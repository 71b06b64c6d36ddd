"""Captions with Karpathy's splits: a folder with pictures and one JSON for all splits in; checked images and captions, in a fixed order, out.

The JSON is {"images": [{"filename", "split", "imgid", "sentences": [{"raw", "sentid"}]}]}, which may hold more. The expected layouts:

    <root>/dataset_flickr30k.json  <root>/flickr30k-images/*.jpg or <root>/images/*.jpg
    <root>/dataset_coco.json       <root>/train2014/*.jpg  <root>/val2014/*.jpg
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import eccv
from utils.cli import UserError
from utils.files import check_fields, inside, listing, load_json


@dataclass(frozen=True)
class KarpathyLayout:
    """Where a data set with Karpathy's splits lies.

    captions: the JSON. folders: of the pictures: the first that is there, or, if every image names its own as "filepath", all that are allowed.
    image_id: the field that becomes the image's id. train: the splits that "train" is made of. relevance: the function of datasets/eccv.py
    that knows which images are right for the captions of the split "test", or None.
    """

    captions: str
    folders: tuple
    by_filepath: bool = False
    image_id: str = "imgid"
    train: tuple = ("train",)
    relevance: object = None


FLICKR30K = KarpathyLayout(captions="dataset_flickr30k.json", folders=("flickr30k-images", "images"))
COCO = KarpathyLayout(
    captions="dataset_coco.json",
    folders=("train2014", "val2014"),
    by_filepath=True,
    image_id="cocoid",
    train=("train", "restval"),
    relevance=eccv.relevance,
)


class KarpathyCaptions:
    """The captions of a split, in order of ascending sentid, and the images they belong to, in order of ascending imgid.

    COCO's train is `train` and `restval` together, as in the papers that report on these splits. Every caption is kept, an image's sixth too.

    Args: root: folder. split: "train", "val" or "test". layout: KarpathyLayout.
    Attributes: as CocoCaptions. image_ids are cocoids for COCO, and not ascending, else imgids; caption_ids are sentids.
        image_names: as the JSON gives them, for COCO with the folder.
    Raises: UserError that says what was expected and what was found.
    """

    def __init__(self, root, split, layout):
        root = Path(root)
        path = root / layout.captions
        if not path.is_file():
            raise UserError(
                f"--data-root {root}: expected {layout.captions} and {' or '.join(_slashed(layout))}, found {listing(root)}"
            )
        document = load_json(path)
        _check(document, layout, path)
        wanted = layout.train if split == "train" else (split,)
        rows = [row for row, image in enumerate(document["images"]) if image["split"] in wanted]
        if not rows:
            found = ", ".join(sorted({image["split"] for image in document["images"]}))
            raise UserError(f"{path}: no image of the split {split} (found: {found}); choose among these with --split")
        rows.sort(key=lambda row: document["images"][row]["imgid"])
        images = [document["images"][row] for row in rows]
        folders = _folders(root, layout, images)
        self.image_ids = [image[layout.image_id] for image in images]
        self.image_files = [
            inside(folder, image["filename"], f"{path}: images[{row}]")
            for folder, row, image in zip(folders, rows, images, strict=True)
        ]
        self.image_names = [
            f"{image['filepath']}/{image['filename']}" if layout.by_filepath else image["filename"] for image in images
        ]
        sentences = sorted(
            (sentence["sentid"], sentence["raw"], row)
            for row, image in enumerate(images)
            for sentence in image["sentences"]
        )
        if not sentences:
            raise UserError(f"{path}: the images of the split {split} have no captions; choose another with --split")
        self.caption_ids, self.captions, self.image_of_caption = (
            list(column) for column in zip(*sentences, strict=True)
        )
        self.relevance = self.annotated = None
        if layout.relevance and split == "test":
            self.relevance, self.annotated = layout.relevance(
                self.image_ids, self.caption_ids, self.image_of_caption, path
            )


def _folders(root, layout, images):
    """The folder of every image. Raises: UserError if one is not there."""
    if layout.by_filepath:
        names = [image["filepath"] for image in images]
    else:
        names = [next((name for name in layout.folders if (root / name).is_dir()), layout.folders[0])] * len(images)
    for name in sorted(set(names)):
        if not (root / name).is_dir():
            expected = f"{name}/" if layout.by_filepath else " or ".join(_slashed(layout))
            raise UserError(
                f"--data-root {root}: expected {expected} with the pictures of {layout.captions}, found {listing(root)}"
            )
    return [root / name for name in names]


def _slashed(layout):
    return [f"{name}/" for name in layout.folders]


def _check(document, layout, path):
    """Raise a UserError at the first thing that is not as Karpathy's format has it; the message names the file and the entry."""

    def need(condition, what):
        if not condition:
            raise UserError(f"{path}: {what}")

    def new(value, field, where, seen):
        need(value not in seen[field], f"{where}: the {field} {value} comes twice; it must be unique")
        seen[field].add(value)

    images = document.get("images") if isinstance(document, dict) else None
    need(
        isinstance(images, list) and images,
        "not a file of Karpathy's format: expected an object with a list 'images' of at least one entry",
    )
    fields = (
        {"imgid": int, "filename": str, "split": str}
        | ({"filepath": str} if layout.by_filepath else {})
        | {layout.image_id: int}
    )
    seen = {field: set() for field in ("imgid", layout.image_id, "sentid")}
    for row, image in enumerate(images):
        place = f"images[{row}]"
        check_fields(image, fields, f"{path}: {place}")
        for field in dict.fromkeys(("imgid", layout.image_id)):
            new(image[field], field, place, seen)
        if layout.by_filepath:
            allowed = " or ".join(layout.folders)
            need(
                image["filepath"] in layout.folders,
                f"{place} (imgid {image['imgid']}): 'filepath' is {image['filepath']!r}, expected {allowed}",
            )
        sentences = image.get("sentences")
        need(
            isinstance(sentences, list),
            f"{place} (imgid {image['imgid']}): 'sentences' is missing or no list; give a list of captions",
        )
        for k, sentence in enumerate(sentences):
            place = f"images[{row}].sentences[{k}]"
            check_fields(sentence, {"sentid": int, "raw": str}, f"{path}: {place}")
            new(sentence["sentid"], "sentid", place, seen)
            owner = sentence.get("imgid", image["imgid"])
            need(
                owner == image["imgid"],
                f"{place} (sentid {sentence['sentid']}) says imgid {owner!r} but stands under imgid {image['imgid']}",
            )
