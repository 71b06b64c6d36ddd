"""What a caption's words alone tell of its exact ambiguity in the built-in data set, and what its splits share.

    python -m tests.benchmarks.shapes

The bag of words is fitted (ridge regression of the logarithm) on the captions of one half of the val images and judged
on the other half: it says how far a method could get by looking at single words.
"""

import math
import random

import numpy as np
from scipy import stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import Ridge

from datasets.shapes.world import draw_scene, make_split, relevant_images, shown
from tests.benchmarks.machine import markdown_table

CHAINS = 200  # as world.write_chains draws them


def main(train_images=10_000, val_images=1_000):
    train, val = (
        make_split(0, split, n) for split, n in (("train", train_images), ("val", val_images))
    )
    texts, images = (
        [entry[key] for entry in val["annotations"]] for key in ("caption", "image_id")
    )
    relevant = relevant_images(val)
    ambiguity = np.array(
        [math.log(len(relevant[str(entry["id"])])) for entry in val["annotations"]]
    )
    held_out = np.array(images) > np.median(images)
    bags = CountVectorizer(token_pattern=r"[^ ]+").fit_transform(texts)
    predicted = Ridge(1.0).fit(bags[~held_out], ambiguity[~held_out]).predict(bags[held_out])
    seen = {shown(image["scene"]) for image in train["images"]}
    read = {entry["caption"] for entry in train["annotations"]}
    chains = [shown(draw_scene(random.Random(f"shapes/0/chains/{i}"))) for i in range(CHAINS)]
    rows = [
        [
            "Spearman of ambiguity and word count",
            f"{stats.spearmanr([len(t.split()) for t in texts], -ambiguity)[0]:.3f}",
        ],
        [
            "Spearman of ambiguity and a bag of words, held-out images",
            f"{stats.spearmanr(predicted, ambiguity[held_out])[0]:.3f}",
        ],
        [
            "val captions whose text stands in train",
            f"{sum(text in read for text in texts)} of {len(texts)}",
        ],
        [
            "val scenes that train shows too",
            f"{sum(shown(i['scene']) in seen for i in val['images'])} of {val_images}",
        ],
        [
            "scenes of chains that train shows too",
            f"{sum(key in seen for key in chains)} of {CHAINS}",
        ],
    ]
    print(markdown_table(["the built-in data set", "figure"], rows))


if __name__ == "__main__":
    main()
