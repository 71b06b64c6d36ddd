"""No script loads a package that its run does not need: what takes a second is loaded by those that use it."""

import subprocess
import sys
from pathlib import Path

import pytest

from models import METHODS
from models.base import SMALL
from tests.conftest import make_cache
from utils.checkpoint import save_adaptor

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    "matplotlib",
    "open_clip",
    "PIL",
    "pyarrow",
    "pycocotools",
    "scipy",
    "torchvision",
    "webdataset",
}
TRAIN = (
    "train.py",
    "--dataset",
    "tiny",
    "--recipe",
    "small",
    "--epochs",
    "1",
    "--validation",
    "0.2",
    "--overwrite",
)
EVAL = ("eval.py", "--dataset", "tiny", "--resamples", "10", "--uncer_levels", "4")


def loaded(script, *flags):
    """The heavy packages that a script loads."""
    command = [sys.executable, "-X", "importtime", str(ROOT / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 100
    return HEAVY & {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("train.py", "--help"), set()),
        (("eval.py", "--help"), set()),
        (("cache_embeddings.py", "--help"), {"PIL", "pycocotools"}),
        (TRAIN, set()),
        ((*EVAL, "--no-plots"), {"scipy"}),
        (EVAL, {"scipy", "matplotlib", "PIL"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_script_loads_what_its_run_needs(workdir, command, expected):
    make_cache("tiny")
    save_adaptor(
        METHODS["asymvlm-psd"](64),
        "asymvlm-psd",
        SMALL,
        {},
        Path("checkpoints/tiny/0/asymvlm-psd.pt"),
    )
    assert loaded(*command) == expected
