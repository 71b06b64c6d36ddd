"""Check and measure everything on one GPU, in at most eight minutes: one markdown table.

    python -m tests.benchmarks.gpu > results/benchmarks/gpu.md

Columns: what; measured; what it is to be compared with; what calculated.py expects of an H100. A
section that fails becomes a row with its error, and the exit status is 1. Without a GPU everything
runs on the CPU with small sizes, to see that it works. Progress goes to stderr. No weights and no
images are needed: encoders are random, images drawn.
"""

import argparse
import contextlib
import functools
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

from datasets.registry import DATASETS
from datasets.source import UNIT, list_units
from datasets.units import UnitStore
from models import GROUPS
from tests.benchmarks import calculated
from tests.benchmarks.caching import make_pictures, some_texts
from tests.benchmarks.gpu_equality import equality
from tests.benchmarks.gpu_setup import CORES, ROOT, SMALL, Setup, Sizes, run_python
from tests.benchmarks.limits import draw_split
from tests.benchmarks.machine import markdown_table
from tests.benchmarks.train_step import (
    TEXTBOOK_BATCH,
    make_step,
    make_textbook_step,
    necessary_flops,
)
from utils.checkpoint import checkpoint_path
from utils.device import pick_device, pick_precision, precision_name
from utils.embed import CHUNK, STEP, chunk_size, embed_units, shortened, text_ends
from utils.preprocess import load_clip, tokenize
from utils.seed import seed_everything

MB = 2**20


# Card.


@functools.cache
def matrix_rate(setup):
    """FLOP/s of a square matrix product in bfloat16, the best of several."""
    a = torch.randn(setup.sizes.matrix, setup.sizes.matrix, device=setup.device).bfloat16()
    return 2 * len(a) ** 3 / min(setup.times(lambda: a @ a, calls=5, repeats=10))


def card(setup):
    """Rates of matrix products and memory, and the time of a launch."""
    rate = matrix_rate(setup) / 1e12
    expected = calculated.RATE[torch.bfloat16] / 1e12
    yield "bfloat16 products, TFLOP/s", f"{rate:.3g}", f"data sheet: {expected:.0f}", ""

    source = torch.zeros(setup.sizes.copied, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    copying = min(setup.times(lambda: target.copy_(source)))
    moved = 2 * len(source) / copying / 1e12  # It is read and written.
    expected = calculated.MEMORY / 1e12
    yield "memory, TB/s of a copy", f"{moved:.3g}", f"data sheet: {expected:.3g}", ""

    few = torch.zeros(16, device=setup.device)
    launch = setup.seconds(lambda: few.add_(1), calls=1000) * 1e6
    expected = calculated.LAUNCH * 1e6
    yield "a small operation, microseconds", f"{launch:.2f}", "", f"{expected:.0f}"


# Encoders.


def encoders(setup):
    """Images and texts per second of cache_embeddings.py, and of the encoder alone."""
    decoded = calculated.decoding_rate(setup.sizes.drawn)
    yield "images of 640 x 480 that a core decodes per second", f"{decoded:.0f}", "", ""
    handed_over = calculated.handover_rate(setup.sizes.handed_over)
    what = "images of 224 x 224 that the main process takes over per second"
    yield what, f"{handed_over:.0f}", "", ""
    texts = [f"{text} {n}" for n in range(4) for text in some_texts(setup.sizes.texts // 4)]
    for model, images in setup.sizes.encoders:
        expected = ""
        if not model.endswith(".json"):
            expected = f"{calculated.caching_rate(model, decoded, handed_over, CORES):.0f}"
        clip = random_clip(model, setup)
        yield from image_rows(setup, clip, draw_files(setup, images), expected)
        yield from text_rows(setup, clip, texts)


def random_clip(model, setup):
    """A CLIP of random weights, read from a file; that of shapes has its own."""
    import open_clip
    from safetensors.torch import save_file

    weights = DATASETS["shapes"].pretrained
    if not model.endswith(".json"):
        weights = Path(f"{model}.safetensors").absolute()
        save_file(open_clip.create_model(model, pretrained=None).state_dict(), weights)
    return load_clip(model, str(weights), setup.device, pick_precision("auto", setup.device))


def draw_files(setup, count):
    """The paths of so many JPEG files of 640 x 480; those beyond `sizes.drawn` are copies."""
    folder = Path("pictures")
    folder.mkdir(exist_ok=True)
    files = sorted(folder.glob("????.jpg")) or make_pictures(folder, setup.sizes.drawn)
    copies = []
    for number in range(count):
        copies.append(folder / f"copy-{number:05d}.jpg")
        shutil.copy(files[number % len(files)], copies[-1])
    return copies


def image_rows(setup, clip, files, expected):
    """Rows: images per second of cache_embeddings.py and of the encoder.

    Args: expected: of the first row, text.
    """

    def embed(some_files):
        store = UnitStore(Path("split"), {}, torch.float16)
        embed_units(list_units("image", some_files), clip, store, CHUNK, CORES)
        store.remove()

    embed(files[:CHUNK])
    setup.wait()
    start = time.perf_counter()
    embed(files)
    rate = len(files) / (time.perf_counter() - start)
    size = clip.info["image_size"][0]
    shape = (setup.sizes.large_batch, 3, size, size)
    ready = torch.randn(shape, device=setup.device, dtype=clip.dtype)
    bare = bare_rates(setup, clip.model.encode_image, ready)
    name = f"{name_of(clip)}, images per second"
    chunk = chunk_size(setup.device)
    beside = f"the encoder, {chunk} at a time: {bare[chunk]:.0f}"
    yield f"{name} of cache_embeddings.py", f"{rate:.0f}", beside, expected
    for rows, found in bare.items():
        shown = expected_rate(clip, "image", rows)
        yield f"{name} of the encoder, {rows} at a time", f"{found:.0f}", "", shown


def text_rows(setup, clip, texts):
    """Rows: texts per second of cache_embeddings.py, tokenizer included, and of the encoder."""

    def embed(some_texts):
        store = UnitStore(Path("split"), {}, torch.float16)
        embed_units(list_units("text", some_texts), clip, store, CHUNK, CORES)
        store.remove()

    embed(texts[:CHUNK])
    start = time.perf_counter()
    embed(texts)
    rate = len(texts) / (time.perf_counter() - start)
    tokens, _ = tokenize(clip.tokenizer, texts[:UNIT])
    mean = text_ends(clip.model, tokens).float().mean().item()
    length = math.ceil(mean / STEP) * STEP
    repeated = torch.arange(setup.sizes.large_batch) % len(tokens)
    ready = tokens[repeated, :length].to(setup.device)
    bare = bare_rates(setup, shortened(clip.model, length).encode_text, ready)
    name = f"{name_of(clip)}, texts per second"
    chunk = chunk_size(setup.device)
    beside = f"the encoder, {chunk} at a time: {bare[chunk]:.0f}"
    yield f"{name} of cache_embeddings.py, {mean:.1f} tokens", f"{rate:.0f}", beside, ""
    for rows, found in bare.items():
        what = f"{name} of the encoder, {rows} at a time, {length} tokens"
        yield what, f"{found:.0f}", "", expected_rate(clip, "text", rows, length)


def name_of(clip):
    """The model and its precision."""
    return f"{Path(clip.info['model']).name}, {precision_name(clip.dtype)}"


@torch.inference_mode()
def bare_rates(setup, encode, ready):
    """Rows per second of an encoder, {rows per call: rate}; the inputs are on the device."""
    rates = {}
    for rows in (chunk_size(setup.device), len(ready)):
        batch = ready[:rows]
        rates[rows] = rows / setup.seconds(lambda: encode(batch), calls=4, repeats=3)  # noqa: B023
    return rates


def expected_rate(clip, kind, rows, tokens=calculated.TOKENS):
    """The calculated rate of an encoder, text; empty for a model that is not of open_clip."""
    model = clip.info["model"]
    if model.endswith(".json"):
        return ""
    counts = calculated.encoder_counts(model, rows, tokens)[kind]
    return f"{rows / counts.seconds():.0f}"


# Training steps.


def steps(setup):
    """A step of every method beside the textbook's, with deterministic kernels as in train.py."""
    seed_everything(0)
    try:
        for method in GROUPS["all"]:
            for dim in setup.sizes.dims:
                yield from step_rows(setup, method, dim)
    finally:
        torch.use_deterministic_algorithms(False)


def step_rows(setup, method, dim):
    """Rows: time, share of the matrix rate, launches, synchronisations, peak memory of a step."""
    batch = setup.sizes.batch
    device = setup.device
    what = f"{method}, a step, B = {batch}, D = {dim}"
    expected = calculated.step_counts(method, batch, dim)
    taken, memory = time_and_memory(setup, make_step(method, batch, dim, "auto", device))
    step = make_step(method, batch, dim, "auto", device, use_graph=False)
    one_by_one, _ = time_and_memory(setup, step)
    launches, waits = launches_and_waits(setup, step)
    del step

    small = min(batch, TEXTBOOK_BATCH.get(method, batch))
    textbook = make_textbook_step(method, small, dim, device)
    textbook_taken, textbook_memory = time_and_memory(setup, textbook)
    del textbook
    beside = f"textbook: {1000 * textbook_taken:.2f}"
    if setup.is_gpu:
        beside = f"without a CUDA graph: {1000 * one_by_one:.2f}, {beside}"
    if small < batch:
        ours, _ = time_and_memory(setup, make_step(method, small, dim, "auto", device))
        beside = f"at B = {small}: {1000 * ours:.2f}, {beside}"
    seconds = expected.graph_seconds()
    yield f"{what}, ms", f"{1000 * taken:.2f}", beside, f"{1000 * seconds:.2f}"

    flops = necessary_flops(method, batch, dim)
    share = flops / taken / matrix_rate(setup)
    expected_share = flops / seconds / calculated.RATE[torch.bfloat16]
    yield f"{what}, share of the matrix rate", f"{share:.1%}", "", f"{expected_share:.1%}"
    yield f"{what}, launches", f"{launches}", "", f"{expected.launches}"
    yield f"{what}, synchronisations", f"{waits}", "0", f"{expected.synchronisations}"
    if setup.is_gpu:
        beside = f"textbook at B = {small}: {textbook_memory:.0f}"
        yield f"{what}, peak memory, MB", f"{memory:.0f}", beside, ""


def time_and_memory(setup, step):
    """Seconds of a step, and the peak memory of the GPU in MB, None on the CPU."""
    taken = setup.seconds(step, calls=setup.sizes.steps)
    if not setup.is_gpu:
        return taken, None
    torch.cuda.reset_peak_memory_stats(setup.device)
    step()
    setup.wait()
    return taken, torch.cuda.max_memory_allocated(setup.device) / MB


def launches_and_waits(setup, step):
    """How many kernels a step launches, and how often it waits for the device."""
    if not setup.is_gpu:
        counted = calculated.count(step)
        return counted.launches, counted.synchronisations
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        step()
        setup.wait()
    launches = sum(e.count for e in recorded.key_averages() if "LaunchKernel" in e.key)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return launches, sum("called a synchronizing" in str(warning.message) for warning in caught)


# An epoch, and an evaluation.


def epoch(setup):
    """Seconds per epoch of train.py on a cache of COCO's size."""
    images, captions = setup.sizes.coco
    draw_split("embeddings/coco/train", images, captions)
    methods = ("--method", *setup.sizes.trained_on_coco, "--epochs", 3, "--device", setup.device)
    run_python(ROOT / "train.py", "--dataset", "coco", *methods)
    for log in sorted(Path("checkpoints/coco/0").glob("*.jsonl")):
        records = [json.loads(line) for line in log.read_text().splitlines()]
        taken = statistics.median(record["seconds"] for record in records[-2:])
        expected = calculated.epoch_seconds(log.stem, captions)
        what = f"{log.stem}, an epoch of {captions:,} captions by train.py, s"
        yield what, f"{taken:.3f}", "", f"{expected:.3f}"


def evaluation(setup):
    """eval.py as a whole process beside a plain script; it needs the heads of `epoch`."""
    images, captions = setup.sizes.test
    draw_split("embeddings/coco/val", images, captions, seed=1)
    Path("embeddings/test").mkdir()  # the same without a train split
    Path("embeddings/test/val").symlink_to(Path("embeddings/coco/val").resolve())
    size = f"{images:,} x {captions:,}"
    flags = ("--trained-on", "coco", "--no-plots", "--device", setup.device)
    test = (ROOT / "eval.py", "--dataset", "test", *flags)
    psd = checkpoint_path("coco", 0, "asymvlm-psd")
    plain = ("-m", "tests.benchmarks.plain_evaluation", "embeddings/coco/val", psd)

    ours, _ = run_python(*test, "--method", "asymvlm-psd")
    beside = []
    for device in dict.fromkeys((str(setup.device), "cpu")):
        taken, _ = run_python(*plain, device)
        beside.append(f"a plain script, {device}: {taken:.1f}")
    expected = f"ranking: {calculated.ranking_counts(images, captions).seconds(torch.float32):.3f}"
    what = f"`eval.py --method asymvlm-psd`, {size}, s"
    yield what, f"{ours:.1f}", "; ".join(beside), expected

    taken, _ = run_python(*test, "--method", "pfe", "--score", "own")
    yield f"`eval.py --method pfe --score own`, {size}, s", f"{taken:.1f}", "", ""
    if setup.is_gpu:
        coco = ("--dataset", "coco", "--no-plots", "--device", str(setup.device))
        taken, peak = peak_of_evaluation(*coco)
        train_images = setup.sizes.coco[0]
        what = f"`eval.py`, {size}, with {train_images:,} images for reference-entropy"
        yield f"{what}, s", f"{taken:.1f}", "", ""
        yield f"{what}, peak memory, MB", f"{peak:.0f}", "", ""


def peak_of_evaluation(*flags):
    """Seconds of an eval.py with these flags, and the peak memory of the GPU in MB."""
    code = f"import torch, eval; eval.main({flags!r}); print(torch.cuda.max_memory_allocated())"
    taken, printed = run_python("-c", code)
    return taken, int(printed.split()[-1]) / MB


# The table.

SECTIONS = (card, equality, encoders, steps, epoch, evaluation)


def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def describe(setup):
    """The card, the cores and the version of torch."""
    name = f"the CPU, {CORES} cores, small sizes"
    if setup.is_gpu:
        name = f"{torch.cuda.get_device_name(setup.device)}, {CORES} cores"
    return f"{name}, torch {torch.__version__}"


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto")
    device = pick_device(parser.parse_args(argv).device)
    setup = Setup(device, Sizes() if device.type == "cuda" else SMALL)
    torch.manual_seed(0)
    status = 0
    print(markdown_table([describe(setup), "measured", "beside it", "calculated"], []), flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for section in SECTIONS:
            start = time.perf_counter()
            try:
                for row in section(setup):
                    print_row(*row)
                    print(*row, sep=" | ", file=sys.stderr, flush=True)
            except Exception as error:  # noqa: BLE001  the other sections go on
                traceback.print_exc()
                first_line = (str(error).splitlines() or [""])[0]
                print_row(section.__name__, f"error: {type(error).__name__}: {first_line}", "", "")
                status = 1
            taken = time.perf_counter() - start
            print(f"{section.__name__}: {taken:.0f} s", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
