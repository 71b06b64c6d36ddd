"""Checkpoints: which are read, refused or replaced."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train as train_script
from models import METHODS
from models.base import SMALL
from tests.conftest import LONG, QUICK, die, make_cache, stop_in_epoch
from tests.test_train import Toy
from utils.checkpoint import load_adaptor, save_adaptor
from utils.cli import UserError


class Normalized(Toy):
    """The same with a batch norm, which counts its batches in an integer."""

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.norm = torch.nn.BatchNorm1d(embed_dim)

    def encode_text(self, z):
        return z, self.trunk(self.norm(z))


def test_counts_of_batches_are_kept_and_older_files_lack_them(script, monkeypatch, one_thread):
    recipe = replace(SMALL, averaged_after=0.5)
    monkeypatch.setattr(Normalized, "recipes", {"small": recipe})
    monkeypatch.setitem(METHODS, "normalized", Normalized)
    make_cache("tiny")
    run = (*LONG, "--method", "normalized")
    assert script(train_script.main, *run)[0] == 0
    path = Path("checkpoints/tiny/0/normalized.pt")
    content = torch.load(path, weights_only=True)
    assert (
        load_adaptor(path).norm.num_batches_tracked
        == content["state_dict"]["norm.num_batches_tracked"]
        == 21
    )
    for older in (
        dict(content["state_dict"]),
        METHODS["normalized"](64).state_dict(),
    ):  # a plain dict, and torch's
        del older["norm.num_batches_tracked"]
        torch.save(content | {"state_dict": older}, path)
        assert load_adaptor(path).norm.num_batches_tracked == 0
    for key, value in (
        ("norm.num_batches_tracked", torch.tensor(1.5)),
        ("norm.running_mean", torch.ones(64).long()),
    ):
        torch.save(content | {"state_dict": content["state_dict"] | {key: value}}, path)
        with pytest.raises(UserError, match=key):
            load_adaptor(path)
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 7, die)
        script(train_script.main, *run)
    state = torch.load(path.with_suffix(".resume.pt"), weights_only=True)
    for weights in (state["state_dict"], state["average"]):
        del weights["norm.num_batches_tracked"]
    torch.save(state, path.with_suffix(".resume.pt"))
    assert script(train_script.main, *run, "--resume")[0] == 0
    resumed = torch.load(path, weights_only=True)["state_dict"]
    assert resumed.pop("norm.num_batches_tracked") == 3
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in resumed.items())


def test_checkpoints_that_do_not_fit_are_refused(workdir, script):
    make_cache("tiny")
    path = workdir / "checkpoints" / "tiny" / "0" / "asymvlm-psd.pt"
    adaptor = METHODS["asymvlm-psd"](32)
    save_adaptor(adaptor, "asymvlm-psd", SMALL, {}, path)
    assert "32 wide" in script(eval_script.main, "--dataset", "tiny")[2]
    save_adaptor(METHODS["asymvlm-vmf"](64), "asymvlm-vmf", SMALL, {}, path)
    assert "asymvlm-vmf, not of asymvlm-psd" in script(eval_script.main, "--dataset", "tiny")[2]
    for content, words in [
        (b"\x00" * 100, "can be read safely"),
        (b"", "the file is empty"),
        (b"PK\x03\x04" + bytes(range(256)), "can be read safely"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            load_adaptor(path)
    for change in (
        {"method": "clip"},
        {"embed_dim": 65},
        {"embed_dim": "64"},
        {"state_dict": {}},
        {"state_dict": 3},
    ):
        torch.save(
            {"state_dict": adaptor.state_dict(), "method": "asymvlm-psd", "embed_dim": 32} | change,
            path,
        )
        with pytest.raises(UserError, match=r"asymvlm-psd\.pt"):
            load_adaptor(path)
    weights = adaptor.state_dict()
    weights["temperature"] = torch.tensor(float("nan"))
    torch.save({"state_dict": weights, "method": "asymvlm-psd", "embed_dim": 32}, path)
    with pytest.raises(UserError, match="'temperature' is not finite"):
        load_adaptor(path)


def test_a_finished_checkpoint_is_not_replaced_by_another(script):
    make_cache("tiny")
    run = (*QUICK, "--precision", "fp32")
    assert script(train_script.main, *run)[0] == 0
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    first = path.read_bytes()
    assert script(train_script.main, *run)[0] == 0  # the same settings
    for change, words in (
        (("--epochs", 1), "epochs was 2, now 1"),
        (("--lr", 0.5), "lr was 0.001, now 0.5"),
        (("--precision", "bf16"), "precision was fp32, now bf16"),
        (("--validation", 0.1), "validation was None, now 0.1"),
    ):
        status, _, last = script(train_script.main, *run, "--method", "pfe", "asymvlm-psd", *change)
        assert status == 2
        assert words in last and "--overwrite" in last
        assert path.read_bytes() == first
        assert not path.with_name("pfe.pt").exists()  # nothing was trained before
    make_cache("tiny", seed=3)
    status, _, last = script(train_script.main, *run)
    assert status == 2 and "cache was" in last
    assert script(train_script.main, *run, "--overwrite")[0] == 0
    assert path.read_bytes() != first
    path.write_bytes(b"damaged")
    assert script(train_script.main, *run, "--epochs", 1)[0] == 0
