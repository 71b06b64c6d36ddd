"""Tables: names of rows, cells, what is bold, and their text."""

import numpy as np
import pytest

from tests.test_results import answers_of
from utils.evaluation import tables
from utils.evaluation.figures import Figure
from utils.evaluation.results import Results
from utils.evaluation.scorers import FROZEN, OWN, PUBLISHED, Row


def results_of(row, needs="training", seeds=2):
    runs = [Results.of(answers_of(seed=seed), 4) for seed in range(seeds)]
    for run in runs:
        run.needs = needs
    return {row: runs}


def test_a_score_is_named_where_rows_differ_in_it():
    both = {**results_of(Row("probvlm")), **results_of(Row("probvlm", FROZEN))}
    assert list(tables.labels_of(both).values()) == ["probvlm", "probvlm, frozen score"]
    entropy = results_of(Row("softmax-entropy"), needs="gallery")
    alone = {**entropy, **results_of(Row("probvlm", OWN))}
    assert list(tables.labels_of(alone).values()) == ["softmax-entropy", "probvlm"]
    assert tables.row_label(Row("pfe", OWN)) == "pfe, own score"
    assert (
        tables.row_label(Row("pfe", OWN), OWN) == tables.row_label(Row("pfe", PUBLISHED)) == "pfe"
    )


def test_numbers_say_what_is_undefined_and_what_does_not_apply():
    assert tables.number(0.6131, 0.0044) == "0.613 ± 0.004"
    assert tables.number(0.6131) == "0.613"
    assert tables.number(None) == "-"
    assert tables.number(np.nan) == "-"


@pytest.mark.parametrize(("more_is_better", "best"), [(True, {"b", "c"}), (False, {"a"})])
def test_the_best_is_by_the_printed_mean(more_is_better, best):
    figure = Figure("x", more_is_better, (), None)
    cells = {"a": (0.1, None), "b": (0.3001, None), "c": (0.2999, None), "d": (None, None)}
    assert {name for name in cells if tables.is_best(figure, name, cells)} == best


def test_many_rows_that_share_the_best_value_and_a_best_of_nothing_are_not_bold():
    figure = Figure("x", True, (), None)
    many = dict.fromkeys("abcd", (0.4, None)) | {"e": (0.1, None)}
    assert not any(tables.is_best(figure, name, many) for name in many)
    del many["d"]
    assert [name for name in many if tables.is_best(figure, name, many)] == ["a", "b", "c"]
    nothing = {"a": (0.0, None), "b": (0.0, None)}
    assert not any(tables.is_best(figure, name, nothing) for name in nothing)


def test_training_free_rows_are_a_block_of_their_own():
    rows = [["entropy", "1", "gallery"], ["pfe", "2", "training"], ["length", "3", "-"]]
    titles = [row[0] for row in tables._in_blocks(rows)]
    assert titles == ["*without training*", "entropy", "length", "*trained heads*", "pfe"]
    assert tables._in_blocks(rows[1:2]) == rows[1:2]


def test_a_table_has_means_over_seeds_and_leaves_out_what_no_row_has():
    results = results_of(Row("pfe"))
    table = {f.name: cells for f, cells in tables.tables_of(results)[tables.COMPARED[0]].items()}
    values = [run.content["metrics"]["t2i"]["AURC"] for run in results[Row("pfe")]]
    assert table["AURC"][Row("pfe")] == (np.mean(values), np.std(values, ddof=1))
    assert "ties" not in table
    assert "ambiguity" not in {section.key for section in tables.tables_of(results)}


def test_text_and_markdown_are_aligned():
    text = tables.text_table(["", "long title"], [["a", "1"], ["bcd", "22"]])
    assert text.splitlines() == [
        "     long title",
        "---  ----------",
        "a             1",
        "bcd          22",
    ]
    markdown = tables.markdown_table([["x", "y | z", "w"], ["a", "1", "b"]], words=1)
    assert markdown == "| x | y | z | w |\n|---|---:|---|\n| a | 1 | b |\n"
