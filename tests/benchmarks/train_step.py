"""Seconds and memory of a training step of every method, beside the textbook's.

    python -m tests.benchmarks.train_step
    python -m tests.benchmarks.train_step --precision fp32

A step is what train.py does: forward, backward, optimiser, schedule, with the method's own paper recipe. The share of
the bound is the time that its necessary matrix products would take at this machine's measured rate, over the time that
it takes. Then: where the time goes, on the CPU. What a GPU should take is in calculated.py.
"""

import argparse
import math
import re

import torch

import train
from models import GROUPS, METHODS
from tests.benchmarks.machine import describe, in_turn, markdown_table, matmul_rate, peak_memory
from tests.textbook import LOSSES, parameters
from utils.device import pick_device, pick_precision, precision_name

TEXTBOOK_BATCH = {
    "pcmepp": 1024,
    "prolip": 1024,
}  # their (B, B, D) tensors take 8.6 GB each at 2048


def make_step(method, batch, embed_dim, precision="auto", device="auto", use_graph=True):
    """A call that does one full optimiser step on random embeddings, as train.py does it, and returns the loss, ().

    Args:
        use_graph: on a GPU, by a CUDA graph.
    """
    device = pick_device(device)
    torch.manual_seed(0)
    with device:
        adaptor = METHODS[method](embed_dim)
    recipe = next(iter(adaptor.recipes.values()))  # the paper's, or its authors'
    optimizer, schedule = train.make_optimizer(adaptor, recipe, 10_000)
    pairs = [torch.randn(batch, embed_dim, dtype=torch.float16).to(device) for _ in range(2)]
    dtype = pick_precision(precision, device)
    graph = train.graph_of(adaptor, batch, dtype, use_graph)

    def step():
        loss, _ = train.step(adaptor, pairs, batch, optimizer, schedule, dtype, graph=graph)
        return loss

    return step


def make_textbook_step(method, batch, embed_dim, device="cpu"):
    """The same with the textbook's float32 loss and a plain optimiser."""
    device = pick_device(device)
    torch.manual_seed(0)
    adaptor = METHODS[method](embed_dim).to(device)
    recipe, weights = adaptor.recipes["paper"], parameters(adaptor)
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            weights.values(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(weights.values(), recipe.lr, weight_decay=recipe.weight_decay)
    z_image, z_text = torch.randn(2, batch, embed_dim, device=device)

    def step():
        loss = LOSSES[method](weights, z_image, z_text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def trunk_flops(method, batch, embed_dim):
    """FLOPs of a step's products with the weights: forward, and two backward but for the first layers' inputs."""
    weights = [p for p in METHODS[method](embed_dim).parameters() if p.ndim == 2]
    first = sum(
        p.numel() for p in weights if p.shape == (1024, embed_dim)
    )  # no gradient towards the embeddings
    return 2 * batch * (3 * sum(p.numel() for p in weights) - first)


def necessary_flops(method, batch, embed_dim):
    """FLOPs of the matrix products that a step cannot do without.

    Those with the weights, and (B, D) by (D, B) of the pairs, forward, and backward only towards what is trained.
    """
    pair = 2 * batch * batch * embed_dim
    pairwise = {
        "asymvlm-psd": 2 * pair,
        "asymvlm-vmf": 2 * pair,
        "pcmepp": pair,
        "prolip": pair,
    }  # means of pcmepp and prolip are frozen
    return trunk_flops(method, batch, embed_dim) + pairwise.get(method, 0)


# What the profiler names but no kernel computes: views, allocations, and names for several others.
NO_KERNEL = re.compile(
    r"aten::(_to_copy|to|as_strided|detach|diagonal|diagonal_backward|dropout|empty.*|expand.*|item|_local_scalar_dense|linear|log_sigmoid|logsumexp"
    r"|matmul|numpy_T|t|transpose|permute|real|res.*|select|squeeze|unsqueeze|view|zeros|zeros_like|ones_like)"
)


def profile_step(method, batch, embed_dim=512, steps=5, precision="auto"):
    """Where a step's time goes on the CPU: {kind: share of the time}, the largest first."""
    step = make_step(method, batch, embed_dim, precision)
    for _ in range(3):
        step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as recorded:
        for _ in range(steps):
            step()
    times = {}
    for event in recorded.key_averages(group_by_input_shape=True):
        if not event.key.startswith("aten::") or NO_KERNEL.fullmatch(event.key):
            continue
        elements = max(
            [
                math.prod(shape)
                for shape in event.input_shapes
                if shape and all(isinstance(n, int) for n in shape)
            ]
            or [0]
        )
        if event.key in ("aten::mm", "aten::addmm"):
            kind = "matrix products"
        elif "fused" in event.key:
            kind = "optimiser"
        elif event.key == "aten::copy_":
            kind = "conversion to bfloat16 and back"
        elif elements >= batch**2:
            kind = "passes over (B, B)"
        else:
            kind = "the rest"
        times[kind] = times.get(kind, 0) + event.self_cpu_time_total
    total = sum(times.values())
    by_time = sorted(times.items(), key=lambda item: -item[1])
    return {kind: time / total for kind, time in by_time}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="auto")
    precision, device = parser.parse_args().precision, pick_device("auto")
    dtype = pick_precision(precision, device)
    print(describe(), "\n")
    rows, rates = [], []
    for method in GROUPS["all"]:
        batch = TEXTBOOK_BATCH.get(method, 2048)
        slow = batch != 2048
        times = in_turn(
            {
                "ours": make_step(method, batch, 512, precision),
                "textbook": make_textbook_step(method, batch, 512),
            },
            3 if slow else 7,
        )
        median, low, high = times["ours"]
        rates.append(matmul_rate(dtype))
        memory = {
            name: peak_memory(
                "from tests.benchmarks import train_step\n"
                f"step = train_step.{make}({method!r}, {batch}, 512{more})\nstep(); step()"
            )
            for name, make, more in (
                ("ours", "make_step", f", {precision!r}"),
                ("textbook", "make_textbook_step", ""),
            )
        }
        rows.append(
            [
                f"{method}, B = {batch}",
                f"{median:.3f} ({low:.3f}-{high:.3f})",
                f"{memory['ours']:.0f}",
                f"{batch / median / 1000:.1f} k",
                necessary_flops(method, batch, 512) / median,
                f"{times['textbook'][0]:.3f}",
                f"{memory['textbook']:.0f}",
                f"{times['textbook'][0] / median:.1f}",
            ]
        )
    for row in rows:
        row[4] = (
            f"{row[4] / max(rates):.0%}"  # of the best rate, as others may be at work on the machine for a while
        )
    header = [
        "step",
        "seconds: median (range)",
        "peak MB",
        "pairs/s",
        "share of bound",
        "textbook, s",
        "textbook, MB",
        "times as fast",
    ]
    print(markdown_table([f"{header[0]} in {precision_name(dtype)}", *header[1:]], rows))
    if device.type != "cpu":
        return
    shares = {}
    for method in GROUPS["all"]:
        shares[method] = profile_step(method, 2048, precision=precision)
    kinds = dict.fromkeys(kind for share in shares.values() for kind in share)
    print("\nWhere the time of a step goes here, B = 2048:\n")
    print(
        markdown_table(
            ["", *shares],
            [[kind, *(f"{share.get(kind, 0):.0%}" for share in shares.values())] for kind in kinds],
        )
    )


if __name__ == "__main__":
    main()
