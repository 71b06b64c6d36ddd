"""Seconds and memory of a training step of every method, beside the textbook's.

    python -m tests.benchmarks.train_step

A step is what train.py does: forward, backward, optimiser, schedule, with the method's own paper recipe. The share of the bound is the time that
the step's necessary matrix products would take at this machine's measured rate, over the time that the step takes.
"""

import torch
from tqdm import tqdm

import train
from models import METHODS
from tests.benchmarks.machine import describe, in_turn, markdown_table, matmul_rate, peak_memory
from tests.textbook import LOSSES, parameters
from utils.device import pick_device, pick_precision, precision_name

TEXTBOOK_BATCH = {"pcmepp": 1024, "prolip": 1024}  # their (B, B, D) tensors take 8.6 GB each at 2048


def make_step(method, batch, embed_dim, precision="auto"):
    """A call that does one full optimiser step on a batch of random embeddings, exactly as train.py does it. Returns: the loss, ()."""
    device = pick_device("auto")
    torch.manual_seed(0)
    adaptor = METHODS[method](embed_dim).to(device)
    optimizer, schedule = train.make_optimizer(adaptor, adaptor.recipes["paper"], 10_000)
    pairs = [torch.randn(batch, embed_dim, dtype=torch.float16).to(device) for _ in range(2)]
    bar, dtype = tqdm(disable=True), pick_precision(precision, device)
    return lambda: train.step(adaptor, pairs, optimizer, schedule, dtype, bar)


def make_textbook_step(method, batch, embed_dim):
    """The same with the textbook's float32 loss and a plain optimiser."""
    torch.manual_seed(0)
    adaptor = METHODS[method](embed_dim)
    recipe, weights = adaptor.recipes["paper"], parameters(adaptor)
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(weights.values(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.AdamW(weights.values(), recipe.lr, weight_decay=recipe.weight_decay)
    z_image, z_text = torch.randn(2, batch, embed_dim)

    def step():
        loss = LOSSES[method](weights, z_image, z_text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def necessary_flops(method, batch, embed_dim):
    """FLOPs of the matrix products that a step cannot do without: forward, and two products backward but for the first layers' inputs.

    Products of (B, D) by (D, B) of the pairwise terms: forward, and backward only towards what is trained.
    """
    weights = [p for p in METHODS[method](embed_dim).parameters() if p.ndim == 2]
    first = sum(p.numel() for p in weights if p.shape == (1024, embed_dim))  # no gradient towards the embeddings
    trunks = 2 * batch * (3 * sum(p.numel() for p in weights) - first)
    pair = 2 * batch * batch * embed_dim
    pairwise = {"asymvlm-psd": 2 * pair, "asymvlm-vmf": 2 * pair, "pcmepp": pair, "prolip": pair}  # means of pcmepp and prolip are frozen
    return trunks + pairwise.get(method, 0)


def main():
    device = pick_device("auto")
    dtype = pick_precision("auto", device)
    rate = matmul_rate(dtype)
    print(describe(), "\n")
    rows = []
    for method in METHODS:
        batch = TEXTBOOK_BATCH.get(method, 2048)
        slow = batch != 2048
        times = in_turn({"ours": make_step(method, batch, 512), "textbook": make_textbook_step(method, batch, 512)}, 3 if slow else 7)
        median, low, high = times["ours"]
        memory = {
            name: peak_memory(f"from tests.benchmarks import train_step\nstep = train_step.{make}({method!r}, {batch}, 512)\nstep(); step()")
            for name, make in (("ours", "make_step"), ("textbook", "make_textbook_step"))
        }
        rows.append(
            [
                f"{method}, B = {batch}",
                f"{median:.3f} ({low:.3f}-{high:.3f})",
                f"{memory['ours']:.0f}",
                f"{batch / median / 1000:.1f} k",
                f"{necessary_flops(method, batch, 512) / rate / median:.0%}",
                f"{times['textbook'][0]:.3f}",
                f"{memory['textbook']:.0f}",
                f"{times['textbook'][0] / median:.1f}",
            ]
        )
    header = ["step", "seconds: median (range)", "peak MB", "pairs/s", "share of bound", "textbook, s", "textbook, MB", "times as fast"]
    print(markdown_table([f"{header[0]} in {precision_name(dtype)}", *header[1:]], rows))


if __name__ == "__main__":
    main()
