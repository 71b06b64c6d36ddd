"""Results: names of their files, what is saved and loaded, and what may be compared."""

import json
from pathlib import Path

import numpy as np
import pytest

from utils.cli import UserError
from utils.evaluation.results import (
    Results,
    check_same_queries,
    load_results,
    parse_row,
    result_files,
    row_name,
    threshold_file,
)
from utils.evaluation.scorers import FROZEN, OWN, PUBLISHED, Row

CONFIG = {"dataset": "tiny", "split": "val", "cache": "abc", "seed": 0, "checkpoint": None}


def answers_of(queries=40, seed=0):
    """Answers of both directions to so many queries."""
    rng = np.random.default_rng(seed)
    answers = {}
    for direction in ("t2i", "i2t"):
        answers[direction] = {
            "query": np.arange(queries),
            "top1": rng.integers(queries, size=queries),
            "rank": rng.integers(1, 4, size=queries),
            "uncertainty": rng.random(queries),
        }
    return answers


@pytest.mark.parametrize(
    ("name", "score", "row"),
    [
        ("pfe", PUBLISHED, Row("pfe")),
        ("pfe", OWN, Row("pfe", OWN)),
        ("pfe.frozen", OWN, Row("pfe", FROZEN)),
        ("softmax-entropy", OWN, Row("softmax-entropy")),
        ("asymvlm-psd.own", PUBLISHED, Row("asymvlm-psd", OWN)),
    ],
)
def test_a_name_says_its_method_and_its_score(name, score, row):
    assert parse_row(name, score) == row
    assert parse_row(row_name(row)) == row


def test_files_of_trained_heads_have_a_seed_and_others_have_none():
    folder = Path("results/tiny")
    document, table = result_files(folder, Row("pfe", OWN), 3)
    assert document == folder / "3/pfe.own.json"
    assert table == folder / "3/pfe.own.npz"
    assert threshold_file(folder, Row("pfe"), 3) == folder / "3/pfe.threshold.json"
    assert result_files(folder, Row("margin"), 3)[0] == folder / "baselines/margin.json"


def test_what_is_saved_is_loaded(workdir):
    folder = Path("results/tiny")
    results = Results.of(answers_of(), 4).bootstrap(4, 10)
    results.content["config"] = {**CONFIG, "method": "pfe", "score": FROZEN}
    results.save(folder)
    (loaded,) = load_results(folder, Row("pfe", FROZEN), [0], "val")
    for direction, answered in results.answers.items():
        for name, values in answered.items():
            np.testing.assert_array_equal(loaded.answers[direction][name], values)
    assert loaded.content["metrics"] == results.content["metrics"]
    assert loaded.content["t2i"] == results.content["t2i"]
    assert loaded.is_uncertain and loaded.has_uncertain_texts
    with pytest.raises(UserError, match=r"pfe\.npz: no such results.*--method pfe --seed 0"):
        load_results(folder, Row("pfe"), [0], "val")
    with pytest.raises(UserError, match="results of the split val, not of test"):
        load_results(folder, Row("pfe", FROZEN), [0], "test")


def test_results_without_an_uncertainty_are_refused(workdir):
    folder = Path("results/tiny")
    results = Results.of(answers_of(), 4)
    results.content["config"] = {**CONFIG, "method": "pfe"}
    results.save(folder)
    answers = answers_of()
    del answers["i2t"]["uncertainty"]
    Results(answers, json.loads((folder / "0/pfe.json").read_text())).save(folder)
    with pytest.raises(UserError, match="one entry per query"):
        load_results(folder, Row("pfe"), [0], "val")


def test_only_the_same_queries_of_one_cache_are_compared():
    def run(queries, cache):
        return Results(answers_of(queries), {"config": {"cache": cache}})

    same = {Row("pfe"): [run(9, "a"), run(9, "a")], Row("prolip"): [run(9, "a")]}
    assert check_same_queries(same, "--compare") == (9, 9)
    with pytest.raises(UserError, match=r"--compare: .*different caches \(a, b\)"):
        check_same_queries({Row("pfe"): [run(9, "a")], Row("prolip"): [run(9, "b")]}, "--compare")
    with pytest.raises(UserError, match="different queries"):
        check_same_queries({Row("pfe"): [run(9, "a")], Row("prolip"): [run(8, "a")]}, "--compare")
