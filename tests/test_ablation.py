"""The table of methods and variants: what eval.py finds, in one place."""

from pathlib import Path

import pytest

import eval as eval_script
import train as train_script
from tests.conftest import make_cache
from utils.evaluation import ablation

SEEDS = ("--seed", 0, 1)
METHODS = ("--method", "pfe", "asymvlm-psd")


@pytest.fixture
def evaluated(script):
    make_cache("tiny")
    training = ("--dataset", "tiny", "--recipe", "small", "--epochs", 2, "--batch-size", 50, *METHODS, *SEEDS)
    assert script(train_script.main, *training)[0] == 0
    evaluation = ("--dataset", "tiny", "--no-plots", "--resamples", 100, "--uncer_levels", 5, *METHODS, *SEEDS)
    assert script(eval_script.main, *evaluation)[0] == 0


def cells_of(markdown, column):
    """{row name: cell} of the tables of a markdown text that have this column."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    (header,) = (row for row in rows if column in row)
    below = rows[rows.index(header) + 2 :]
    ends = next((i for i, row in enumerate(below) if len(row) != len(header)), len(below))
    return {row[0]: row[header.index(column)].replace("**", "") for row in below[:ends]}


def test_every_cell_is_eval_pys_figure_and_interval(evaluated, script):
    status, printed, _ = script(
        ablation.main, "--dataset", "tiny", *METHODS, "caption-length", *SEEDS, "--resamples", 100
    )
    assert status == 0
    assert printed == Path("results/tiny/ablation.md").read_text()
    assert printed.startswith("| tiny/val, seeds 0, 1 | R@1 t2i | AURC t2i | R@1 i2t | AURC i2t |\n")
    details = Path("results/tiny/details.md").read_text()
    for direction, title in (("t2i", "text-to-image"), ("i2t", "image-to-text")):
        section = details[details.index(f"{title}, 95 % interval") :].split("\n\n")[0]
        for figure in ("R@1", "AURC"):
            found, expected = cells_of(printed, f"{figure} {direction}"), cells_of(section, figure)
            assert list(found) == ["pfe", "asymvlm-psd", "caption-length"]
            assert found == {name: expected[name] for name in found}
            assert all("[" in cell for cell in found.values())


def test_groups_are_spelt_out_and_the_best_is_bold(evaluated, script):
    status, printed, _ = script(ablation.main, "--dataset", "tiny", *METHODS, "--resamples", 0)
    assert status == 0
    for line in printed.splitlines()[2:]:
        assert "[" not in line
    assert printed.count("**") >= 8  # four columns, each with its best
    status, _, error = script(ablation.main, "--dataset", "tiny", "--method", "all", *SEEDS)
    assert status == 2
    assert "results/tiny/0/asymvlm-vmf.npz: no such results; make them with python eval.py --dataset tiny" in error
