"""The data sets by the name that --dataset takes: where their splits lie, which CLIP they use unless told otherwise, and their prompt ladder."""

from dataclasses import dataclass

from datasets.coco import Layout
from datasets.shapes import world


@dataclass(frozen=True)
class Source:
    """A data set that cache_embeddings.py can read.

    layout: where the files lie. model, pretrained: the CLIP used by default. ladder: prompts, each with one detail more than the one before.
    make: function of the data root that makes the files where there are none, or None. chains: function that gives lists of texts, each from
    general to specific, or None.
    """

    layout: Layout
    model: str
    pretrained: str
    ladder: tuple
    make: object = None
    chains: object = None


PHOTO_LADDER = (
    "a photo",
    "a photo of a cat",
    "a photo of a black cat",
    "a photo of a black cat with green eyes",
    "a photo of a black cat with big dark green eyes",
)

DATASETS = {
    "coco": Source(
        layout=Layout(images="{split}2017", captions="annotations/captions_{split}2017.json"),
        model="ViT-B-32-quickgelu",
        pretrained="openai",
        ladder=PHOTO_LADDER,
    ),
    "shapes": Source(
        layout=Layout(images="{split}", captions="annotations/captions_{split}.json", relevance="annotations/relevance_{split}.json"),
        model="datasets/shapes/clip.json",
        pretrained="datasets/shapes/clip.safetensors",
        ladder=world.LADDER,
        make=world.make,
        chains=world.write_chains,
    ),
}
