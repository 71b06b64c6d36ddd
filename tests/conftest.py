"""What the tests share: a working folder of their own, small caches, the scripts called in process, COCO where it is at hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.embedding import write_split, write_texts
from utils.cli import run

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def script(workdir, capsys):
    """Calls a script's main as its command line does: script(main, "--flag", value, ...) -> (exit status, stdout, last line of stderr)."""

    def call(main, *arguments):
        capsys.readouterr()
        status = run(main, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, (captured.err.splitlines() or [""])[-1]

    return call


@pytest.fixture(scope="session")
def coco_root():
    """The folder of a COCO subset, from COCO_ROOT."""
    root = os.environ.get("COCO_ROOT")
    if not root:
        pytest.skip("COCO_ROOT is not set: no COCO files to test with")
    path = Path(root) if Path(root).is_absolute() else REPOSITORY / root
    if not (path / "annotations").is_dir():
        pytest.skip(f"COCO_ROOT={root} has no annotations folder")
    return path


def make_cache(name, images=40, captions_per_image=3, dim=64, seed=0, splits=("train", "val"), **changes):
    """A small cache with some signal in it, under ./embeddings/<name>.

    Images lie in a quarter of the dimensions; a caption is its image's embedding with noise of its own size in all of them, and of the
    same norm: how noisy it is shows in its direction.
    """
    rng = np.random.default_rng(seed)
    for split in splits:
        z = rng.normal(size=(images, dim // 4)) @ np.eye(dim // 4, dim)
        image_of_caption = rng.permutation(np.repeat(np.arange(images), captions_per_image))
        noise = rng.uniform(0.05, 1.0, size=(len(image_of_caption), 1))
        text = z[image_of_caption] + noise * rng.normal(size=(len(image_of_caption), dim))
        text *= np.sqrt(dim) / np.linalg.norm(text, axis=1, keepdims=True)
        content = {
            "image": torch.tensor(z, dtype=torch.float16),
            "text": torch.tensor(text, dtype=torch.float16),
            "image_of_caption": image_of_caption.tolist(),
            "captions": [f"caption {i}" + " word" * (i % 5) for i in range(len(text))],
            "images": [f"{i:04d}.png" for i in range(images)],
            "relevance": None,
            "meta": {"model": "none", "pretrained": "none"},
        }
        write_split(Path("embeddings") / name / split, **(content | changes))
    ladder = torch.tensor(rng.normal(size=(3, dim)), dtype=torch.float16)
    write_texts(name, "ladder", ladder, ["a photo", "a photo of a cat", "a photo of a black cat"], {})


def load_result(name, seed, method):
    """The JSON of a result and its npz as a dict of arrays."""
    path = Path("results") / name / str(seed) / method
    return json.loads(path.with_suffix(".json").read_text()), dict(np.load(path.with_suffix(".npz")))
