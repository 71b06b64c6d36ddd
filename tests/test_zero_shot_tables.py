"""Tables of zero-shot classification: means over seeds, what is left out, and missing values."""

import csv
import io

import numpy as np

from utils.questions.zero_shot_tables import COLUMNS, comma_separated, markdown

DRAWS = np.linspace(0.4, 0.6, 41)


def metrics(accuracy):
    """Metrics of one seed, of a method without an uncertainty by class; and their resamples."""
    measured = {name: 0.25 for name in COLUMNS if "class" not in name}
    measured["top-1"] = accuracy
    return measured, {"top-1": DRAWS}


RESULTS = {
    ("frozen CLIP", None): {("uniform", "unit"): metrics(0.5)},
    ("pfe", 0): {("uniform", "unit"): metrics(0.4), ("top 1", "probit"): metrics(0.3)},
    ("pfe", 1): {("uniform", "unit"): metrics(0.6), ("top 1", "probit"): metrics(0.5)},
}


def test_a_table_has_means_over_seeds_and_a_dash_for_what_a_method_lacks():
    header, _, *lines = markdown(RESULTS, "classes").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    assert cells[0] == ["classes", "weighting", "score", *COLUMNS]
    assert [line[:3] for line in cells[1:]] == [
        ["frozen CLIP", "uniform", "unit"],
        ["pfe", "uniform", "unit"],
        ["pfe", "top 1", "probit"],
    ]
    frozen, pfe, _ = cells[1:]
    assert frozen[3].startswith("0.500 [0.4")  # one seed: the bootstrap's interval alone
    assert pfe[3].startswith("0.500 ± 0.141 [")
    assert pfe[3 + COLUMNS.index("AURC by class")] == "-"


def test_the_short_table_leaves_out_what_the_long_one_has():
    long, short = (markdown(RESULTS, "classes", is_short=short) for short in (False, True))
    assert "probit" in long and "probit" not in short
    assert "| frozen CLIP | uniform | unit |" in short


def test_the_csv_has_a_line_per_metric_with_the_ends_of_its_interval():
    header, *rows = csv.reader(io.StringIO(comma_separated(RESULTS)))
    lines = [dict(zip(header, row, strict=True)) for row in rows]
    assert not [line for line in lines if "class" in line["metric"]]  # undefined
    (accuracy,) = [
        line for line in lines if (line["method"], line["metric"]) == ("frozen CLIP", "top-1")
    ]
    assert float(accuracy["mean"]) == 0.5 and accuracy["std"] == ""
    low, high = np.quantile(DRAWS, [0.025, 0.975])
    assert (float(accuracy["low"]), float(accuracy["high"])) == (low, high)
    assert {line["low"] for line in lines if line["metric"] != "top-1"} == {""}
