"""train.py as a user calls it: what it writes, that it repeats itself, what a stopped run leaves, what it refuses."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from datasets.write import write_split
from models import GROUPS, METHODS, expand_groups
from models.base import SMALL, Adaptor
from models.layers import mlp
from tests.conftest import (
    LONG,
    QUICK,
    REPOSITORY,
    die,
    load_result,
    make_cache,
    read_log,
    recipe_of,
    stop_in_epoch,
)
from tests.ranks import Ranks
from utils.checkpoint import load_adaptor
from utils.device import pick_precision

PLAIN = ("--no-plots", "--resamples", 20)
BASELINES = ("pcmepp", "pfe", "probvlm", "prolip")


def test_the_users_command_parses_and_says_what_is_missing(workdir):
    command = [sys.executable, REPOSITORY / "train.py", "--method", "asymvlm-psd"]
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cache_embeddings.py --dataset coco" in done.stderr
    assert "--dataset shapes" in done.stderr
    assert not list(workdir.iterdir())


def test_groups_stand_for_their_methods_each_once():
    assert GROUPS["all"] == ("asymvlm-psd", "asymvlm-vmf", "probvlm", "pfe", "pcmepp", "prolip")
    assert expand_groups(["pfe", "asymvlm-psd", "pfe"]) == ["pfe", "asymvlm-psd"]
    assert expand_groups(["prolip", "all"]) == list(GROUPS["all"])


def test_models_and_runs_load_no_library_of_data_sets_or_plots():
    heavy = {"datasets", "matplotlib", "open_clip", "PIL", "pycocotools", "scipy"}
    code = f"import sys, models, utils.run; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not done.stdout.split()


def test_training_reads_at_most_24_of_our_files():
    """Those of the baselines are not counted: a run of one method needs none of the others."""
    code = "import sys, train; print(*(getattr(m, '__file__', None) or '' for m in sys.modules.values()), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    files = [Path(line) for line in done.stdout.splitlines()]
    ours = {
        str(file.relative_to(REPOSITORY))
        for file in files
        if file.is_relative_to(REPOSITORY) and file.stat().st_size
    }
    ours = {
        file
        for file in ours
        if not file.startswith((".venv", *(f"models/{name}/" for name in BASELINES)))
    }
    assert {"train.py", "models/asymvlm/adaptor.py", "utils/run.py"} <= ours
    assert not any(file.startswith("utils/evaluation") for file in ours)
    assert len(ours) <= 24, sorted(ours)


def test_training_writes_a_checkpoint_and_a_log_of_every_epoch(script):
    make_cache("tiny")
    status, _, _ = script(train_script.main, *QUICK, "--method", "asymvlm-psd", "--seed", 3)
    assert status == 0
    content = torch.load("checkpoints/tiny/3/asymvlm-psd.pt", weights_only=True)
    assert set(content) == {"state_dict", "method", "embed_dim", "recipe", "config"}
    assert content["method"] == "asymvlm-psd"
    assert content["embed_dim"] == 64
    assert content["recipe"] == asdict(
        replace(METHODS["asymvlm-psd"].recipes["small"], batch_size=50, epochs=2)
    )
    log = [
        json.loads(line)
        for line in Path("checkpoints/tiny/3/asymvlm-psd.jsonl").read_text().splitlines()
    ]
    assert [record["epoch"] for record in log] == [1, 2]
    assert all(np.isfinite(record["loss"]) and len(record["ladder"]) == 3 for record in log)
    assert log[-1]["lr"] == pytest.approx(1e-6)
    assert log[-1]["temperature"] == pytest.approx(content["state_dict"]["temperature"].item())


def test_a_run_ends_with_its_checkpoint_loss_and_the_next_command(script):
    make_cache("tiny")
    status, _, last = script(train_script.main, *QUICK, "--seed", 3)
    assert status == 0
    loss = json.loads(Path("checkpoints/tiny/3/asymvlm-psd.jsonl").read_text().splitlines()[-1])
    assert last.startswith("checkpoints/tiny/3/asymvlm-psd.pt: 2 epochs in ")
    assert f"loss {loss['loss']:.4f}" in last
    command = "next: python eval.py --dataset tiny --method asymvlm-psd --seed 3"
    assert last.endswith(command)


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
        files = (
            f"checkpoints/tiny/{seed}/asymvlm-psd.pt",
            f"results/tiny/{seed}/asymvlm-psd.json",
            f"results/tiny/{seed}/asymvlm-psd.npz",
        )
        written.append([Path(file).read_bytes() for file in files])
    assert written[0] == written[1]
    assert all(a != b for a, b in zip(written[0], written[2], strict=True))


def test_the_paper_recipe_is_the_default(script):
    make_cache("tiny")
    assert script(train_script.main, "--dataset", "tiny", "--epochs", 1)[0] == 0
    recipe = torch.load("checkpoints/tiny/0/asymvlm-psd.pt", weights_only=True)["recipe"]
    assert (recipe["optimizer"], recipe["lr"], recipe["weight_decay"], recipe["batch_size"]) == (
        "sgd",
        1e-2,
        5e-4,
        2048,
    )


def test_uncertainty_learns_how_noisy_a_caption_is(script):
    make_cache("noisy", images=400, captions_per_image=4, dim=32)
    assert (
        script(
            train_script.main,
            "--dataset",
            "noisy",
            "--recipe",
            "small",
            "--epochs",
            12,
            "--batch-size",
            400,
        )[0]
        == 0
    )
    cache = EmbeddingCache("noisy", "train")
    noise = -torch.nn.functional.cosine_similarity(
        cache.text.read().float(), cache.image[cache.image_of_caption].float()
    )
    adaptor = load_adaptor("checkpoints/noisy/0/asymvlm-psd.pt")
    with torch.no_grad():
        uncertainty = adaptor.adapt_text(cache.text.read())[1]
    assert stats.spearmanr(noise, uncertainty).statistic > 0.5


class Toy(Adaptor):
    """The README's example of a method of one's own: a text's uncertainty is its distance from a learned centre."""

    recipes = {"paper": SMALL, "small": SMALL}

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.trunk = mlp(embed_dim)

    def encode_image(self, z):
        return (z,)

    def encode_text(self, z):
        return z, self.trunk(z)

    def describe_text(self, z, shift):
        return z, shift.square().mean(dim=1)

    def loss(self, z_image, z_text, shift):
        return (z_image - z_text - shift).square().mean()


def test_a_method_of_ones_own_goes_through_both_scripts(script, monkeypatch):
    monkeypatch.setitem(METHODS, "toy", Toy)
    make_cache("tiny")
    assert script(train_script.main, *QUICK, "--method", "toy")[0] == 0
    assert script(eval_script.main, "--dataset", "tiny", *PLAIN, "--method", "toy")[0] == 0
    assert load_result("tiny", 0, "toy")[0]["config"]["method"] == "toy"


class Named(Toy):
    """The same with a loss whose terms have names."""

    def loss(self, z_image, z_text, shift):
        return {
            "distance": (z_image - z_text - shift).square().mean(),
            "size": 0.5 * shift.square().mean(),
        }


def test_the_terms_of_a_loss_are_logged_by_name_resumed_or_not(script, monkeypatch, one_thread):
    monkeypatch.setitem(METHODS, "named", Named)
    make_cache("tiny")
    steps, step = [], train_script.step

    def look(*arguments):
        loss, terms = step(*arguments)
        assert not loss.requires_grad
        assert not any(term.requires_grad for term in terms.values())
        steps.append((loss, terms))
        return loss, terms

    monkeypatch.setattr(train_script, "step", look)
    run = (*LONG, "--method", "named", "--precision", "fp32")
    assert script(train_script.main, *run)[0] == 0
    log = read_log("named")
    for number, record in enumerate(log):
        epoch = steps[3 * number : 3 * number + 3]  # 120 captions: three steps an epoch
        assert list(record["terms"]) == ["distance", "size"]
        for name, mean in record["terms"].items():
            assert mean == pytest.approx(
                sum(terms[name].item() for _, terms in epoch) / 3, rel=1e-5
            )
        assert sum(record["terms"].values()) == pytest.approx(record["loss"], rel=1e-5)
    path = Path("checkpoints/tiny/0/named.pt")
    whole = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 4, die)
        script(train_script.main, *run)
    assert script(train_script.main, *run, "--resume")[0] == 0
    assert path.read_bytes() == whole
    assert read_log("named") == log


def test_the_log_of_a_loss_without_names_has_no_terms(script):
    make_cache("tiny")
    assert script(train_script.main, *QUICK)[0] == 0
    assert not any("terms" in record for record in read_log())


def test_a_method_for_a_single_process_refuses_ranks(script, monkeypatch):
    make_cache("tiny")
    monkeypatch.setattr(METHODS["pcmepp"], "single_process_only", True, raising=False)
    run = (*QUICK, "--method", "asymvlm-psd", "pcmepp")
    with Ranks(2, train_script.main, run, "train.py") as ranks:
        assert ranks.wait() == [2, 2]
        lines = [line for line in ranks.output().splitlines() if line]
    assert len(lines) == 2  # one per rank
    assert all("--method pcmepp" in line and "single process" in line for line in lines)
    assert not Path("checkpoints").exists()
    assert script(train_script.main, *run)[0] == 0


def test_a_loss_that_is_not_finite_stops_with_method_epoch_and_step(script):
    make_cache("tiny")
    status, _, error = script(train_script.main, *QUICK, "--optimizer", "sgd", "--lr", 1e30)
    assert status == 2
    assert "asymvlm-psd, epoch 1, step" in error
    assert "--lr" in error
    assert not Path("checkpoints/tiny/0/asymvlm-psd.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dataset", "nothing"), ["embeddings/nothing", "found caches: tiny"]),
        (("--dataset", "tiny", "--method", "clip"), ["--method", "asymvlm-psd"]),
        (("--dataset", "tiny", "--recipe", "huge"), ["--recipe huge", "paper, small"]),
        (("--dataset", "tiny", "--precision", "fp16"), ["--precision fp16", "bf16 or fp32"]),
        (("--dataset", "tiny", "--epochs", 0), ["--epochs", "at least 1"]),
        (("--dataset", "tiny", "--batch-size", -1), ["--batch-size", "at least 1"]),
        (("--dataset", "tiny", "--lr", "nan"), ["--lr", "nan"]),
        (("--dataset", "tiny", "--seed", -1), ["--seed", "at least 0"]),
        (("--dataset", "tiny", "--seed", 2**64), ["--seed", "below 2^63"]),
        (("--dataset", "../tiny"), ["--dataset", "plain name"]),
        (("--dataset", "tiny", "--device", "cuda:9"), ["--device cuda:9", "cpu"]),
    ],
)
def test_wrong_input_is_one_line_that_names_it(arguments, words, script, workdir):
    make_cache("tiny")
    before = sorted(workdir.rglob("*"))
    status, printed, error = script(train_script.main, *arguments)
    assert status == 2
    assert not printed
    assert all(word in error for word in words), error
    assert sorted(workdir.rglob("*")) == before


# Stopped and resumed.


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_one_and_a_batch_all_alike_are_trained_on(method, script, one_thread):
    make_cache("tiny", images=3, captions_per_image=1)
    run = (*QUICK, "--method", method, "--recipe", recipe_of(method))
    assert script(train_script.main, *run, "--batch-size", 2)[0] == 0  # the last batch is one pair
    for split in ("train", "val"):
        alike = torch.ones(4, 64).half()
        write_split(
            Path("embeddings/alike") / split,
            alike,
            alike,
            [0, 1, 2, 3],
            ["a"] * 4,
            ["a.png"] * 4,
            None,
            {},
        )
    assert script(train_script.main, *run, "--dataset", "alike")[0] == 0


def test_bfloat16_that_is_not_native_is_told_to_be_slow(monkeypatch, caplog):
    monkeypatch.setattr("utils.device._computes_bfloat16", lambda device: False)
    assert pick_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert "--precision bf16: cpu does not compute it natively" in caplog.text
    caplog.clear()
    assert pick_precision("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr("utils.device._computes_bfloat16", lambda device: True)
    assert pick_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert not caplog.text


@pytest.mark.parametrize(
    ("captions", "batch_size", "epochs"),
    [(1_400, 175, 19), (17_500, 1024, 10), (50_000, 1024, 10), (120, 15, 19), (10, 2, 30)],
)
def test_the_small_recipe_fits_the_cache(captions, batch_size, epochs):
    recipe = METHODS["asymvlm-psd"].recipes["small"].fitted_to(captions)
    assert (recipe.batch_size, recipe.epochs) == (batch_size, epochs)
    assert recipe.steps(captions) * recipe.epochs >= 150
    changed = train_script.settle(SMALL, {"epochs": 1, "batch_size": 7}, captions)
    assert (changed.batch_size, changed.epochs) == (7, 1)


def test_normalised_embeddings_are_told_and_raw_ones_are_not(script):
    make_cache("tiny")
    assert script(train_script.main, *QUICK)[0] == 0
    assert "norm 1" not in script.stderr
    cache = EmbeddingCache("tiny", "train")
    z = [
        torch.nn.functional.normalize(rows.read().float(), dim=1)
        for rows in (cache.image, cache.text)
    ]
    make_cache("unit", image=z[0].half(), text=z[1].half())
    assert script(train_script.main, *QUICK, "--dataset", "unit")[0] == 0
    assert "the embeddings of embeddings/unit/train have norm 1" in script.stderr
