"""Seconds and memory of an evaluation of both directions, at 1x, 2x and 4x the pairs, beside the full matrix.

    python -m tests.benchmarks.evaluation

Random embeddings; asymvlm-psd, but the memory is that of the method that takes the most. "Ours" is what eval.py does:
encoding, both directions, all figures. The textbook holds the full matrix in float32 and sorts it both ways. Memory is
above the interpreter and the loaded embeddings.
"""

import sys
from types import SimpleNamespace

import torch

from models import GROUPS, METHODS
from tests.benchmarks import plain_evaluation
from tests.benchmarks.machine import describe, in_turn, markdown_table, peak_memory
from utils.evaluation.results import evaluate
from utils.evaluation.scorers import AdaptorScorer

METHOD, DIM = "asymvlm-psd", 512


def random_cache(images, captions, dim=DIM):
    """What evaluate needs of an EmbeddingCache, with random embeddings."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.randn(rows, dim, generator=generator).half() for rows in (images, captions)
    )
    owner = torch.arange(captions)[torch.randperm(captions, generator=generator)] % images
    known = {"image": image, "text": text, "image_of_caption": owner, "device": torch.device("cpu")}
    return SimpleNamespace(**known, judgements={}, captions=None, meta={})


def ours(cache, method=METHOD):
    """eval.py's evaluation."""
    torch.manual_seed(0)
    return evaluate(AdaptorScorer(METHODS[method](DIM).eval(), cache), cache, 10)


def textbook(cache):
    """The full matrix in float32, sorted for the best ten both ways."""
    torch.manual_seed(0)
    weights = METHODS[METHOD](DIM).state_dict()
    return plain_evaluation.evaluate(weights, cache.image, cache.text, cache.image_of_caption)


def memory(function, images, captions, *arguments):
    """Peak MB above the embeddings."""
    code = "from tests.benchmarks import evaluation\n"
    code += f"cache = evaluation.random_cache({images}, {captions})\nbefore = memory('VmRSS')\n"
    return peak_memory(f"{code}evaluation.{function}(cache, *{arguments!r})")


def main(repeats=3):
    print(describe(), "\n")
    rows = []
    for images in (1250, 2500, 5000):
        captions = 5 * images
        cache = random_cache(images, captions)
        times = in_turn({"ours": lambda: ours(cache), "textbook": lambda: textbook(cache)}, repeats)  # noqa: B023  called at once
        median, low, high = times["ours"]
        largest = [(method, memory("ours", images, captions, method)) for method in GROUPS["all"]]
        rows.append(
            [
                f"{images} x {captions}",
                f"{median:.2f} ({low:.2f}-{high:.2f})",
                "{1:.0f} ({0})".format(*max(largest, key=lambda pair: pair[1])),
                f"{times['textbook'][0]:.2f}",
                f"{memory('textbook', images, captions):.0f}",
                f"{times['textbook'][0] / median:.1f}",
            ]
        )
    print(
        markdown_table(
            [
                "images x captions",
                "seconds: median (range)",
                "peak MB of the largest method",
                "textbook, s",
                "textbook, MB",
                "times as fast",
            ],
            rows,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
