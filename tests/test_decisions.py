"""Thresholds as a user meets them: the table of an evaluation, the file, and --prompts, which keeps or asks back."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_script
from models import METHODS
from models.base import SMALL
from tests.conftest import load_result, make_cache
from utils.checkpoint import save_adaptor
from utils.cli import run_script
from utils.evaluation.selective import choose_threshold, load_threshold, split_queries

EVAL = ("--dataset", "tiny", "--no-plots", "--resamples", 0)
FILE = Path("results/tiny/0/pfe.threshold.json")


@pytest.fixture
def trained(script):
    """A cache of enough images to choose a threshold, and a checkpoint of any weights."""
    torch.manual_seed(0)
    make_cache("tiny", images=90)
    save_adaptor(METHODS["pfe"](64), "pfe", SMALL, {}, Path("checkpoints/tiny/0/pfe.pt"))


def cells(table):
    """{(row, column): cell} of a table in markdown."""
    header, _, *rows = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]] for line in table.splitlines()
    ]
    return {(row[0], name): cell for row in rows for name, cell in zip(header, row, strict=True)}


def test_an_evaluation_writes_thresholds_and_what_they_keep(script, trained):
    at = ("--risk", 0.6, 0.9, "--risk-at", 1, "--confidence", 0.8)
    status, printed, _ = script(eval_script.main, *EVAL, "--method", "pfe", *at)
    assert status == 0
    arrays = load_result("tiny", 0, "pfe")[1]
    calibrated, others, _ = split_queries(arrays["t2i_image"])
    short = cells(Path("results/tiny/t2i.md").read_text())
    found = json.loads(FILE.read_text())
    assert found["confidence"] == 0.8
    assert [(one["risk"], one["k"]) for one in found["guarantees"]] == [(0.6, 1), (0.9, 1)]
    assert found["calibrated_on"]["captions"] == 45
    for one in found["guarantees"]:
        wrong, uncertainty = arrays["t2i_rank"] > 1, arrays["t2i_uncertainty"]
        expected = choose_threshold(uncertainty[calibrated], wrong[calibrated], one["risk"], 0.8)
        assert one["threshold"] == load_threshold(FILE, one["risk"]) == expected is not None
        kept = uncertainty[others] <= expected  # every image has as many captions
        assert one["coverage"] == pytest.approx(kept.mean())
        assert one["error"] == pytest.approx(wrong[others][kept].mean())
        assert short["pfe", f"coverage at {one['risk']}"] == f"{one['coverage']:.3f}"
    assert short["frozen cosine", "coverage at 0.6"] == "-"
    titles = Path("results/tiny/t2i.md").read_text().splitlines()[0].split(" | ")
    assert titles[1:4] == ["R@1", "AURC", "E-AURC"] and "S" not in titles
    assert " S | R2 | -S*R2 |" in Path("results/tiny/comparison.md").read_text()
    page = Path("results/tiny/README.md").read_text()
    assert Path("results/tiny/risk.md").read_text() in page
    assert "--risk 0.6 0.9 --confidence 0.8 --risk-at 1`" in page
    assert "coverage at 0.6" in printed
    rows = list(csv.reader(Path("results/tiny/comparison.csv").read_text().splitlines()))
    assert (
        len({(row[2], row[3]) for row in rows if row[7] == "threshold at 0.9"}) == 2 * 7
    )  # directions, rows with an uncertainty
    baseline = Path("results/tiny/baselines/margin.threshold.json")
    assert json.loads(baseline.read_text())["calibrated_on"]["method"] == "margin"


def test_prompts_are_kept_or_asked_back(script, trained, monkeypatch, capsys):
    z = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(eval_script, "encode_texts", lambda clip, texts: z)
    monkeypatch.setattr(
        eval_script,
        "clip_id",
        lambda name: type("", (), {"load": lambda s, d: None, "dtype": z.dtype})(),
    )
    ask = (
        "--dataset",
        "tiny",
        "--method",
        "pfe",
        "--prompts",
        "one",
        "two",
        "three",
        "--json",
        "--risk",
        0.6,
    )

    def decisions(*flags):
        assert run_script(eval_script.main, [str(part) for part in (*ask, *flags)]) == 0
        captured = capsys.readouterr()
        (rows,) = json.loads(captured.out).values()
        return {row["uncertainty"]: row.get("decision") for row in rows}, captured.err

    none, note = decisions()
    assert set(none.values()) == {None}
    assert str(FILE) in note
    assert script(eval_script.main, *EVAL, "--method", "pfe", "--risk", 0.6)[0] == 0
    content = json.loads(FILE.read_text())
    content["guarantees"][0]["threshold"] = middle = float(np.median(list(none)))
    FILE.write_text(json.dumps(content))
    found, _ = decisions()
    assert found == {u: "keep" if u <= middle else "ask back" for u in none}
    assert len(set(found.values())) == 2
    assert "--risk 0.5" in decisions("--risk", 0.5)[1]
    assert "--confidence 0.95, not 0.5" in decisions("--confidence", 0.5)[1]
    content["calibrated_on"]["checkpoint"] = "of another"
    FILE.write_text(json.dumps(content))
    again, note = decisions()
    assert set(again.values()) == {None}
    assert "another checkpoint" in note


@pytest.mark.parametrize(
    "flags",
    [
        ("--risk", 1.5),
        ("--risk", 0),
        ("--confidence", "sure"),
        ("--confidence", 0),
        ("--risk-at", 0),
    ],
)
def test_what_is_no_share_or_rank_is_one_line(script, trained, flags):
    status, _, error = script(eval_script.main, *EVAL, *flags)
    assert status == 2
    assert flags[0] in error
