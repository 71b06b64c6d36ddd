"""Which recipe a method is best trained by on a small cache, chosen on a tenth of its train images, held out.

    python -m tests.benchmarks.recipes                   # of the built-in data set, one seed; half an hour on two cores
    python -m tests.benchmarks.recipes --dataset mine --method prolip --seed 0 1 2

Every method has the same grid, of learning rates and, where variances can be started, of starts; the same epochs and
batch size, those of `small`; and the same seeds. The best has the smallest mean of AURC in both directions.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import eval as eval_script
import train
from datasets.embedding import EmbeddingCache
from datasets.write import write_split
from models import GROUPS, METHODS
from models.base import SMALL
from tests.benchmarks.machine import markdown_table

RATES = (3e-4, 1e-3, 3e-3)
STARTS = (None, 1.0)
HELD_OUT = 10  # one image of so many


def split_images(cache, folder):
    """Write a cache's images and their captions as two splits: train, nine tenths, and val, one."""
    image, text, owners = cache.image.read(), cache.text.read(), cache.image_of_caption
    for name, is_val in (("train", False), ("val", True)):
        chosen = [row for row in range(len(image)) if (row % HELD_OUT == 0) == is_val]
        captions = [row for row, owner in enumerate(owners.tolist()) if (owner % HELD_OUT == 0) == is_val]
        rows = {image_row: row for row, image_row in enumerate(chosen)}
        image_of_caption = [rows[owner] for owner in owners[captions].tolist()]
        texts, files = [cache.captions[row] for row in captions], [cache.images[row] for row in chosen]
        write_split(
            folder / name, image[chosen], text[captions], image_of_caption, texts, files, None, dict(cache.meta)
        )


def grid(method):
    """The recipes that are tried for a method: {name: Recipe}."""
    starts = STARTS if METHODS[method].recipes["small"].start_variance is not None else (None,)
    return {f"{rate:g}, {start}": replace(SMALL, lr=rate, start_variance=start) for rate in RATES for start in starts}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--method", nargs="+", default=list(GROUPS["all"]))
    parser.add_argument("--seed", nargs="+", default=["0"])
    args = parser.parse_args()
    cache, rows = EmbeddingCache(args.dataset, "train"), []
    cache.meta.pop("shards", None)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        split_images(cache, Path("embeddings/grid"))
        for method in args.method:
            tried = {}
            for name, recipe in grid(method).items():
                METHODS[method].recipes[name] = recipe
                flags = ["--dataset", "grid", "--method", method, "--seed", *args.seed]
                train.main([*flags, "--recipe", name])
                with contextlib.redirect_stdout(sys.stderr):
                    eval_script.main([*flags, "--no-plots", "--resamples", "0"])
                files = [Path(f"results/grid/{seed}/{method}.json") for seed in args.seed]
                metrics = [json.loads(file.read_text())["metrics"] for file in files]
                tried[name] = [[run[direction]["AURC"] for run in metrics] for direction in ("t2i", "i2t")]
            best = min(tried, key=lambda name: np.mean(tried[name]))
            for name, directions in tried.items():
                deviations = [f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "" for values in directions]
                cells = [f"{np.mean(v):.3f}{d}" for v, d in zip(directions, deviations, strict=True)]
                mark = "**" if name == best else ""
                rate, start = name.split(", ")
                rows.append([f"{mark}{method}{mark}", rate, start, *cells])
    print(markdown_table(["held-out tenth", "lr", "start_variance", "AURC t2i", "AURC i2t"], rows))


if __name__ == "__main__":
    main()
