"""Do the intervals, the p-values and the guarantee hold what they promise? Simulated worlds tell.

    python -m tests.benchmarks.coverage > results/benchmarks/coverage.md

In every world the truth is known. 150 images are asked, which are easier or harder. A seed of a
method is better or worse than the method: its share of right answers has a standard deviation of
`spread`. The truth is the share over all images and seeds.

The guarantee is tried in worlds where no threshold is good: every answer is wrong with a
probability that is a little larger than the risk. Each threshold that is found breaks the promise.
"""

import argparse
import sys

import numpy as np

from tests.benchmarks.machine import markdown_table
from utils.evaluation import metrics
from utils.evaluation.bootstrap import Estimate, resample
from utils.evaluation.selective import choose_threshold

IMAGES = 150
SHARE_RIGHT = 0.5
RESAMPLES = 200
SPREADS = (0.0, 0.03, 0.1)  # of seeds; images alone give a standard deviation of about 0.04
SEEDS = (1, 2, 3, 5)
RISK = 0.2
CONFIDENCE = 0.95
CALIBRATION = 500  # queries


def draw_seeds(rng, difficulty, seeds, spread):
    """Which answers of each seed are right: (seeds, images), bool."""
    ability = SHARE_RIGHT + spread * rng.standard_normal((seeds, 1))
    own_noise = 0.1 * rng.standard_normal((seeds, len(difficulty)))
    return np.mod(difficulty + own_noise, 1.0) < ability


def estimate(right):
    """The Estimate of R@1 of some seeds, (S, images)."""
    images = np.arange(right.shape[1])

    def measure(weight):
        return {seed: metrics.mean(answers, weight) for seed, answers in enumerate(right)}

    draws = resample(measure, images, RESAMPLES)
    return Estimate.over_seeds(right.mean(axis=1), [draws[seed] for seed in range(len(right))])


def coverage(seeds, spread, worlds):
    """The share of worlds in which the interval contains the truth."""
    covered = 0
    for world in range(worlds):
        rng = np.random.default_rng([0, seeds, world])
        right = draw_seeds(rng, rng.random(IMAGES), seeds, spread)
        low, high = estimate(right).interval()
        covered += low <= SHARE_RIGHT <= high
    return covered / worlds


def false_positives(seeds, spread, worlds):
    """The share of worlds in which two equal methods differ, by interval and by p-value."""
    by_interval = 0
    by_p_value = 0
    for world in range(worlds):
        rng = np.random.default_rng([1, seeds, world])
        difficulty = rng.random(IMAGES)
        first = estimate(draw_seeds(rng, difficulty, seeds, spread))
        second = estimate(draw_seeds(rng, difficulty, seeds, spread))
        difference = first - second
        low, high = difference.interval()
        by_interval += not low <= 0 <= high
        by_p_value += difference.p_value() < 0.05
    return by_interval / worlds, by_p_value / worlds


def broken_promises(rows, worlds, margin=1e-6):
    """The share of worlds where the row of largest coverage was promised what it does not keep.

    Args:
        rows: how many rows there are to choose from; of one row, it is the guarantee itself.
        margin: how much more often answers are wrong than the risk allows.
    """
    broken = 0
    for world in range(worlds):
        rng = np.random.default_rng([2, rows, world])
        for _ in range(rows):
            uncertainty = rng.random(CALIBRATION)
            is_wrong = rng.random(CALIBRATION) < RISK + margin
            if choose_threshold(uncertainty, is_wrong, RISK, CONFIDENCE) is not None:
                broken += 1
                break
    return broken / worlds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=2000, help="per cell (default: 2000)")
    args = parser.parse_args(argv)
    lines = [["seeds", "spread of seeds", "covered", "false positives", "p < 0.05"]]
    for spread in SPREADS:
        for seeds in SEEDS:
            if seeds == 1 and spread > 0:
                continue  # one seed says nothing of others, and does not claim to
            covered = coverage(seeds, spread, args.worlds)
            by_interval, by_p_value = false_positives(seeds, spread, args.worlds)
            shares = [f"{value:.1%}" for value in (covered, by_interval, by_p_value)]
            lines.append([str(seeds), f"{spread:g}", *shares])
    print(markdown_table(lines[0], lines[1:]) + "\n")
    lines = [["guarantee at 95 %, rows to choose from", "guarantee violated"]]
    for rows in (1, 3, 16):
        lines.append([str(rows), f"{broken_promises(rows, args.worlds):.1%}"])
    print(markdown_table(lines[0], lines[1:]) + "\n")
    print(f"{args.worlds:,} worlds per cell.")


if __name__ == "__main__":
    sys.exit(main())
