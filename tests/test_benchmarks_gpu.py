"""tests/benchmarks/gpu.py and calculated.py: on the CPU with small sizes, and what they count."""

import os
import subprocess
import sys

import pytest
import torch

from models import GROUPS
from tests.benchmarks import calculated, gpu
from tests.benchmarks.train_step import necessary_flops
from tests.conftest import REPOSITORY

EVERY_SECTION = (
    "bfloat16 products",
    "a cache in fp32",
    "asymvlm-psd, differences of R@1 and AURC",
    "trainings in fp32 with and without CUDA graphs",
    "images per second of cache_embeddings.py",
    "texts per second of cache_embeddings.py",
    *(f"{method}, a step" for method in GROUPS["all"]),
    "asymvlm-psd, an epoch of 100 captions",
    "`eval.py --method asymvlm-psd`, 20 x 100",
    "`eval.py --method pfe --score own`, 20 x 100",
)


def cells_of(printed):
    """The rows of a markdown table, lists of cells, without the line below the header."""
    lines = printed.splitlines()
    rows = [line.strip("|").split(" | ") for line in [lines[0], *lines[2:]]]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_command_prints_a_row_for_everything_and_says_that_it_ran_on_a_cpu():
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    header, *rows = cells_of(done.stdout)
    assert "CPU" in header[0] and "small sizes" in header[0] and torch.__version__ in header[0]
    assert header[1:] == ["measured", "beside it", "calculated"]
    assert all(len(row) == 4 for row in rows)
    assert "error" not in done.stdout
    measured = {row[0]: row[1] for row in rows}
    for section in EVERY_SECTION:
        assert any(section in what for what in measured), section
    # The same command on the same device gives the same numbers.
    assert measured["trainings in fp32 with and without CUDA graphs give equal weights"].startswith(
        "yes"
    )
    for method in ("asymvlm-psd", "pfe"):
        differences = measured[f"{method}, differences of R@1 and AURC"]
        assert differences == "the CPU's heads: 0.0000, 0.0000; trained in fp32: 0.0000, 0.0000"


def test_a_section_that_fails_is_a_row_and_the_others_go_on(monkeypatch, capsys):
    def broken(setup):
        yield "what worked", "1", "", ""
        raise ValueError("this failed\nfor a reason")

    monkeypatch.setattr(gpu, "SECTIONS", (broken, gpu.card))
    assert gpu.main(["--device", "cpu"]) == 1
    rows = cells_of(capsys.readouterr().out)
    assert rows[1] == ["what worked", "1", "", ""]
    assert rows[2][:2] == ["broken", "error: ValueError: this failed"]
    assert rows[3][0].startswith("bfloat16 products")


@pytest.mark.parametrize("method", GROUPS["all"])
def test_a_step_is_counted_without_synchronisation_and_with_its_necessary_products(method):
    counts = calculated.step_counts(method, batch=256, embed_dim=128)
    assert counts.flops == necessary_flops(method, 256, 128)
    assert counts.synchronisations == 0
    assert 50 < counts.launches < 500
    assert counts.bytes > 4 * 256 * 128


def test_a_count_has_launches_products_bytes_and_waits_but_no_views():
    x = torch.ones(8, 4)
    product = calculated.count(lambda: x.T @ x)
    assert (product.launches, product.flops) == (1, 2 * 4 * 8 * 4)
    assert product.bytes == 4 * (32 + 32 + 16)
    assert calculated.count(lambda: x.sum().item()).synchronisations == 1
    assert calculated.count(lambda: torch.empty(8).view(2, 4)).launches == 0
    assert calculated.stored_bytes(torch.ones(1, 4).expand(8, 4)) == 16
