"""Which recipe a method is best trained by on a small cache, chosen on a tenth of its train images, held out.

    python -m tests.benchmarks.recipes                   # of the built-in data set, one seed; half an hour on two cores
    python -m tests.benchmarks.recipes --dataset mine --method prolip --seed 0 1 2

Every method has the same grid, of learning rates and, where variances can be started, of starts; the same epochs and
batch size, those of `small`; and the same seeds. The best has the smallest mean of AURC in both directions.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train
from datasets.embedding import EmbeddingCache
from datasets.rows import BUFFER
from models import GROUPS, METHODS
from models.base import SMALL
from tests.benchmarks.machine import markdown_table
from utils.device import pick_precision
from utils.evaluation.scorers import AdaptorScorer
from utils.evaluation.tables import number
from utils.evaluation.validation import retrieval
from utils.run import Run

RATES = (3e-4, 1e-3, 3e-3)
STARTS = (None, 1.0)
HELD_OUT = 10  # one image of so many


def grid(method):
    """The recipes that are tried for a method."""
    starts = STARTS if METHODS[method].recipes["small"].start_variance is not None else (None,)
    return [replace(SMALL, lr=rate, start_variance=start) for rate in RATES for start in starts]


def trained(method, recipe, cache, seed, held_out=None):
    """An adaptor, trained as train.py does; with a HeldOut, of the epoch that did best on it."""
    config = {"seed": seed, "captions": len(cache.text)} | ({"keep": "best"} if held_out else {})
    with tempfile.TemporaryDirectory() as folder:
        with Run(Path(folder, f"{method}.pt"), recipe, config, save_every=recipe.epochs) as run:
            train.train(run, cache, None, pick_precision("auto", cache.device), BUFFER, held_out)
    return run.adaptor.eval()


def mean_and_deviation(values):
    """Figures of several seeds as text: "0.613 ± 0.004"."""
    return number(np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--method", nargs="+", default=list(GROUPS["all"]))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    whole, rows = EmbeddingCache(args.dataset, "train"), []
    is_held = torch.arange(len(whole.image)) % HELD_OUT == 0
    cache, held_out = whole.of_images(~is_held), whole.of_images(is_held)
    for method in args.method:
        tried = {}
        for recipe in grid(method):
            adaptors = [trained(method, recipe, cache, seed) for seed in args.seed]
            found = [retrieval(AdaptorScorer(adaptor, held_out), held_out) for adaptor in adaptors]
            tried[recipe] = [
                [figures[direction]["AURC"] for figures in found] for direction in ("t2i", "i2t")
            ]
        best = min(tried, key=lambda recipe: np.mean(tried[recipe]))
        for recipe, directions in tried.items():
            mark = "**" if recipe == best else ""
            cells = [
                f"{recipe.lr:g}",
                str(recipe.start_variance),
                *map(mean_and_deviation, directions),
            ]
            rows.append([f"{mark}{method}{mark}", *cells])
    print(markdown_table(["held-out tenth", "lr", "start_variance", "AURC t2i", "AURC i2t"], rows))


if __name__ == "__main__":
    main()
