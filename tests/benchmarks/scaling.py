"""Weak scaling: one and two ranks of one thread each, with as many pairs a rank.

    python -m tests.benchmarks.scaling

A rank encodes its share of the batch and computes the loss of all of it: what grows with the ranks is the loss and the
exchange. What large runs should take is in calculated.py.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import torch

import train
from models import GROUPS, METHODS
from tests.benchmarks.machine import describe, markdown_table
from utils.device import pick_device, pick_precision
from utils.distributed import is_first, joined, share_of_rank, world_size

SHARE, DIM, STEPS = 512, 512, 15  # pairs a rank; width; steps that are timed


def rank():
    """What every rank does: time steps, and, if it is the first, print their seconds."""
    device = pick_device("cpu")
    times = {}
    with joined(device):
        for method in GROUPS["all"]:
            torch.manual_seed(0)
            adaptor = METHODS[method](DIM)
            optimizer, schedule = train.make_optimizer(adaptor, adaptor.recipes["paper"], 1000)
            batch = SHARE * world_size()
            pairs = [share_of_rank(z) for z in torch.randn(2, batch, DIM)]
            dtype, taken = pick_precision("auto", device), []
            for _ in range(STEPS + 3):
                start = time.perf_counter()
                train.step(adaptor, pairs, batch, optimizer, schedule, dtype)
                taken.append(time.perf_counter() - start)
            times[method] = statistics.median(taken[3:])
        if is_first():
            print(json.dumps(times))


def weak_scaling():
    """{ranks: {method: seconds a step}}"""
    times = {}
    for ranks in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            "-m",
            "tests.benchmarks.scaling",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        done = subprocess.run(
            [*command, "rank"], capture_output=True, text=True, check=True, env=environment
        )
        times[ranks] = json.loads(done.stdout.splitlines()[-1])
    return times


def main():
    torch.set_num_threads(1)
    print(describe(), "\n")
    times = weak_scaling()
    rows = []
    for method in GROUPS["all"]:
        one, two = times[1][method], times[2][method]
        rates = SHARE / one, 2 * SHARE / two
        rows.append(
            [
                method,
                f"{one:.3f}",
                f"{two:.3f}",
                f"{rates[0]:.0f}",
                f"{rates[1]:.0f}",
                f"{rates[1] / rates[0] / 2:.0%}",
            ]
        )
    header = [
        f"{SHARE} pairs a rank, one thread each",
        "1 rank, s",
        "2 ranks, s",
        "1 rank, pairs/s",
        "2 ranks, pairs/s",
        "efficiency",
    ]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    rank() if sys.argv[1:] == ["rank"] else main()
