"""What the benchmarks share: times that a noisy machine does not spoil, peak memory, rate of its matrix products."""

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from utils.device import pick_precision


def seconds(call, repeats=7, warm_up=2):
    """Wall time of a call. Returns: (median, minimum, maximum) over the repeats, in seconds."""
    times = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    times = times[warm_up:]
    return statistics.median(times), min(times), max(times)


def in_turn(calls, repeats=7, warm_up=1):
    """Wall times of several calls made in turn, so that a machine that slows down slows all of them.

    Returns: {name: (median, min, max)}.
    """
    times = {name: [] for name in calls}
    for i in range(warm_up + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in times.items()}


def matmul_rate(dtype, size=2048):
    """FLOP/s of a square matrix product in this dtype on the CPU, the best of several."""
    a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ a)[1]


def peak_memory(code):
    """Peak resident memory of Python code in a process of its own, in MB above that of one that has imported torch."""
    script = f"""
import re, torch
def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = memory("VmRSS")
{code}
print("peak:", memory("VmHWM") - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    return float(re.search(r"peak: ([\d.]+)", done.stdout)[1])


def markdown_table(header, rows):
    """A markdown table: header, strings; rows, lists of strings."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def describe():
    """One line about the machine and the versions."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    rates = {
        name: matmul_rate(dtype) / 1e9
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    products = ", ".join(f"{name} products at {rate:.0f} GFLOP/s" for name, rate in rates.items())
    cpu, threads = model[1] if model else "unknown CPU", torch.get_num_threads()
    is_native = pick_precision("auto", torch.device("cpu")) == torch.bfloat16
    native = f"bfloat16 {'native' if is_native else 'not native'}"
    held_to = os.environ.get("ONEDNN_MAX_CPU_ISA")
    native = f"held to {held_to}" if held_to else native
    return f"{cpu}, {threads} threads, {native}, torch {torch.__version__}, {products}"
