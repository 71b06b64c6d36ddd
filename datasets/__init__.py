"""The data sets by the name that --dataset takes: which class reads them, where their splits lie, which CLIP they use unless told otherwise,
and their prompt ladder."""

from dataclasses import dataclass

from datasets import karpathy
from datasets.coco import CocoCaptions, Layout
from datasets.karpathy import KarpathyCaptions
from datasets.shapes import world
from datasets.table import TableCaptions
from datasets.tars import TarShards


@dataclass(frozen=True)
class Source:
    """A data set that cache_embeddings.py can read.

    reader: class of a split's captions, called with (root, split, layout); it has the attributes of CocoCaptions. layout: where the files lie.
    model, pretrained: the CLIP used by default. ladder: prompts, each with one detail more than the one before.
    make: function of the data root that makes the files where there are none, or None. chains: function that gives lists of texts, each from
    general to specific, or None. flags: those of the command line that the reader takes as well, by name.
    """

    reader: type
    layout: object
    model: str
    pretrained: str
    ladder: tuple
    make: object = None
    chains: object = None
    flags: tuple = ()


PHOTO_LADDER = (
    "a photo",
    "a photo of a cat",
    "a photo of a black cat",
    "a photo of a black cat with green eyes",
    "a photo of a black cat with big dark green eyes",
)

DATASETS = {
    "coco": Source(
        reader=CocoCaptions,
        layout=Layout(images="{split}2017", captions="annotations/captions_{split}2017.json"),
        model="ViT-B-32-quickgelu",
        pretrained="openai",
        ladder=PHOTO_LADDER,
    ),
    "coco-karpathy": Source(KarpathyCaptions, karpathy.COCO, "ViT-B-32-quickgelu", "openai", PHOTO_LADDER),
    "csv": Source(
        reader=TableCaptions,
        layout=("{split}.csv", "{split}.tsv"),
        model="ViT-B-32-quickgelu",
        pretrained="openai",
        ladder=PHOTO_LADDER,
        flags=("csv_img_key", "csv_caption_key", "csv_separator"),
    ),
    "flickr30k": Source(KarpathyCaptions, karpathy.FLICKR30K, "ViT-B-32-quickgelu", "openai", PHOTO_LADDER),
    "shapes": Source(
        reader=CocoCaptions,
        layout=Layout(
            images="{split}",
            captions="annotations/captions_{split}.json",
            relevance="annotations/relevance_{split}.json",
        ),
        model="datasets/shapes/clip.json",
        pretrained="datasets/shapes/clip.safetensors",
        ladder=world.LADDER,
        make=world.make,
        chains=world.write_chains,
    ),
    "webdataset": Source(TarShards, None, "ViT-B-32-quickgelu", "openai", PHOTO_LADDER),
}
