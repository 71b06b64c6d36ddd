"""Whether a device computes what the CPU computes: caches, trained heads and metrics of gpu.py."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from datasets.shapes import world
from tests.benchmarks.gpu_setup import CORES, ROOT, run_python
from utils.checkpoint import checkpoint_path

LIMIT = 0.01  # of a difference in R@1 or AURC
SAME_HEADS = "the CPU's heads"  # the run that evaluates on the device what the CPU trained
AGAIN = "again"  # the run that trains on the device a second time, without CUDA graphs


def equality(setup):
    """Rows: caches, heads and metrics of the device beside those of the CPU, from one cache.

    Nothing is timed here, so what can run at the same time does.
    """
    train_images, val_images = setup.sizes.shapes
    world.make("data/shapes", train=train_images, val=val_images)
    caches = {"shapes": ("cpu", "fp32")}  # name: device, precision
    for precision in setup.sizes.caches:
        caches[f"shapes-{precision}"] = (setup.device, precision)
    all_at_once(cache_shapes, caches)
    for precision in setup.sizes.caches:
        name = f"shapes-{precision}"
        difference = max(relative_difference(name, kind) for kind in ("image", "text"))
        what = f"a cache in {precision}, largest relative difference of an embedding"
        yield what, f"{difference:.1e}", "the CPU in fp32", ""

    precisions = setup.sizes.trained_in
    trained = {"cpu": ("cpu", "fp32")}  # folder: device, precision, further flags
    for precision in precisions:
        trained[precision] = (setup.device, precision)
    trained[AGAIN] = (setup.device, precisions[-1], "--no-cuda-graph")
    all_at_once(partial(train_shapes, setup.sizes), trained)
    use_checkpoints(SAME_HEADS, "cpu")
    evaluated = {"cpu": ["cpu"], SAME_HEADS: [setup.device]}  # folder: device
    for precision in precisions:
        evaluated[precision] = [setup.device]
    all_at_once(partial(evaluate_shapes, setup.sizes), evaluated)

    methods = sorted(path.stem for path in Path("cpu/checkpoints/shapes/0").glob("*.pt"))
    beside = f"trained in fp32 and evaluated on the CPU; at most {LIMIT}"
    for method in methods:
        shown = [f"{SAME_HEADS}: {differences(SAME_HEADS, method)}"]
        for precision in precisions:
            shown.append(f"trained in {precision}: {differences(precision, method)}")
        yield f"{method}, differences of R@1 and AURC", "; ".join(shown), beside, ""
    what = f"trainings in {precisions[-1]} with and without CUDA graphs give equal weights"
    yield what, same_weights(methods, precisions[-1], AGAIN), "yes", ""


def all_at_once(function, runs):
    """Call function(name, *arguments) for all of {name: arguments} at the same time."""
    with ThreadPoolExecutor(len(runs)) as pool:
        calls = [pool.submit(function, name, *arguments) for name, arguments in runs.items()]
        for call in calls:
            call.result()


def cache_shapes(name, device, precision):
    """Embed shapes with its own CLIP, in float32 files, to embeddings/<name>."""
    flags = ("--name", name, "--device", device, "--precision", precision, "--dtype", "float32")
    run_python(ROOT / "cache_embeddings.py", "--dataset", "shapes", *flags)


def relative_difference(name, kind):
    """The largest |z - z'| / |z'| of the val rows of a cache and of the one made on the CPU."""
    file = f"val/{kind}.pt"
    z = torch.load(Path("embeddings") / name / file, weights_only=True)
    reference = torch.load(Path("embeddings/shapes") / file, weights_only=True)
    return ((z - reference).norm(dim=1) / reference.norm(dim=1)).max().item()


def train_shapes(sizes, folder, device, precision, *more_flags):
    """Train all methods in a folder of their own, which shares the cache of the CPU."""
    Path(folder).mkdir()
    Path(folder, "embeddings").symlink_to(Path("embeddings").resolve())
    flags = ("--recipe", "small", "--device", device, "--precision", precision)
    methods = ("--method", *sizes.methods)
    threads = max(1, CORES - 3) if device == "cpu" else 1
    flags = (*flags, *more_flags, *sizes.training)
    command = (ROOT / "train.py", "--dataset", "shapes", *methods, *flags)
    run_python(*command, folder=folder, threads=threads)


def use_checkpoints(folder, of):
    """Make a folder that shares the cache, and the checkpoints of another folder."""
    Path(folder).mkdir()
    for name in ("embeddings", "checkpoints"):
        Path(folder, name).symlink_to(Path(of, name).resolve())


def evaluate_shapes(sizes, folder, device):
    """Evaluate all methods in a folder."""
    flags = ("--resamples", "0", "--no-plots", "--device", device)
    methods = ("--method", *sizes.methods)
    command = (ROOT / "eval.py", "--dataset", "shapes", *methods, *flags)
    run_python(*command, folder=folder, threads=max(1, CORES // 4))


def differences(folder, method):
    """The differences of R@1 and AURC to those of the CPU; bold above the limit.

    Each is the larger one of both directions.
    """
    file = f"results/shapes/0/{method}.json"
    found = json.loads(Path(folder, file).read_text())["metrics"]
    reference = json.loads(Path("cpu", file).read_text())["metrics"]
    shown = []
    for name in ("R@1", "AURC"):
        largest = max(abs(found[way][name] - reference[way][name]) for way in ("t2i", "i2t"))
        shown.append(f"{largest:.4f}" if largest <= LIMIT else f"**{largest:.4f}**")
    return ", ".join(shown)


def same_weights(methods, folder, other_folder):
    """Whether two trainings gave all methods the same weights; if not, the largest differences."""
    differing = []
    for method in methods:
        file = checkpoint_path("shapes", 0, method)
        first = torch.load(Path(folder, file), weights_only=True)["state_dict"]
        second = torch.load(Path(other_folder, file), weights_only=True)["state_dict"]
        largest = max((first[key] - second[key]).abs().max().item() for key in first)
        if largest:
            differing.append(f"{method} (by {largest:.1e})")
    if differing:
        return f"no: {', '.join(differing)}"
    return f"yes, for each of {len(methods)} methods"
