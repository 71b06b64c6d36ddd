"""Classes of the built-in world: one object of a colour and shape per image, for zero-shot tests.

The layout is that of --dataset imagefolder: <root>/<split>/<colour>_<shape>/000.png
"""

import random
import shutil
from pathlib import Path

from tqdm import tqdm

from datasets.shapes.world import COLOURS, SHAPES, draw_scene, paint
from utils.files import partial_path, remove_leftovers

# Prompts from vague to precise. The first three say nothing of the class; the last two say more
# than is true of all of its images.
TEMPLATES = (
    "something",
    "an object",
    "a picture of something",
    "{}",
    "a {}",
    "a picture of a {}",
    "there is a {} in the middle",
    "a picture of a big {} in the middle",
)


def make(root, seed=0, train=2, val=12):
    """Draw the images of all classes. The folder appears complete or not at all.

    Args:
        root: a folder that does not exist yet.
        train, val: numbers of images of each class.
    """
    root = Path(root)
    remove_leftovers(root)
    aside = partial_path(root)
    rng = random.Random(f"classes {seed}")
    try:
        for split, images in (("train", train), ("val", val)):
            for colour in tqdm(COLOURS, desc=f"drawing {split}", unit="colour", mininterval=0.5):
                for shape in SHAPES:
                    folder = aside / split / f"{colour}_{shape}"
                    folder.mkdir(parents=True)
                    for number in range(images):
                        scene = draw_object(rng, colour, shape)
                        paint(scene).save(folder / f"{number:03d}.png")
        aside.rename(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def draw_object(rng, colour, shape):
    """A random scene with one object of this colour and shape, as `draw_scene` returns it."""
    while True:
        scene = draw_scene(rng)
        if len(scene["objects"]) == 1 and scene["background"] != colour:
            scene["objects"][0].update(colour=colour, shape=shape)
            return scene
