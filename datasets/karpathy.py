"""Captions with Karpathy's splits: a folder with pictures and one JSON for all splits in; checked lists out.

The JSON is {"images": [{"filename", "split", "imgid", "sentences": [{"raw", "sentid"}]}]}, which may hold more:

    <root>/dataset_flickr30k.json  <root>/flickr30k-images/*.jpg or <root>/images/*.jpg
    <root>/dataset_coco.json       <root>/train2014/*.jpg  <root>/val2014/*.jpg
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import eccv
from datasets.checks import check_fields, inside, listing, need
from datasets.source import ListSplit
from utils.cli import UserError
from utils.files import load_json


@dataclass(frozen=True)
class KarpathyLayout:
    """Where a data set with Karpathy's splits lies."""

    captions: str  # the JSON
    folders: tuple  # of the pictures: the first that is there, or those allowed if by_filepath
    by_filepath: bool = False  # whether every image names its folder as "filepath"
    image_id: str = "imgid"  # the field that becomes its id
    train: tuple = ("train",)  # the splits that "train" is made of
    judgements: object = None  # function of datasets/eccv.py: what people found right in the split "test"


FLICKR30K = KarpathyLayout(captions="dataset_flickr30k.json", folders=("flickr30k-images", "images"))
COCO = KarpathyLayout(
    captions="dataset_coco.json",
    folders=("train2014", "val2014"),
    by_filepath=True,
    image_id="cocoid",
    train=("train", "restval"),
    judgements=eccv.judgements,
)


class KarpathyCaptions(ListSplit):
    """The captions of a split by ascending sentid, and the images they belong to by ascending imgid.

    COCO's train is `train` and `restval` together, as in the papers that report on these splits. Every caption is
    kept, an image's sixth too. Image ids are cocoids for COCO, and not ascending, else imgids; caption ids are sentids.
    Image names are as the JSON gives them, for COCO with the folder.
    Raises: UserError that says what was expected and what was found.
    """

    def __init__(self, root, split, layout):
        root = Path(root)
        path, folders = root / layout.captions, " or ".join(f"{name}/" for name in layout.folders)
        need(path.is_file(), f"--data-root {root}: expected {layout.captions} and {folders}, found {listing(root)}")
        document = load_json(path)
        _check(document, layout, path)
        wanted = layout.train if split == "train" else (split,)
        places = {image["imgid"]: f"{path}: images[{row}]" for row, image in enumerate(document["images"])}
        images = [image for image in document["images"] if image["split"] in wanted]
        images.sort(key=lambda image: image["imgid"])
        found = ", ".join(sorted({image["split"] for image in document["images"]}))
        need(images, f"{path}: no image of the split {split} (found: {found}); choose among these with --split")
        there = [name for name in layout.folders if (root / name).is_dir()]
        names, files = [], []
        for image in images:
            folder = image["filepath"] if layout.by_filepath else (there or layout.folders)[0]
            if folder not in there:
                expected = f"{folder}/" if layout.by_filepath else folders
                expected = f"expected {expected} with the pictures of {layout.captions}"
                raise UserError(f"--data-root {root}: {expected}, found {listing(root)}")
            names.append(f"{folder}/{image['filename']}" if layout.by_filepath else image["filename"])
            files.append(inside(root / folder, image["filename"], places[image["imgid"]]))
        sentences = [(of["sentid"], of["raw"], row) for row, image in enumerate(images) for of in image["sentences"]]
        need(sentences, f"{path}: the images of the split {split} have no captions; choose another with --split")
        image_ids = [image[layout.image_id] for image in images]
        super().__init__(image_ids, files, names, *map(list, zip(*sorted(sentences), strict=True)))
        if layout.judgements and split == "test":
            self.relevance = layout.judgements(self.image_ids, self.caption_ids, self.image_of_caption, path) or None


def _check(document, layout, path):
    """Raise a UserError at the first thing that is not as Karpathy's format has it, and name its place."""
    images = document.get("images") if isinstance(document, dict) else None
    what = "expected an object with a list 'images' of at least one entry"
    need(isinstance(images, list) and images, f"{path}: not a file of Karpathy's format: {what}")
    fields = {"imgid": int, "filename": str, "split": str}
    fields |= ({"filepath": str} if layout.by_filepath else {}) | {layout.image_id: int}
    seen = set()

    def check_new(value, field, place):
        need((field, value) not in seen, f"{place}: the {field} {value} comes twice; it must be unique")
        seen.add((field, value))

    for row, image in enumerate(images):
        place = f"{path}: images[{row}]"
        check_fields(image, fields, place)
        for field in dict.fromkeys(("imgid", layout.image_id)):
            check_new(image[field], field, place)
        owner = f"{place} (imgid {image['imgid']})"
        if layout.by_filepath:
            allowed = f"'filepath' is {image['filepath']!r}, expected {' or '.join(layout.folders)}"
            need(image["filepath"] in layout.folders, f"{owner}: {allowed}")
        sentences = image.get("sentences")
        need(isinstance(sentences, list), f"{owner}: 'sentences' is missing or no list; give a list of captions")
        for k, sentence in enumerate(sentences):
            place_of = f"{place}.sentences[{k}]"
            check_fields(sentence, {"sentid": int, "raw": str}, place_of)
            check_new(sentence["sentid"], "sentid", place_of)
            says = sentence.get("imgid", image["imgid"])
            what = f"says imgid {says!r} but stands under imgid {image['imgid']}"
            need(says == image["imgid"], f"{place_of} (sentid {sentence['sentid']}) {what}")
