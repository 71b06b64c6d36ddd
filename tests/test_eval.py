"""eval.py as a user calls it: what it writes, that it repeats itself, and what it says when something is wrong."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats

import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from models import METHODS
from models.base import SMALL
from tests.conftest import REPOSITORY, load_result, make_cache, recipe_of
from utils.checkpoint import load_adaptor, save_adaptor
from utils.evaluation.scorers import AdaptorScorer

PLAIN = ("--no-plots", "--resamples", 20)
QUICK = ("--dataset", "tiny", "--recipe", "small", "--epochs", 2, "--batch-size", 50)


@pytest.mark.parametrize("method", METHODS)
def test_results_equal_a_plain_evaluation_with_the_full_matrix(method, script):
    make_cache("tiny", images=30, captions_per_image=4)
    assert (
        script(train_script.main, *QUICK, "--method", method, "--recipe", recipe_of(method))[0] == 0
    )
    status, printed, _ = script(
        eval_script.main, "--dataset", "tiny", *PLAIN, "--method", method, "--uncer_levels", 10
    )
    assert status == 0
    assert method in printed
    result, queries = load_result("tiny", 0, method)
    cache, adaptor = EmbeddingCache("tiny", "val"), load_adaptor(f"checkpoints/tiny/0/{method}.pt")
    with torch.no_grad():
        similarity = adaptor.similarity(cache.image.read(), cache.text.read()).numpy()
        of_image, of_text = (
            adaptor.adapt_image(cache.image.read())[1],
            adaptor.adapt_text(cache.text.read())[1],
        )
    image_of_caption = cache.image_of_caption.numpy()
    t2i = similarity.argmax(0) == image_of_caption
    retrieved = similarity.argmax(1)
    i2t = image_of_caption[retrieved] == np.arange(30)
    if of_text is not None:
        by_caption, by_image = of_text.numpy(), of_text.numpy()[retrieved]
    else:  # the image's instead, of the one retrieved or of the one asked
        by_caption, by_image = of_image.numpy()[similarity.argmax(0)], of_image.numpy()
    assert result["t2i"] == pytest.approx(
        [part.mean() for part in np.split(t2i[np.argsort(by_caption, kind="stable")], 10)]
    )
    assert result["i2t"] == pytest.approx(
        [part.mean() for part in np.split(i2t[np.argsort(by_image, kind="stable")], 10)]
    )
    assert result["metrics"]["t2i"]["R@1"] == pytest.approx(t2i.mean())
    assert set(result["metrics"]["i2t"]) == {
        "R@1",
        "R@5",
        "R@10",
        "S",
        "R2",
        "-S*R2",
        "AURC",
        "E-AURC",
        "ties",
    }
    assert (queries["t2i_top1"] == similarity.argmax(0)).all()
    assert (queries["i2t_top1"] == retrieved).all()
    whose = "uncertainty" if of_text is not None else "image_uncertainty"
    np.testing.assert_allclose(queries[f"t2i_{whose}"], by_caption, rtol=1e-5)
    assert ("t2i_uncertainty" in queries) == (of_text is not None)


def test_relevance_gives_the_figures_against_exact_ambiguity(script):
    relevance = [sorted({i // 3, (i * 7) % 40, (i * i) % 40}) for i in range(120)]
    make_cache("tiny", relevance=relevance)
    assert script(train_script.main, *QUICK)[0] == 0
    assert script(eval_script.main, "--dataset", "tiny", *PLAIN)[0] == 0
    result, queries = load_result("tiny", 0, "asymvlm-psd")
    own = EmbeddingCache("tiny", "val").image_of_caption.tolist()  # always right, listed or not
    described = np.mean(
        [
            top in (*rows, image)
            for top, rows, image in zip(queries["t2i_top1"], relevance, own, strict=True)
        ]
    )
    assert set(result["metrics"]["ambiguity"]) == {
        "spearman",
        "partial_spearman_given_length",
        "R@1_described",
    }
    assert result["metrics"]["ambiguity"]["R@1_described"] == pytest.approx(described)


def test_several_methods_and_seeds_give_one_table(script):
    make_cache("tiny")
    assert (
        script(train_script.main, *QUICK, "--method", "asymvlm-psd", "asymvlm-vmf", "--seed", 0, 1)[
            0
        ]
        == 0
    )
    status, printed, _ = script(
        eval_script.main,
        "--dataset",
        "tiny",
        *PLAIN,
        "--method",
        "asymvlm-psd",
        "asymvlm-vmf",
        "--seed",
        0,
        1,
    )
    assert status == 0
    table = Path("results/tiny/comparison.md").read_text()
    for row in ("frozen cosine", "softmax-entropy", "caption-length", "asymvlm-psd", "asymvlm-vmf"):
        assert table.count(f"| {row} |") == 2
        assert row in printed
    runs = [
        load_result("tiny", seed, "asymvlm-vmf")[0]["metrics"]["t2i"]["AURC"] for seed in (0, 1)
    ]
    assert f"{np.mean(runs):.3f} ± {np.std(runs, ddof=1):.3f}" in table
    with open("results/tiny/comparison.csv", newline="") as file:
        values = {
            row["seed"]: float(row["value"])
            for row in csv.DictReader(file)
            if (row["section"], row["score"], row["method"], row["metric"])
            == ("t2i", "published", "asymvlm-vmf", "AURC")
        }
    assert [values[seed] for seed in ("0", "1", "mean", "std")] == pytest.approx(
        [*runs, np.mean(runs), np.std(runs, ddof=1)]
    )
    assert values["low"] < values["mean"] < values["high"]
    with open("results/tiny/comparison.csv", newline="") as file:
        assert {(row["dataset"], row["split"]) for row in csv.DictReader(file)} == {("tiny", "val")}


def test_softmax_entropy_baseline_equals_scipys(script):
    make_cache("tiny")
    assert script(train_script.main, *QUICK)[0] == 0
    assert script(eval_script.main, "--dataset", "tiny", *PLAIN)[0] == 0
    cache = EmbeddingCache("tiny", "val")
    image, text = (
        z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True)
        for z in (cache.image.read(), cache.text.read())
    )
    expected = stats.entropy(special.softmax(100 * image @ text.T, axis=0), axis=0)
    found = np.load("results/tiny/baselines/softmax-entropy.npz")["t2i_uncertainty"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dataset", "tiny", "--split", "../tiny/val"), ["--split", "plain name"]),
        (("--dataset", "tiny", "--json"), ["--json", "--prompts"]),
        (("--dataset", "tiny", "--prompts", "a", "--most-uncertain", 1), ["one at a time"]),
        (("--dataset", "tiny", "--compare", "pfe", "prolip", "--resamples", 0), ["--resamples 0"]),
        (
            ("--dataset", "tiny"),
            [
                "checkpoints/tiny/0/asymvlm-psd.pt",
                "train.py --dataset tiny --method asymvlm-psd --seed 0",
            ],
        ),
        (("--dataset", "tiny", "--uncer_levels", 0), ["--uncer_levels", "at least 1"]),
        (("--dataset", "tiny", "--uncer_levels", 41), ["--uncer_levels 41", "40"]),
        (("--dataset", "tiny", "--split", "test"), ["no test split", "train, val"]),
    ],
)
def test_wrong_input_is_one_line_that_names_it(arguments, words, script, workdir):
    make_cache("tiny")
    before = sorted(workdir.rglob("*"))
    status, printed, error = script(eval_script.main, *arguments)
    assert status == 2
    assert not printed
    assert all(word in error for word in words), error
    assert sorted(workdir.rglob("*")) == before


def test_checkpoints_of_another_width_or_method_are_refused(workdir, script):
    make_cache("tiny")
    path = workdir / "checkpoints" / "tiny" / "0" / "asymvlm-psd.pt"
    save_adaptor(METHODS["asymvlm-psd"](32), "asymvlm-psd", SMALL, {}, path)
    assert "32 wide" in script(eval_script.main, "--dataset", "tiny")[2]
    save_adaptor(METHODS["asymvlm-vmf"](64), "asymvlm-vmf", SMALL, {}, path)
    assert "asymvlm-vmf, not of asymvlm-psd" in script(eval_script.main, "--dataset", "tiny")[2]


def test_the_users_command_parses_and_says_what_is_missing(workdir):
    command = [sys.executable, REPOSITORY / "eval.py", "--uncer_levels", "10"]
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cache_embeddings.py --dataset coco" in done.stderr
    assert "--dataset shapes" in done.stderr
    assert not list(workdir.iterdir())


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(script):
    make_cache("tiny")
    written = []
    for seed in (0, 0, 1):
        assert script(train_script.main, *QUICK, "--seed", seed)[0] == 0
        assert (
            script(
                eval_script.main, "--dataset", "tiny", *PLAIN, "--uncer_levels", 5, "--seed", seed
            )[0]
            == 0
        )
        files = (f"results/tiny/{seed}/asymvlm-psd.json", f"results/tiny/{seed}/asymvlm-psd.npz")
        written.append([Path(file).read_bytes() for file in files])
    assert written[0] == written[1]
    assert all(a != b for a, b in zip(written[0], written[2], strict=True))


def test_a_cache_is_encoded_without_a_graph_of_gradients(script):
    make_cache("tiny", images=6)
    scorer = AdaptorScorer(METHODS["probvlm"](64), EmbeddingCache("tiny", "val"))
    assert not any(part.requires_grad for part in (*scorer.image, *scorer.text))
