"""Weak scaling: one and two ranks of one thread each, with as many pairs a rank; and, calculated, what large runs take.

    COCO_ROOT=<a COCO folder> python -m tests.benchmarks.scaling

A rank encodes its share of the batch and computes the loss of all of it: what grows with the ranks is the loss and the
exchange.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from datasets.images import decode_file
from models import GROUPS, METHODS
from tests.benchmarks.caching import MODEL, make_pictures
from tests.benchmarks.machine import describe, markdown_table, seconds
from tests.benchmarks.train_step import GPU_FLOPS, GPU_SHARE, gpu_seconds, profile_step
from utils.device import pick_device, pick_precision
from utils.distributed import is_first, joined, share_of_rank, world_size

SHARE, DIM, STEPS = 512, 512, 15  # pairs a rank; width; steps that are timed
CORES = 16  # of the machine in the calculation, that decode for its GPU
DATA_SETS = {
    "COCO": (118_287, 591_753),
    "CC3M": (3_318_333,) * 2,
    "CC12M": (12_423_374,) * 2,
    "LAION-400M": (413_871_335,) * 2,
}  # as published


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


def flops_a_row():
    """FLOPs of encoding an image and a text with a ViT-B/32."""
    import open_clip

    model = open_clip.create_model(MODEL, pretrained=None)
    counts = []
    for encode, row in (
        (model.encode_image, torch.randn(1, 3, 224, 224)),
        (model.encode_text, torch.ones(1, 77, dtype=torch.int64)),
    ):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            encode(row)
        counts.append(counter.get_total_flops())
    return counts


def decoding_rate():
    """Pictures of 640 x 480 that one core decodes and resizes in a second."""
    import open_clip

    with tempfile.TemporaryDirectory() as folder:
        files = make_pictures(Path(folder), 64)
        transform = open_clip.image_transform(224, is_train=False)
        return 64 / seconds(lambda: [decode_file(path, transform) for path in files], repeats=3)[0]


def large_runs(decoded):
    """Rows of the table: what data sets should take on one H100 beside CORES cores, which decode so many a second."""
    image, text = flops_a_row()
    _, operations, passes = profile_step("asymvlm-psd", 2048)
    step = gpu_seconds("asymvlm-psd", 2048, DIM, operations, passes)
    rows = []
    for name, (images, captions) in DATA_SETS.items():
        encoding = (images * image + captions * text) / (GPU_FLOPS * GPU_SHARE)
        decoding = images / (decoded * CORES)
        size = (images + captions) * DIM * 2
        epoch = captions / 2048 * step
        rows.append(
            [
                name,
                f"{images:,}",
                f"{captions:,}",
                f"{encoding / 3600:.2g}",
                f"{decoding / 3600:.2g}",
                f"{size / 1e9:.1f}",
                f"{epoch / 60:.2g}",
            ]
        )
    return rows


def main():
    random.seed(0)
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
    decoded = decoding_rate()
    gpu = f"one H100 at {GPU_SHARE:.0%} of {GPU_FLOPS / 1e12:.0f} TFLOP/s"
    print(f"\nCalculated, not measured: {gpu}, ViT-B/32, {CORES} cores that decode")
    print(
        f"{decoded:.0f} pictures of 640 x 480 a second each, as one core was measured to do here. N GPUs with as many"
    )
    print(
        "cores each take 1/N of the hours of caching, of which the larger of the two columns counts.\n"
    )
    header = [
        "",
        "images",
        "captions",
        "encoding, h",
        "decoding, h",
        "embeddings, GB",
        "minutes an epoch of asymvlm-psd",
    ]
    print(markdown_table(header, large_runs(decoded)))


if __name__ == "__main__":
    rank() if sys.argv[1:] == ["rank"] else main()
