"""The data sets by the name that --dataset takes.

Only cache_embeddings.py imports this, since it loads every reader.
"""

from dataclasses import dataclass

from datasets import image_folder, karpathy
from datasets.arrays import ArraySplit
from datasets.coco import CocoCaptions, Layout
from datasets.image_folder import ImageFolder
from datasets.karpathy import KarpathyCaptions
from datasets.shapes import classes, world
from datasets.table import TableCaptions
from datasets.tars import TarSplit

PHOTO_LADDER = (
    "a photo",
    "a photo of a cat",
    "a photo of a black cat",
    "a photo of a black cat with green eyes",
    "a photo of a black cat with big dark green eyes",
)
CSV_FLAGS = (
    "csv_img_key",
    "csv_caption_key",
    "csv_separator",
    "csv_group_key",
    "csv_quoting",
    "csv_caption_lists",
)


@dataclass(frozen=True)
class DataSet:
    """A data set that cache_embeddings.py can read."""

    reader: type  # class of a split (source.py), called with data root, name of the split, layout
    layout: object = None  # where the files lie; for ImageFolder, the default templates
    model: str | None = (
        "ViT-B-32-quickgelu"  # with pretrained, the CLIP used by default; None: none
    )
    pretrained: str = "openai"
    ladder: tuple = PHOTO_LADDER  # prompts, each with one detail more than the one before
    make: object = None  # function of the data root that makes the files where there are none
    chains: object = None  # function that gives lists of texts, each from general to specific
    flags: tuple = ()  # names of further flags that the reader takes
    one_split: bool = False  # whether its files are one split, which --split names


DATASETS = {
    "arrays": DataSet(ArraySplit, model=None, ladder=(), flags=("logit_scale",)),
    "coco": DataSet(
        CocoCaptions,
        Layout(
            "{split}2017",
            "annotations/captions_{split}2017.json",
            "annotations/relevance_{split}2017.json",
        ),
    ),
    "coco-karpathy": DataSet(KarpathyCaptions, karpathy.COCO),
    "csv": DataSet(TableCaptions, ("{split}.csv", "{split}.tsv"), flags=CSV_FLAGS),
    "flickr8k": DataSet(KarpathyCaptions, karpathy.FLICKR8K),
    "flickr30k": DataSet(KarpathyCaptions, karpathy.FLICKR30K),
    "imagefolder": DataSet(ImageFolder, image_folder.TEMPLATES, flags=("templates",)),
    "shapes": DataSet(
        CocoCaptions,
        Layout(
            "{split}", "annotations/captions_{split}.json", "annotations/relevance_{split}.json"
        ),
        model="datasets/shapes/clip.json",
        pretrained="datasets/shapes/clip.safetensors",
        ladder=world.LADDER,
        make=world.make,
        chains=world.write_chains,
    ),
    "shapes-classes": DataSet(
        ImageFolder,
        classes.TEMPLATES,
        model="datasets/shapes/clip.json",
        pretrained="datasets/shapes/clip.safetensors",
        ladder=world.LADDER,
        make=classes.make,
        flags=("templates",),
    ),
    "webdataset": DataSet(TarSplit, one_split=True),
}
