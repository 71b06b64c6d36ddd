"""How much data a head needs: methods on parts of the built-in data set's train images, judged on all val images.

    python -m tests.benchmarks.data_size > results/benchmarks/data_size.md
    cp results/benchmarks/data_size.png assets/
    python -m tests.benchmarks.data_size --method prolip --seed 0     # a part of it; what was measured before is kept

All sizes see as many pairs, those of five epochs of all images: of a hundredth of the images, in a hundred times as
many epochs. A tenth of each part is held out, and the epoch of the least AURC on it is kept, as by train.py
--validation 0.1 --keep best. `reference-entropy` needs no training: the entropy of a caption's softmax over the images
of the part. What is measured goes to results/benchmarks/data_size.json and is not measured again. An hour on two cores.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

from datasets.embedding import EmbeddingCache
from models import METHODS
from tests.benchmarks.machine import markdown_table
from tests.benchmarks.recipes import mean_and_deviation, trained
from utils.device import pick_precision
from utils.evaluation.plots import STYLE, looks_of, plt
from utils.evaluation.scorers import AdaptorScorer, FrozenScorer
from utils.evaluation.training_free import Reference, ReferenceEntropy
from utils.evaluation.validation import HeldOut, retrieval
from utils.files import save_json

matplotlib.use("Agg")
REFERENCE = "reference-entropy"
ROWS = ("asymvlm-psd", "asymvlm-psd-frozen", "asymvlm-psd-anchored", "probvlm", "prolip", REFERENCE)
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
FIGURES = ("R@1", "AURC")
MEASURED = Path("results/benchmarks/data_size.json")


def part_of(cache, share, seed):
    """The part of a cache that is of so large a share of its images; a smaller share's is in a larger one's."""
    images = len(cache.image)
    is_chosen = torch.zeros(images, dtype=torch.bool)
    is_chosen[
        torch.randperm(images, generator=torch.Generator().manual_seed(seed))[
            : round(share * images)
        ]
    ] = True
    return cache.of_images(is_chosen)


def measure(name, part, val, seed, epochs):
    """What a row of the table finds on val after that part: {"R@1", "AURC"} of text-to-image."""
    if name == REFERENCE:
        with torch.inference_mode():
            return retrieval(ReferenceEntropy(FrozenScorer(val), Reference(part)), val)["t2i"]
    cache, held_out = part.hold_out(0.1, seed)
    recipe = replace(METHODS[name].recipes["small"], epochs=epochs)
    adaptor = trained(
        name, recipe, cache, seed, HeldOut(held_out, pick_precision("auto", cache.device))
    )
    return retrieval(AdaptorScorer(adaptor, val), val)["t2i"]


def draw(found, sizes, path):
    """A panel a figure: found {(row, share): [{figure: value}, one a seed]} against sizes {share: images}."""
    with plt.rc_context(STYLE):
        picture, panels = plt.subplots(1, len(FIGURES), figsize=(7.2, 3.2), layout="constrained")
        for panel, figure in zip(panels, FIGURES, strict=True):
            for name in ROWS:
                shares = [share for share in sizes if (name, share) in found]
                values = [[run[figure] for run in found[name, share]] for share in shares]
                mean, deviation = (np.array([f(v) for v in values]) for f in (np.mean, np.std))
                images = [sizes[share] for share in shares]
                (line,) = panel.plot(images, mean, label=name, **looks_of(ROWS)[name])
                panel.fill_between(
                    images, mean - deviation, mean + deviation, alpha=0.15, color=line.get_color()
                )
            panel.set(xscale="log", xlabel="train images", ylabel=f"{figure}, text-to-image")
            panel.set_xticks([*sizes.values()], [f"{size:,}" for size in sizes.values()])
            panel.minorticks_off()
        picture.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=3,
            frameon=False,
        )
        picture.savefig(path, dpi=150, metadata={"Software": None})
        plt.close(picture)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--method", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--share", nargs="+", type=float, default=SHARES)
    parser.add_argument("--epochs", type=int, default=5, help="on all images")
    args = parser.parse_args()
    cache, val = (EmbeddingCache(args.dataset, split) for split in ("train", "val"))
    runs = f"{args.dataset} {cache.digest} epochs {args.epochs}"
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    for seed in args.seed:
        for share in args.share:
            part = part_of(cache, share, seed)
            for name in args.method:
                key = f"{runs}: {name}, share {share:g}, seed {seed}"
                if key not in measured:
                    measured[key] = measure(name, part, val, seed, round(args.epochs / share))
                    save_json(measured, MEASURED, indent=1)
    found, sizes = {}, {share: round(share * len(cache.image)) for share in SHARES}
    for key, figures in measured.items():
        if key.startswith(f"{runs}: "):
            name, share, _ = key.removeprefix(f"{runs}: ").split(", ")
            found.setdefault((name, float(share.split()[1])), []).append(figures)
    draw(found, sizes, MEASURED.with_suffix(".png"))
    for figure in FIGURES:
        rows = []
        for name in ROWS:
            cells = [[run[figure] for run in found.get((name, share), ())] for share in SHARES]
            rows.append(
                [name, *(mean_and_deviation(values) if values else "-" for values in cells)]
            )
        print(
            markdown_table(
                [f"{figure} t2i by train images", *(f"{size:,}" for size in sizes.values())], rows
            ),
            "\n",
        )


if __name__ == "__main__":
    main()
