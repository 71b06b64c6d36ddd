"""bfloat16 against float32 on the built-in data set: every method and seed, trained in both, on caches made in both.

    python -m tests.benchmarks.precision                 # everything, in a temporary folder; about an hour on two cores
    python -m tests.benchmarks.precision --seed 0 --method asymvlm-psd

A figure passes if the two means differ by less than the larger of the standard deviation over seeds and 0.01.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

import cache_embeddings
import eval as eval_script
import train
from datasets.shapes import world
from models import GROUPS
from tests.benchmarks.machine import markdown_table

FIGURES = {
    f"{figure} {direction}": (direction, figure)
    for figure in ("R@1", "AURC")
    for direction in ("t2i", "i2t")
}
FIGURES["spearman"] = ("ambiguity", "spearman")
ARMS = {
    "float32": ("fp32", "fp32"),
    "bfloat16 training": ("fp32", "bf16"),
    "bfloat16 cache": ("bf16", "fp32"),
}  # precision of cache, of training


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", nargs="+", default=list(GROUPS["all"]))
    parser.add_argument("--seed", nargs="+", default=["0", "1", "2"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        world.make(Path("data/shapes"))
        for cache in {cache for cache, _ in ARMS.values()}:
            cache_embeddings.main(["--dataset", "shapes", "--name", cache, "--precision", cache])
        figures = {}
        for arm, (cache, precision) in ARMS.items():
            names = ["--dataset", cache, "--method", *args.method, "--seed", *args.seed]
            train.main([*names, "--recipe", "small", "--precision", precision])
            with contextlib.redirect_stdout(sys.stderr):
                eval_script.main([*names, "--no-plots", "--resamples", "0"])
            for method in args.method:
                runs = [
                    json.loads(Path(f"results/{cache}/{seed}/{method}.json").read_text())["metrics"]
                    for seed in args.seed
                ]
                figures[arm, method] = {
                    name: [run[section][key] for run in runs]
                    for name, (section, key) in FIGURES.items()
                }
    rows = []
    for method in args.method:
        for arm in list(ARMS)[1:]:
            cells = []
            for name in FIGURES:
                reference, other = figures["float32", method][name], figures[arm, method][name]
                allowed = max(0.01, np.std(reference, ddof=1) if len(reference) > 1 else 0.0)
                difference = np.mean(other) - np.mean(reference)
                cells.append(
                    f"{difference:+.4f} {'<' if abs(difference) < allowed else 'NOT <'} {allowed:.3f}"
                )
            rows.append([f"{method}, {arm}", *cells])
    print(markdown_table(["against float32", *FIGURES], rows))


if __name__ == "__main__":
    main()
