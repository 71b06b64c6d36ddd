"""Whether a device computes what the CPU computes: caches, trained heads and metrics of gpu.py."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from datasets.shapes import world
from tests.benchmarks.gpu_setup import CORES, ROOT, run_python
from utils.checkpoint import checkpoint_path

LIMIT = 0.01  # of a difference in R@1 or AURC


def equality(setup):
    """Caches, heads and metrics of the device beside those of the CPU, from one cache."""
    sizes = setup.sizes
    train_images, val_images = sizes.shapes
    world.make("data/shapes", train=train_images, val=val_images)
    cache_shapes("shapes", "cpu", "fp32")
    for precision in sizes.caches:
        name = f"shapes-{precision}"
        cache_shapes(name, setup.device, precision)
        difference = max(relative_difference(name, kind) for kind in ("image", "text"))
        what = f"a cache in {precision}: largest difference of a row, relative"
        yield what, f"{difference:.1e}", "the CPU in fp32", ""

    runs = {"cpu": ("cpu", "fp32")}  # folder: device, precision
    for precision in sizes.trained_in:
        runs[precision] = (setup.device, precision)
    again = sizes.trained_in[-1]
    runs[f"{again} again"] = (setup.device, again)
    with ThreadPoolExecutor(len(runs)) as pool:  # Nothing is timed here.
        list(pool.map(lambda run: train_shapes(setup, run, *runs[run]), runs))
    use_checkpoints("cpu, evaluated on the device", "cpu")
    evaluated = {"cpu": "cpu", "cpu, evaluated on the device": setup.device}
    for precision in sizes.trained_in:
        evaluated[precision] = setup.device
    with ThreadPoolExecutor(len(evaluated)) as pool:
        list(pool.map(lambda run: evaluate_shapes(setup, run, evaluated[run]), evaluated))

    methods = sorted(path.stem for path in Path("cpu/checkpoints/shapes/0").glob("*.pt"))
    beside = f"trained and evaluated on the CPU, at most {LIMIT}"
    for run in [*evaluated][1:]:
        for method in methods:
            pair = (difference_of_metric(run, method, name) for name in ("R@1", "AURC"))
            shown = ", ".join(f"{x:.4f}" if x <= LIMIT else f"**{x:.4f}**" for x in pair)
            yield f"{method}, {run}: difference of R@1, of AURC", shown, beside, ""
    yield same_weights(methods, again)


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


def train_shapes(setup, folder, device, precision):
    """Train all methods in a folder of their own, which shares the cache of the CPU."""
    Path(folder).mkdir()
    Path(folder, "embeddings").symlink_to(Path("embeddings").resolve())
    flags = ("--recipe", "small", "--device", device, "--precision", precision)
    methods = ("--method", *setup.sizes.methods)
    threads = max(1, CORES - 3) if device == "cpu" else 1
    command = (ROOT / "train.py", "--dataset", "shapes", *methods, *flags, *setup.sizes.training)
    run_python(*command, folder=folder, threads=threads)


def use_checkpoints(folder, of):
    """Make a folder that shares the cache, and the checkpoints of another folder."""
    Path(folder).mkdir()
    for name in ("embeddings", "checkpoints"):
        Path(folder, name).symlink_to(Path(of, name).resolve())


def evaluate_shapes(setup, folder, device):
    """Evaluate all methods in a folder."""
    flags = ("--resamples", "0", "--no-plots", "--device", device)
    methods = ("--method", *setup.sizes.methods)
    command = (ROOT / "eval.py", "--dataset", "shapes", *methods, *flags)
    run_python(*command, folder=folder, threads=max(1, CORES // 4))


def difference_of_metric(folder, method, name):
    """The larger difference of a metric to that of the CPU, of both directions."""
    file = f"results/shapes/0/{method}.json"
    found = json.loads(Path(folder, file).read_text())["metrics"]
    reference = json.loads(Path("cpu", file).read_text())["metrics"]
    return max(abs(found[way][name] - reference[way][name]) for way in ("t2i", "i2t"))


def same_weights(methods, run):
    """A row: whether two trainings with the same seed on the device give the same weights."""
    differing = []
    for method in methods:
        file = checkpoint_path("shapes", 0, method)
        first = torch.load(Path(run, file), weights_only=True)["state_dict"]
        second = torch.load(Path(f"{run} again", file), weights_only=True)["state_dict"]
        largest = max((first[key] - second[key]).abs().max().item() for key in first)
        if largest:
            differing.append(f"{method} (differs by {largest:.1e})")
    answer = f"no: {', '.join(differing)}" if differing else f"yes, all {len(methods)} methods"
    return f"two trainings in {run} with one seed give equal weights", answer, "yes", ""
