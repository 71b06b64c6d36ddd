"""Where gpu.py measures, how much, and how it runs the scripts."""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.benchmarks import calculated

ROOT = Path(__file__).resolve().parents[2]
CORES = os.cpu_count()


@dataclass(frozen=True)
class Sizes:
    """How much is measured: by default what fits into eight minutes of an H100."""

    matrix: int = 8192  # rows and columns of the square product
    copied: int = 2**31  # bytes of the copy
    shapes: tuple = (3000, 500)  # train and val images of the built-in data set
    methods: tuple = ("all", "variants")  # that are trained on it
    training: tuple = ()  # further flags of that training
    caches: tuple = ("fp32", "bf16", "fp16")  # precisions in which the device makes the cache
    trained_in: tuple = ("fp32", "bf16")  # and in which it trains
    encoders: tuple = (("ViT-B-32-quickgelu", 4096), ("ViT-L-14-quickgelu", 1024))  # with images
    drawn: int = 256  # different images; the others are copies
    handed_over: int = 16  # chunks of images that the main process takes over
    texts: int = 32768
    large_batch: int = 1024  # of an encoder, beside what cache_embeddings.py takes
    batch: int = 2048  # B of the training steps
    dims: tuple = (512, 1024)  # D of them
    steps: int = 20  # that are timed at once
    coco: tuple = calculated.COCO  # train images and captions
    trained_on_coco: tuple = ("all",)
    test: tuple = calculated.TEST  # images and captions of the evaluation


SMALL = Sizes(
    matrix=256,
    copied=2**20,
    shapes=(40, 20),
    methods=("asymvlm-psd", "pfe"),
    training=("--epochs", "1"),
    caches=("fp32",),
    trained_in=("fp32",),
    encoders=(("datasets/shapes/clip.json", 32),),
    drawn=8,
    handed_over=2,
    texts=32,
    large_batch=128,
    batch=64,
    dims=(64,),
    steps=2,
    coco=(20, 100),
    trained_on_coco=("asymvlm-psd", "pfe"),
    test=(20, 100),
)


@dataclass(frozen=True)
class Setup:
    """The device that is measured, and how much of it."""

    device: torch.device
    sizes: Sizes

    @property
    def is_gpu(self):
        return self.device.type == "cuda"

    def wait(self):
        """Wait until the device has done what was launched."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def times(self, call, calls=1, repeats=5):
        """Seconds of a call, a list: each is the mean of so many calls, waited for at the end."""
        call()
        call()
        taken = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            self.wait()
            taken.append((time.perf_counter() - start) / calls)
        return taken

    def seconds(self, call, calls=1, repeats=5):
        """The median of `times`."""
        return statistics.median(self.times(call, calls, repeats))


def run_python(*command, folder=".", threads=CORES):
    """Run Python with this command line in a folder. Returns: its seconds and its stdout.

    Raises: RuntimeError with the last line of stderr if it fails.
    """
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    search = os.pathsep.join([str(ROOT), *filter(None, paths)])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": str(threads)}
    command = [str(part) for part in command]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join(command)[:100]}: {last_line}")
    return time.perf_counter() - start, done.stdout
