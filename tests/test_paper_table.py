"""The paper's table as markdown, CSV and LaTeX."""

import csv

import numpy as np
import pytest

from tests.test_tables import results_of
from utils.evaluation import paper_table
from utils.evaluation.scorers import Row


def test_the_papers_table_has_means_of_both_directions_in_three_forms():
    results = {**results_of(Row("asymvlm-psd")), **results_of(Row("pcmepp"))}
    for number, runs in enumerate(results.values()):
        for run in runs:
            run.content["metrics"]["t2i"]["R@1"] += number / 10
    files = paper_table.texts(results)
    assert list(files) == ["paper.md", "paper.csv", "paper.tex"]
    values = [run.content["metrics"]["t2i"]["R@1"] for run in results[Row("pcmepp")]]
    cell = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    assert f"**{cell}**" in files["paper.md"].splitlines()[3]
    assert files["paper.md"].splitlines()[2].startswith("| AsymVLM (PSD) |")
    assert f"$\\mathbf{{{cell.replace('±', chr(92) + 'pm')}}}$" in files["paper.tex"]
    assert files["paper.tex"].count("\\\\") == 4  # two lines of titles, two methods
    rows = list(csv.DictReader(files["paper.csv"].splitlines()))
    assert len(rows) == 2 * 2 * 5
    mean = next(
        row["mean"]
        for row in rows
        if (row["method"], row["direction"], row["metric"]) == ("pcmepp", "t2i", "R@1")
    )
    assert float(mean) == pytest.approx(np.mean(values))


def test_the_papers_table_begins_with_the_frozen_clip_and_parts_trained_heads():
    results = {**results_of(Row("frozen cosine")), **results_of(Row("pfe"))}
    for run in results[Row("frozen cosine")]:
        for direction in ("t2i", "i2t"):
            run.content["metrics"][direction] = {"R@1": 0.25}
    files = paper_table.texts(results)
    assert files["paper.md"].splitlines()[2].startswith("| frozen cosine | - | - | - | 0.250")
    lines = files["paper.tex"].splitlines()
    frozen, middle, pfe = [
        number for number, line in enumerate(lines) if line.startswith(("frozen", "\\mid", "PFE"))
    ][1:]
    assert middle == frozen + 1 == pfe - 1
