"""Heads of several seeds: differently trained ones are refused, unfinished ones named, and cures work."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train as train_script
from tests.conftest import load_result, make_cache
from utils.checkpoint import checkpoint_path, lock_path
from utils.cli import UserError
from utils.files import locked, save_tensors
from utils.questions import compare
from utils.trained import check_exists, training_command

SMALL = ("--dataset", "tiny", "--recipe", "small", "--batch-size", 50)
EVAL = ("--dataset", "tiny", "--no-plots", "--resamples", 20)
SEEDS = ("--seed", 0, 1)


@pytest.fixture
def train(script):
    make_cache("tiny")

    def train(*flags):
        assert script(train_script.main, *SMALL, *flags)[0] == 0

    return train


def flags_of(command):
    """The flags of "python train.py ..."."""
    python, name, *flags = shlex.split(command)
    assert (python, name) == ("python", "train.py")
    return flags


def command_in(message):
    """The command that a message names."""
    return message[message.index("python train.py") :].split(", or ")[0].strip()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--epochs", 1), "epochs is 1, not 2"),
        (("--lr", 0.01), "lr is 0.01, not 0.001"),
        (("--validation", 0.2), "validation is 0.2, not None"),
    ],
)
def test_seeds_that_were_trained_differently_are_not_averaged(script, train, change, words):
    train("--seed", 0, "--epochs", 2)
    train("--seed", 1, "--epochs", 2, *change)
    status, _, message = script(eval_script.main, *EVAL, *SEEDS)
    assert status == 2
    assert "checkpoints/tiny/1/asymvlm-psd.pt: not trained as seed 0 was" in message
    assert words in message
    assert not Path("results").exists()
    assert script(train_script.main, *flags_of(command_in(message)))[0] == 0
    assert script(eval_script.main, *EVAL, *SEEDS)[0] == 0


def test_results_of_heads_that_were_trained_differently_are_not_compared(script, train):
    train("--seed", 0, "--epochs", 2, "--method", "pfe", "asymvlm-psd")
    train("--seed", 1, "--epochs", 1, "--method", "pfe", "asymvlm-psd")
    for seed in (0, 1):
        flags = ("--method", "pfe", "asymvlm-psd", "--seed", seed)
        assert script(eval_script.main, *EVAL, *flags)[0] == 0
    config = load_result("tiny", 0, "pfe")[0]["config"]
    assert (config["recipe"], config["epochs"]) == ("small", 2)
    question = ("--dataset", "tiny", *SEEDS)
    for main, flags in (
        (eval_script.main, ("--compare", "pfe", "asymvlm-psd")),
        (compare.main, ("--method", "pfe", "asymvlm-psd")),
    ):
        status, _, message = script(main, *question, *flags)
        assert status == 2
        assert "results/tiny/1/pfe.json" in message and "epochs is 1, not 2" in message


def test_titles_name_recipe_and_epochs(script, train):
    train("--epochs", 2, "--method", "pfe", "asymvlm-psd")
    assert script(eval_script.main, *EVAL, "--method", "pfe", "asymvlm-psd")[0] == 0
    folder = Path("results/tiny")
    for name in ("comparison.md", "t2i.md", "risk.md", "details.md"):
        titles = [
            line
            for line in (folder / name).read_text().splitlines()
            if line.startswith("| ") and "image" in line.split("|")[1]
        ]
        assert titles and all(", small, 2 of 19 epochs" in title for title in titles), titles
    assert "recipe small, 2 of 19 epochs" in (folder / "README.md").read_text().splitlines()[0]
    _, printed, _ = script(compare.main, "--dataset", "tiny", "--method", "pfe", "--resamples", 0)
    assert printed.startswith("| tiny/val, seed 0, small, 2 of 19 epochs |")


@pytest.mark.parametrize(
    "flags",
    [("--epochs", 2), ("--epochs", 2, "--lr", 0.01), ("--validation", 0.2, "--keep", "best")],
)
def test_the_cure_for_a_missing_seed_trains_it_like_the_others(script, train, flags):
    train("--seed", 0, *flags)
    status, _, message = script(eval_script.main, *EVAL, *SEEDS)
    assert status == 2
    assert "checkpoints/tiny/1/asymvlm-psd.pt: no such checkpoint" in message
    assert script(train_script.main, *flags_of(command_in(message)))[0] == 0
    assert script(eval_script.main, *EVAL, *SEEDS)[0] == 0


def test_the_cure_for_a_missing_method_has_the_recipe_of_the_others_but_its_own_rate(train):
    train("--epochs", 2, "--lr", 0.01)
    command = training_command("tiny", "pfe", 0)
    assert "--recipe small --epochs 2 --batch-size 50" in command
    assert "--lr" not in command
    assert training_command("elsewhere", "pfe", 0).endswith("--method pfe --seed 0")


def test_the_cure_names_the_device_and_the_buffer_of_the_others(train):
    train("--epochs", 2)
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    content = torch.load(path, weights_only=True)
    content["config"].update(device="cuda", shuffle_buffer=50)
    torch.save(content, path)
    command = training_command("tiny", "pfe", 0)
    assert " --shuffle-buffer 50 --device cuda --precision " in command


def test_an_older_checkpoint_of_an_unfinished_training_is_named(script, train):
    train("--epochs", 2)
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    state = path.with_suffix(".resume.pt")
    shutil.copy(path, state)
    assert script(eval_script.main, *EVAL)[0] == 0
    assert (
        f"{path} is from an earlier training run" in script.stderr and "--resume" in script.stderr
    )
    state.unlink()
    with locked(lock_path(path), path):
        assert script(eval_script.main, *EVAL)[0] == 0
    assert f"{path} is from an earlier training run: it is being trained" in script.stderr
    assert script(eval_script.main, *EVAL)[0] == 0
    assert "earlier training" not in script.stderr
    path.rename(state)
    status, _, message = script(eval_script.main, *EVAL)
    assert status == 2
    assert "no such checkpoint yet, its training was interrupted" in message


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_row_of_zeros_is_named_and_refused_by_all_scripts(script, train, kind):
    train("--epochs", 1)
    for split in ("train", "val"):
        path = Path(f"embeddings/tiny/{split}/{kind}.pt")
        z = torch.load(path, weights_only=True)
        z[7] = 0
        save_tensors(z, path)
    for main, flags in (
        (train_script.main, (*SMALL, "--epochs", 1)),
        (eval_script.main, EVAL),
        (eval_script.main, ("--dataset", "tiny", "--export", "scores.csv")),
        (eval_script.main, ("--dataset", "tiny", "--most-uncertain", 3)),
    ):
        status, _, message = script(main, *flags)
        assert status == 2
        assert f"{kind}.pt: row 7 is all zeros" in message


def test_heads_of_another_data_set_are_evaluated_if_the_clip_is_the_same(script, train):
    train("--seed", 0, "--epochs", 1, "--method", "pfe", "asymvlm-psd")
    make_cache("other", seed=5)
    flags = ("--dataset", "other", "--no-plots", "--resamples", 100, "--trained-on", "tiny")
    assert script(eval_script.main, *flags, "--method", "pfe", "asymvlm-psd")[0] == 0
    folder = Path("results/other/trained-on-tiny")
    content = json.loads((folder / "0/pfe.json").read_text())
    assert content["config"]["trained_on"] == "tiny"
    assert content["config"]["training"]["dataset"] == "tiny"
    page = (folder / "README.md").read_text()
    assert "heads trained on tiny" in page.splitlines()[0] and "--trained-on tiny" in page
    assert not Path("results/other/0").exists()
    for question in (
        ("--compare", "pfe", "asymvlm-psd"),
        ("--export", "scores.csv"),
        ("--most-uncertain", 2),
    ):
        assert script(eval_script.main, *flags, *question)[0] == 0
    missing = ("--compare", "prolip", "asymvlm-psd")
    status, _, message = script(eval_script.main, *flags, *missing)
    assert status == 2
    assert "--dataset other --trained-on tiny --method prolip" in message
    make_cache("foreign", meta={"model": "other", "pretrained": "none"})
    status, _, message = script(eval_script.main, "--dataset", "foreign", *flags[2:])
    assert status == 2 and "--other-clip" in message
    status, _, message = script(eval_script.main, "--dataset", "other", "--trained-on", "nothing")
    assert status == 2 and "checkpoints/nothing/0/asymvlm-psd.pt" in message


def test_levels_are_cut_by_count_or_by_spacing(script, train):
    train("--epochs", 1)
    recall = {}
    for by in ("count", "spacing"):
        flags = ("--levels-by", by, "--uncer_levels", 12)
        assert script(eval_script.main, *EVAL, *flags)[0] == 0
        content, _ = load_result("tiny", 0, "asymvlm-psd")
        assert content["config"]["levels_by"] == by
        recall[by] = content["t2i"]
        report = Path("results/tiny/README.md").read_text()
        assert ("--levels-by spacing" in report) == (by == "spacing")
    assert recall["count"] != recall["spacing"]


def test_a_missing_checkpoint_names_the_tagged_one_or_the_other_data_set(workdir):
    folder = Path("checkpoints/shapes/0")
    folder.mkdir(parents=True)
    (folder / "pfe@demo.pt").touch()
    (folder / "pfe@best.resume.pt").touch()
    (folder / "pcmepp.pt").touch()
    for dataset, method, end in (
        ("shapes", "pfe", "--method pfe --seed 0, or take --method pfe@demo, which is there"),
        ("shapes", "prolip", "--method prolip --seed 0"),
        ("coco", "prolip", "--method prolip --seed 0"),
        ("coco", "pcmepp", "or evaluate that of another data set with --trained-on shapes"),
    ):
        path = checkpoint_path(dataset, 0, method)
        with pytest.raises(UserError) as refused:
            check_exists(path, dataset, method, 0)
        assert str(refused.value).endswith(end)


def test_the_command_for_a_tag_follows_the_same_tag_or_else_none(train):
    train("--method", "pfe", "--epochs", 1)
    train("--method", "pfe", "--epochs", 2, "--tag", "long")
    assert "--epochs 1" in training_command("tiny", "prolip", 0)
    assert "--epochs 2" in training_command("tiny", "prolip@long", 0)
    assert "--epochs 1" in training_command("tiny", "prolip@other", 0)
