"""What surrounds the matrix products, each as a ratio to what it cannot do without, beside the limit that it must keep.

    python -m tests.benchmarks.limits

On a data set of COCO's sizes, drawn at random, in a temporary folder; a quarter of an hour on two cores. Both sides of
a ratio are measured in turn, and the median of the ratios is shown: a machine that slows down slows both.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import models.asymvlm.adaptor
from datasets.embedding import EmbeddingCache
from datasets.write import write_split
from tests.benchmarks.machine import describe, markdown_table, peak_memory
from tests.benchmarks.train_step import make_step
from utils.checkpoint import checkpoint_path, load_adaptor
from utils.evaluation.ranking import TILE, rank_queries
from utils.evaluation.scorers import AdaptorScorer, FrozenScorer

ROOT, METHOD, DIM, SEEDS = Path(__file__).resolve().parents[2], "asymvlm-psd", 512, ("0", "1", "2")
TEST, TRAIN, SMALL = (5_000, 25_000), (118_287, 591_753), (5_000, 25_000)  # images, captions
LATENT = 64  # dimensions in which images differ
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SCRIPTS = ("train.py", "eval.py", "cache_embeddings.py")


def draw_split(folder, images, captions, seed=0):
    """Write a split of so many images and captions, (N, 512) float16; the longer a caption, the nearer its image.

    Both lie in the same LATENT dimensions, but for the captions' noise, so that a short training suffices.
    """
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn(images, LATENT, generator=rng) @ torch.eye(LATENT, DIM)
    owner = torch.arange(captions) * images // captions
    words = torch.randint(5, 25, (captions,), generator=rng)
    noise = torch.randn(captions, LATENT, generator=rng) @ torch.eye(LATENT, DIM)
    text = (
        words[:, None] / 25 * image[owner] + noise + 0.1 * torch.randn(captions, DIM, generator=rng)
    )
    texts = [f"caption {row}" + " word" * count for row, count in enumerate(words.tolist())]
    names = [f"{row:012d}.jpg" for row in range(images)]
    write_split(
        Path(folder),
        image.half(),
        text.half(),
        owner.tolist(),
        texts,
        names,
        None,
        {"logit_scale": 100.0},
    )


def run(*command):
    """Run Python with this command line, silently. Returns: its wall time in seconds."""
    start, quiet = time.perf_counter(), subprocess.DEVNULL
    subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=quiet,
        stderr=quiet,
        env=ENVIRONMENT,
        check=True,
    )
    return time.perf_counter() - start


def clock(call):
    """The wall time of a call, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(ours, bound, repeats=5):
    """Two functions that return seconds, called in turn. Returns: their medians, and that of their ratios."""
    pairs = [(ours(), bound()) for _ in range(repeats + 1)][1:]
    return *map(statistics.median, zip(*pairs, strict=True)), statistics.median(
        a / b for a, b in pairs
    )


def evaluations():
    """Whole processes: the paper's protocol, and three seeds of all methods."""
    plain = (
        "-m",
        "tests.benchmarks.plain_evaluation",
        "embeddings/test/val",
        checkpoint_path("test", 0, METHOD),
    )
    ours = (ROOT / "eval.py", "--dataset", "test", "--method", METHOD)
    times = ratio(lambda: run(*ours), lambda: run(*plain), 3)
    yield "`eval.py --method asymvlm-psd`, 5,000 x 25,000", "a plain script", *times, 0.6
    draw_split("embeddings/test/train", *SMALL, seed=1)  # for reference-entropy
    seconds = run(ROOT / "eval.py", "--dataset", "test", "--method", "all", "--seed", *SEEDS)
    yield (
        f"the same of six methods x {len(SEEDS)} seeds",
        "three minutes",
        seconds,
        180,
        seconds / 180,
        1.0,
    )


@torch.inference_mode()
def rankings():
    """Both directions ranked, and the products that takes."""
    cache = EmbeddingCache("test", "val")
    scorers = {"frozen cosine": FrozenScorer(cache)}
    scorers[METHOD] = AdaptorScorer(load_adaptor(checkpoint_path("test", 0, METHOD)), cache)
    owner, (images, captions) = cache.image_of_caption.numpy(), TEST
    x, y, width = torch.randn(images, DIM), torch.randn(captions, DIM), TILE * captions // images
    products = lambda: [a @ b.T for a in x.split(TILE) for b in y.split(width)]  # noqa: E731
    for name, scorer in scorers.items():
        ours = lambda scorer=scorer: clock(lambda: rank_queries(scorer.score, owner, images))  # noqa: E731
        yield (
            f"ranking 5,000 x 25,000, {name}",
            "its matrix products",
            *ratio(ours, lambda: clock(products), 9),
            1.6,
        )


def openings():
    """A cache of COCO's train split opened, from the system's file cache, and its bytes read into fresh memory."""
    draw_split("embeddings/coco/train", *TRAIN)
    files = [*Path("embeddings/coco/train").iterdir()]
    ours = lambda: clock(lambda: EmbeddingCache("coco", "train"))  # noqa: E731
    read = lambda: clock(lambda: [file.read_bytes() for file in files])  # noqa: E731
    yield (
        "a cache of 118,287 images, 591,753 captions opened",
        "its bytes read to fresh memory",
        *ratio(ours, read),
        1.5,
    )
    size = sum(TRAIN) * DIM * 2 / 2**20
    code = "import os, sys; sys.path.insert(0, os.environ['ROOT']); from datasets.embedding import EmbeddingCache\n"
    with mock.patch.dict(os.environ, ROOT=str(ROOT)):
        peak = peak_memory(
            f"{code}cache = EmbeddingCache('coco', 'train'); cache.image.read(), cache.text.read()"
        )
    yield "its peak memory, MB", "its embeddings", peak, size, peak / size, 1.3


def starts():
    """The scripts' --help, and a process that imports torch."""
    bare = lambda: run("-c", "import torch")  # noqa: E731
    for script in SCRIPTS:
        times = ratio(partial(run, ROOT / script, "--help"), bare)
        yield f"`{script} --help`", "`import torch`", *times, 1.5


def plain_cross_entropies(logits):
    target = torch.arange(len(logits))
    rows = torch.nn.functional.cross_entropy(logits, target)
    return (rows + torch.nn.functional.cross_entropy(logits.T, target)) / 2


def steps():
    """A training step, and one whose loss is two calls of F.cross_entropy."""
    for method in ("asymvlm-psd", "asymvlm-vmf"):
        step = make_step(method, 2048, DIM)

        def before(step=step):
            with mock.patch.object(
                models.asymvlm.adaptor, "symmetric_cross_entropy", plain_cross_entropies
            ):
                step()

        times = ratio(lambda: clock(step), lambda: clock(before), 15)  # noqa: B023
        yield f"a training step of {method}, B = 2048", "with F.cross_entropy twice", *times, 1.0


def main():
    print(describe(), "\n", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        draw_split("embeddings/test/val", *TEST)
        train = (
            ROOT / "train.py",
            "--recipe",
            "demo",
            "--epochs",
            2,
            "--method",
            "all",
            "--seed",
            *SEEDS,
        )
        draw_split("embeddings/small/train", *SMALL, seed=1)
        run(*train, "--dataset", "small")
        Path("checkpoints/small").rename("checkpoints/test")
        for of in (evaluations, openings, rankings, starts, steps):
            for what, beside, ours, bound, found, limit in of():
                verdict = f"{found:.2f}" if found <= limit else f"**{found:.2f}**"
                rows.append([what, f"{ours:.3g}", f"{beside}: {bound:.3g}", verdict, f"{limit:g}"])
                print(*rows[-1], file=sys.stderr, flush=True)
    print(
        markdown_table(
            ["in seconds, where nothing else is said", "ours", "beside", "ratio", "at most"], rows
        )
    )


if __name__ == "__main__":
    sys.exit(main())
