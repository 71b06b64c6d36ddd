"""The table of many methods: what eval.py finds, in one place; and which leads survive, in worlds where it is known."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import eval as eval_script
import train as train_script
from models.pfe.adaptor import PFEAdaptor
from tests.conftest import make_cache
from utils.evaluation.results import Results
from utils.questions import compare

SEEDS = ("--seed", 0, 1)
METHODS = ("--method", "pfe", "asymvlm-psd")


@pytest.fixture
def evaluated(script):
    make_cache("tiny")
    training = (
        "--dataset",
        "tiny",
        "--recipe",
        "small",
        "--epochs",
        2,
        "--batch-size",
        50,
        *METHODS,
        *SEEDS,
    )
    assert script(train_script.main, *training)[0] == 0
    evaluation = (
        "--dataset",
        "tiny",
        "--no-plots",
        "--resamples",
        100,
        "--uncer_levels",
        5,
        *METHODS,
        *SEEDS,
    )
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
        compare.main, "--dataset", "tiny", *METHODS, "caption-length", *SEEDS, "--resamples", 100
    )
    assert status == 0
    assert printed == Path("results/tiny/ablation.md").read_text()
    assert printed.startswith(
        "| tiny/val, seeds 0, 1, small, 2 of 19 epochs "
        "| R@1 t2i | AURC t2i | R@1 i2t | AURC i2t |\n"
    )
    details = Path("results/tiny/details.md").read_text()
    for direction, title in (("t2i", "text-to-image"), ("i2t", "image-to-text")):
        section = details[details.index(f"{title}, small, 2 of 19 epochs, 95 % interval") :].split(
            "\n\n"
        )[0]
        for figure in ("R@1", "AURC"):
            found, expected = cells_of(printed, f"{figure} {direction}"), cells_of(section, figure)
            assert list(found) == ["pfe", "asymvlm-psd", "caption-length"]
            assert found == {name: expected[name] for name in found}
            assert all("[" in cell for cell in found.values())


def test_groups_are_spelt_out_and_the_best_is_bold(evaluated, script):
    status, printed, _ = script(compare.main, "--dataset", "tiny", *METHODS, "--resamples", 0)
    assert status == 0
    for line in printed.splitlines()[2:]:
        assert "[" not in line
    assert printed.count("**") >= 8  # four columns, each with its best
    status, _, error = script(compare.main, "--dataset", "tiny", "--method", "all", *SEEDS)
    assert status == 2
    assert (
        "results/tiny/0/asymvlm-vmf.npz: no such results; make them with python eval.py --dataset tiny"
        in error
    )


# Scores, and leads.

FAIR = ("--dataset", "tiny", "--name", "fair", "--against", "asymvlm-psd")
IMAGES, CAPTIONS = 150, 2


def test_scores_that_answer_alike_are_one_row(evaluated, script, monkeypatch):
    monkeypatch.setattr(PFEAdaptor, "own_score", lambda self, image, text: -self.score(image, text))
    for score in ("frozen", "own"):
        flags = (
            "--dataset",
            "tiny",
            "--no-plots",
            "--resamples",
            0,
            "--score",
            score,
            *METHODS,
            *SEEDS,
        )
        assert script(eval_script.main, *flags)[0] == 0
    scores = ("--score", "published", "frozen", "own", "--resamples", 100)
    status, printed, _ = script(compare.main, *FAIR, *METHODS, "softmax-entropy", *SEEDS, *scores)
    assert status == 0
    assert printed == Path("results/tiny/fair.md").read_text()
    rows = ["pfe, published and frozen score", "pfe, own score"]
    rows += ["asymvlm-psd, published and own score", "asymvlm-psd, frozen score"]
    assert list(cells_of(printed, "tiny/val, seeds 0, 1, small, 2 of 19 epochs")) == [
        *rows,
        "softmax-entropy",
    ]
    for row in rows[2:]:
        leads = leads_of(printed, row)
        assert list(leads) == ["pfe", "softmax-entropy"]
        assert leads["pfe"]["R@1 t2i"][4] == rows[0]
    assert "models/README.md" in printed


def save_world(method, right, order, seeds=(0,), score="published", cache="digest"):
    """Results of a method: the share of right answers, and how well its uncertainty orders them, from -1 to 1."""
    for seed in seeds:
        rng, answers = np.random.default_rng([seed, *f"{method}{score}".encode()]), {}
        for direction, captions in (("t2i", CAPTIONS), ("i2t", 1)):
            image = np.repeat(np.arange(IMAGES), captions)
            hard = np.random.default_rng(9).random(IMAGES)[image] + 0.1 * rng.normal(
                size=len(image)
            )
            answers[direction] = {"query": np.arange(len(image)), "top1": image, "image": image}
            answers[direction]["rank"] = 1 + (hard > right)
            answers[direction]["uncertainty"] = order * hard + 0.1 * rng.normal(size=len(image))
        config = {"method": method, "seed": seed, "split": "val", "cache": cache, "score": score}
        Results(answers, {"config": config}).save(Path("results/tiny"))


def leads_of(printed, leader):
    """{rival: {column: (verdict, difference, low, high, row)}} of the table of a row's leads."""
    lines = printed[printed.index(f"| lead of {leader} over |") :].split("\n\n")[0].splitlines()
    columns, found = [cell.strip() for cell in lines[0].strip("|").split("|")][1:], {}
    for line in lines[2:]:
        rival, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        parts = [
            re.fullmatch(r"(.*), (\S+) \[(\S+), (\S+)\], over (.*)", cell).groups()
            for cell in cells
        ]
        found[rival] = {
            c: (p[0], *map(float, p[1:4]), p[4]) for c, p in zip(columns, parts, strict=True)
        }
    return found


def test_what_becomes_of_leads_in_a_world_where_it_is_known(workdir, script):
    seeds = (0, 1, 2)
    for score in ("published", "frozen", "own"):
        save_world("asymvlm-psd", 0.5, 0.9, seeds, score)
        save_world("asymvlm-vmf", 0.9, 1.0, seeds, score)  # of the same family: no rival
        save_world("probvlm", 0.2, 0.0, seeds, score)
        save_world("pfe", {"published": 0.5, "frozen": 0.1, "own": 0.1}[score], 0.9, seeds, score)
        save_world(
            "prolip", {"published": 0.1, "frozen": 0.1, "own": 0.8}[score], 1.0, seeds, score
        )
    methods = ("asymvlm-psd", "asymvlm-vmf", "probvlm", "pfe", "prolip")
    flags = (*FAIR, "--seed", *seeds, "--resamples", 200, "--score", "published", "frozen", "own")
    status, printed, _ = script(compare.main, *flags, "--method", *methods)
    assert status == 0
    for leader in ("asymvlm-psd", "asymvlm-psd, frozen score", "asymvlm-psd, own score"):
        found = leads_of(printed, leader)
        assert list(found) == ["probvlm", "pfe", "prolip"]
        for column in ("R@1 t2i", "AURC t2i", "R@1 i2t", "AURC i2t"):
            told = {rival: cells[column][0] for rival, cells in found.items()}
            assert told == {"probvlm": "survives", "pfe": "tied", "prolip": "reversed"}
            assert found["pfe"][column][4] == "pfe"
            assert found["prolip"][column][4] == "prolip, own score"
        summary = f"\n{leader}: of 3 baselines, its lead survives over 1 in R@1 t2i (1 tied, 1 reversed), "
        assert summary in printed


def test_a_lead_is_the_difference_that_compare_prints(workdir, script):
    for method, right in (("asymvlm-psd", 0.5), ("pfe", 0.45)):
        save_world(method, right, 0.5, (0, 1, 2))
    flags = ("--seed", 0, 1, 2, "--resamples", 200)
    printed = script(compare.main, *FAIR, *flags, "--method", "asymvlm-psd", "pfe")[1]
    found = leads_of(printed, "asymvlm-psd")["pfe"]
    printed = script(
        eval_script.main, "--dataset", "tiny", *flags, "--compare", "asymvlm-psd", "pfe"
    )[1]
    for figure in ("R@1", "AURC"):
        lines = [line.split() for line in printed.splitlines() if line.startswith(f"{figure} ")]
        for d, line in zip(("t2i", "i2t"), lines, strict=True):
            assert found[f"{figure} {d}"][1:4] == tuple(
                float(cell.strip("[],")) for cell in line[3:6]
            )


def test_seeds_of_either_side_are_drawn_by_themselves(workdir, script):
    for seed, right in enumerate((0.3, 0.6)):
        save_world("asymvlm-psd", right, 0.5, (seed,))
        for file in Path(f"results/tiny/{seed}").iterdir():
            file.with_name(f"pfe{file.suffix}").write_bytes(file.read_bytes())
    printed = script(compare.main, *FAIR, "--seed", 0, 1, "--method", "asymvlm-psd", "pfe")[1]
    _, difference, low, high, _ = leads_of(printed, "asymvlm-psd")["pfe"]["R@1 t2i"]
    assert difference == 0
    assert low < -0.1 < 0.1 < high


def test_rounding_of_a_query_in_a_thousand_does_not_part_rows():
    fields = {"rank": np.ones(2000, int), "top1": np.arange(2000), "uncertainty": np.arange(2000.0)}
    for changed, alike in ((0, True), (2, True), (3, False)):
        for field in fields:
            others = fields[field].copy()
            others[:changed] += 1
            results = [
                Results({"t2i": f, "i2t": fields}, {}) for f in (fields, fields | {field: others})
            ]
            assert compare.answers_alike(*results) == alike
    assert not compare.answers_alike(
        results[0], Results({"t2i": fields, "i2t": fields | {"image_uncertainty": others}}, {})
    )


def jackknife(statistic, images):
    """The standard error of a statistic of image numbers when one image after another is left out."""
    values = np.array([statistic(np.delete(images, image)) for image in images])
    return np.sqrt((len(images) - 1) * values.var())


def test_differences_and_intervals_are_those_of_a_jackknife(workdir, script):
    save_world("asymvlm-psd", 0.5, 0.3)
    save_world("pfe", 0.45, 0.6)
    found = leads_of(
        script(compare.main, *FAIR, "--method", "asymvlm-psd", "pfe")[1], "asymvlm-psd"
    )["pfe"]
    runs = [dict(np.load(f"results/tiny/0/{method}.npz")) for method in ("asymvlm-psd", "pfe")]

    def risk(errors, uncertainty):
        errors = errors[np.argsort(uncertainty)]
        return sum(errors[:kept].mean() for kept in range(1, len(errors) + 1)) / len(errors)

    def figure(run, name, d, images):
        queries = np.isin(run[f"{d}_image"], images)
        errors = (run[f"{d}_rank"] > 1)[queries]
        return (
            risk(errors, run[f"{d}_uncertainty"][queries]) if name == "AURC" else 1 - errors.mean()
        )

    def difference(images, name, d):
        return figure(runs[0], name, d, images) - figure(runs[1], name, d, images)

    everything = np.arange(IMAGES)
    for name, d in (("R@1", "t2i"), ("AURC", "t2i"), ("R@1", "i2t"), ("AURC", "i2t")):
        _, told, low, high, _ = found[f"{name} {d}"]
        assert told == pytest.approx(difference(everything, name, d), abs=6e-4)
        assert high - low == pytest.approx(
            2 * 1.96 * jackknife(partial(difference, name=name, d=d), everything), rel=0.12
        )


def test_bad_input_is_one_line(workdir, script):
    for method, cache in (("asymvlm-psd", "one"), ("asymvlm-vmf", "one"), ("pfe", "another")):
        save_world(method, 0.5, 0.5, cache=cache)
    for flags, told in (
        (("--method", "pfe"), "--against asymvlm-psd: not in the table; add it to --method"),
        (
            ("--method", "asymvlm-psd", "asymvlm-vmf"),
            "--against asymvlm-psd: no method of another family",
        ),
        (
            ("--method", "asymvlm-psd", "pfe"),
            "--against: the results are of different caches (another, one)",
        ),
        (
            ("--method", "asymvlm-psd", "pfe", "--resamples", 5),
            "--resamples 5: --against needs at least 100",
        ),
        (("--name", "comparison"), "--name comparison: eval.py writes a file of this name"),
        (("--score", "nosuch"), "--score"),
        (
            ("--method", "asymvlm-psd", "prolip", "--score", "own"),
            "--method asymvlm-psd --seed 0 --score own",
        ),
    ):
        status, printed, error = script(compare.main, *FAIR, *flags)
        assert (status, printed) == (2, "")
        assert told in error
    assert not Path("results/tiny/fair.md").exists()
