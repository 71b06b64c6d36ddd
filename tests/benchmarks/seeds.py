"""Whether several seeds of a method are better trained in one pass, their weights stacked, or one after another.

    python -m tests.benchmarks.seeds

Stacked: torch.func's stacked modules under vmap, one optimiser for all. Seconds are of this machine, operations those
that a GPU would launch, and its milliseconds calculated as in calculated.py, not measured.
"""

import copy
import statistics
import sys

import torch
from torch.func import functional_call, stack_module_state, vmap

from models import METHODS
from tests.benchmarks.calculated import count
from tests.benchmarks.machine import describe, in_turn, markdown_table
from utils.device import autocast, pick_device, pick_precision
from utils.optimizer import make_optimizer

SEEDS, DIM, BATCHES = 4, 512, {"asymvlm-psd": (256, 2048), "prolip": (256, 1024)}


def make_steps(method, batch):
    """Two calls that do one step of every seed each, on random pairs: one by one, and stacked."""
    device = pick_device("cpu")
    dtype, heads, z = pick_precision("auto", device), [], torch.randn(2, SEEDS, batch, DIM)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        heads.append(METHODS[method](DIM))
    recipe = heads[0].recipes["small"]
    optimizers = [make_optimizer(head, recipe, 1000)[0] for head in heads]
    weights = {
        name: value.detach().clone().requires_grad_()
        for name, value in stack_module_state(heads)[0].items()
    }
    together = torch.optim.AdamW([*weights.values()], recipe.lr, weight_decay=recipe.weight_decay)
    skeleton = copy.deepcopy(heads[0]).to("meta")

    def one_by_one():
        for seed, (head, optimizer) in enumerate(zip(heads, optimizers, strict=True)):
            with autocast(device, dtype):
                loss = head(z[0, seed], z[1, seed])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def stacked():
        with autocast(device, dtype):
            losses = vmap(lambda *of: functional_call(skeleton, of[0], of[1:]))(weights, *z)
        together.zero_grad()
        losses.sum().backward()
        together.step()

    return {"one by one": one_by_one, "stacked": stacked}


def main():
    print(describe(), "\n", flush=True)
    rows = []
    for method, batches in BATCHES.items():
        for batch in batches:
            steps = make_steps(method, batch)
            times = {name: statistics.median(found) for name, found in in_turn(steps, 5).items()}
            counts = {name: count(step) for name, step in steps.items()}
            gpu = [f"{1000 * counted.seconds():.1f}" for counted in counts.values()]
            speed = f"{times['one by one'] / times['stacked']:.2f}"
            seconds = [f"{time:.3f}" for time in times.values()]
            rows.append(
                [
                    f"{SEEDS} x {method}, B = {batch}",
                    *seconds,
                    speed,
                    *(f"{counted.launches}" for counted in counts.values()),
                    *gpu,
                ]
            )
    header = [
        "a step of all",
        "one by one, s",
        "stacked, s",
        "times as fast",
        "operations",
        "stacked",
    ]
    print(markdown_table([*header, "H100, ms, calculated", "stacked"], rows))


if __name__ == "__main__":
    sys.exit(main())
