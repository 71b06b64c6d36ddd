"""Training runs on disk: states, interruptions, locks and logs."""

import contextlib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train as train_script
from models import METHODS
from models.base import SMALL
from tests.conftest import (
    LONG,
    QUICK,
    die,
    interrupt,
    make_cache,
    read_log,
    recipe_of,
    stop_in_epoch,
)
from utils.checkpoint import load_adaptor, load_run
from utils.cli import UserError
from utils.files import locked, save_tensors


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_unbroken_run(method, script, monkeypatch, one_thread):
    make_cache("tiny")
    path = Path(f"checkpoints/tiny/0/{method}.pt")
    run = (*LONG, "--method", method, "--recipe", recipe_of(method))
    assert script(train_script.main, *run)[0] == 0
    whole, log = path.read_bytes(), read_log(method)
    path.unlink()
    for flags, epoch in (((), 4), (("--resume",), 6)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_in_epoch(patch, epoch, die)
            script(train_script.main, *run, *flags)
        assert not path.exists()
        assert len(torch.load(path.with_suffix(".resume.pt"), weights_only=True)["log"]) == (
            2 if epoch == 4 else 4
        )
    assert script(train_script.main, *run, "--resume")[0] == 0
    assert path.read_bytes() == whole
    assert read_log(method) == log
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(
        [path.name, f"{method}.jsonl"]
    )


def test_ctrl_c_saves_the_last_finished_epoch_and_says_how_to_go_on(
    script, monkeypatch, one_thread
):
    make_cache("tiny")
    assert script(train_script.main, *LONG)[0] == 0
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    whole = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 4, interrupt)
        status, _, last = script(train_script.main, *LONG)
    assert status == 130
    assert "saved after epoch 3; the same command with --resume goes on from there" in last
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1, interrupt)  # not again
        assert script(train_script.main, *LONG, "--resume")[0] == 0
    assert path.read_bytes() == whole


def test_resume_without_a_saved_state_starts_fresh(script, monkeypatch, one_thread):
    make_cache("tiny")
    assert script(train_script.main, *LONG)[0] == 0
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    whole = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 2, die)
        script(train_script.main, *LONG)
    assert not path.with_suffix(".resume.pt").exists()
    assert script(train_script.main, *LONG, "--resume")[0] == 0
    assert path.read_bytes() == whole


def test_a_finished_run_is_not_trained_again_by_resume(script, one_thread):
    make_cache("tiny")
    assert script(train_script.main, *LONG)[0] == 0
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    before = path.stat().st_mtime_ns
    status, _, last = script(train_script.main, *LONG, "--resume")
    assert status == 0
    assert f"{path}: finished already" in last
    assert path.stat().st_mtime_ns == before
    status, _, last = script(train_script.main, *LONG, "--resume", "--lr", 0.5)
    assert status == 2
    assert f"{path}: belongs to a run with other settings: lr was 0.001, now 0.5" in last
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "changes", "expected"),
    [
        (("--lr", 0.5), {}, "lr was 0.001, now 0.5"),
        (("--epochs", 9), {}, "epochs was 7, now 9"),
        (("--precision", "bf16"), {}, "precision was fp32, now bf16"),
        ((), {"images": 41}, "captions was 120, now 123; images was 40, now 41"),
        ((), {"seed": 5}, "cache was "),
        ((), {"meta": {"model": "other"}}, "clip was "),
    ],
)
def test_a_state_of_other_settings_is_refused_with_the_difference(
    script, monkeypatch, one_thread, flags, changes, expected
):
    make_cache("tiny")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 4, die)
        script(train_script.main, *LONG, "--precision", "fp32")
    state = Path("checkpoints/tiny/0/asymvlm-psd.resume.pt")
    before = state.read_bytes()
    make_cache("tiny", **changes)
    status, _, last = script(train_script.main, *LONG, "--precision", "fp32", "--resume", *flags)
    assert status == 2
    assert expected in last
    assert state.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {}},
        {"log": 3},
        {"log": [1]},
        {"state_dict": {}},
        {"config": 3},
        {"recipe": None},
        {"progress": None},
    ],
)
def test_a_state_that_is_none_is_refused(script, monkeypatch, one_thread, change):
    make_cache("tiny")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 4, die)
        script(train_script.main, *LONG)
    state = Path("checkpoints/tiny/0/asymvlm-psd.resume.pt")
    torch.save(torch.load(state, weights_only=True) | change, state)
    status, _, last = script(train_script.main, *LONG, "--resume")
    assert status == 2
    assert f"{state}: " in last
    assert "without --resume" in last


@pytest.mark.parametrize("save_every", [2, 100])
def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    script, monkeypatch, one_thread, save_every
):
    make_cache("tiny")
    stop_in_epoch(monkeypatch, 6, lambda losses: losses * float("nan"))
    status, _, last = script(train_script.main, *LONG, "--save-every", save_every)
    assert status == 2
    assert "asymvlm-psd, epoch 6, step 1: the loss is nan" in last
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    assert not path.exists()
    state = torch.load(path.with_suffix(".resume.pt"), weights_only=True)
    assert len(state["log"]) == 5
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_weights_that_are_not_finite_are_not_saved(script, monkeypatch, one_thread):
    make_cache("tiny")

    def ruin(adaptor, *_):
        """A step whose loss is fine and whose update is not."""
        next(adaptor.parameters()).data.fill_(float("inf"))
        return torch.tensor(1.0), {}

    monkeypatch.setattr(train_script, "step", ruin)
    status, _, last = script(train_script.main, *LONG)
    assert status == 2
    assert "asymvlm-psd, epoch 1, step 3: it leaves weights that are not finite" in last
    assert [path.name for path in Path("checkpoints/tiny/0").iterdir()] == ["asymvlm-psd.jsonl"]


def test_two_runs_of_one_method_and_seed_are_refused(script, one_thread):
    make_cache("tiny")
    with locked(Path("checkpoints/tiny/0/.asymvlm-psd.lock"), "it"):
        status, _, last = script(train_script.main, *QUICK)
        assert status == 2
        assert "checkpoints/tiny/0/asymvlm-psd.pt: another process is at work on it" in last
        assert script(train_script.main, *QUICK, "--seed", 1)[0] == 0
    assert script(train_script.main, *QUICK)[0] == 0


def test_a_state_from_before_sums_were_kept_is_resumed_and_one_of_another_clip_is_not(tmp_path):
    recipe, clip = (
        SMALL,
        {"model": "m", "model_sha256": "a", "pretrained": "p", "pretrained_sha256": "b"},
    )
    for stored, refused in (
        ({"model": "m", "pretrained": "p"}, False),
        (clip, False),
        (clip | {"model": "n"}, True),
    ):
        content = {"config": {"seed": 0, "clip": stored}, "recipe": asdict(recipe)}
        save_tensors(content, tmp_path / "state.pt")
        with (
            pytest.raises(UserError, match="other settings")
            if refused
            else contextlib.nullcontext()
        ):
            assert (
                load_run(tmp_path / "state.pt", [recipe], {"seed": 0, "clip": clip}, "cure")
                == content
            )


@pytest.mark.parametrize("lr", [3e-3, 2e-3])
def test_a_state_of_the_former_small_recipe_goes_on_as_it_was_begun(script, monkeypatch, lr):
    make_cache("tiny")
    run = ("--dataset", "tiny", "--recipe", "small")
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 4, interrupt)
        former = ("--lr", lr, "--batch-size", 1024, "--epochs", 10)
        assert script(train_script.main, *run, *former)[0] == 130
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    state = torch.load(path.with_suffix(".resume.pt"), weights_only=True)
    for field in ("batch_share", "min_steps", "eps"):
        del state["recipe"][field]
    save_tensors(state, path.with_suffix(".resume.pt"))
    status, _, last = script(train_script.main, *run, "--resume")
    if lr != 3e-3:  # that was never the recipe
        assert status == 2
        assert "lr was 0.002, now 0.001" in last
        return
    assert status == 0
    recipe = torch.load(path, weights_only=True)["recipe"]
    assert (recipe["lr"], recipe["batch_size"], recipe["epochs"]) == (3e-3, 1024, 10)
    assert script(train_script.main, *run, "--resume")[0] == 0  # finished already
    assert load_adaptor(path).recipe == recipe


def test_ctrl_c_before_the_first_epoch_says_that_nothing_was_saved(script, monkeypatch):
    make_cache("tiny")
    stop_in_epoch(monkeypatch, 1, interrupt)
    status, _, last = script(train_script.main, *LONG)
    assert status == 130
    assert "nothing was saved; give the same command again" in last


def test_a_state_from_before_variances_could_be_started_goes_on_as_it_was_begun(script):
    make_cache("tiny")
    run = (
        "--dataset",
        "tiny",
        "--method",
        "pcmepp",
        "--recipe",
        "small",
        "--batch-size",
        50,
        "--epochs",
        3,
    )
    path = Path("checkpoints/tiny/0/pcmepp.pt")
    states = []

    def stop_after_two(content, file):
        states.append(content)
        save_tensors(content, file)
        if len(states) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.run.save_tensors", stop_after_two)
        assert script(train_script.main, *run, "--save-every", 1)[0] == 130
    state = torch.load(path.with_suffix(".resume.pt"), weights_only=True)
    assert state["recipe"].pop("start_variance") == 1.0
    save_tensors(state, path.with_suffix(".resume.pt"))
    assert script(train_script.main, *run, "--resume")[0] == 0
    content = torch.load(path, weights_only=True)
    assert content["recipe"] == state["recipe"] | {"start_variance": None}
    assert len(path.with_suffix(".jsonl").read_text().splitlines()) == 3
