"""A short campaign of tests/faults.py, and what it does not reach: hostile files, folders that may not be written."""

import json
import os
import random
import struct
import tempfile
from pathlib import Path

import pytest
import torch

import cache_embeddings
import train as train_script
from tests import faults
from tests.conftest import make_cache, write_tiny_clip
from utils.cli import UserError
from utils.preprocess import load_clip


@pytest.fixture
def shop(tmp_path):
    with faults.workshop(tmp_path, images=(130, 70)):
        yield


def test_killed_caching_goes_on_to_the_same_bytes(shop):
    killed, _, findings = faults.kill_caching(random.Random(0), 2)
    assert killed >= 2
    assert not findings


def test_killed_training_goes_on_to_the_same_bytes(workdir):
    killed, _, findings = faults.kill_training(random.Random(0), 2)
    assert killed >= 2
    assert not findings


def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(shop):
    runs, findings = faults.fill_disk(random.Random(0), 1)
    assert runs == 2
    assert not findings


def test_broken_files_end_in_one_line_or_in_what_they_say(tmp_path):
    with faults.workshop(tmp_path, images=(2, 8)):
        counts, findings = faults.fuzz(random.Random(0), 28)
    assert counts["inputs"] == 28
    assert counts["refused"] > 7
    assert not findings


@pytest.mark.parametrize("shape", [[10**6, 10**6], [2**40], [-1, 5]])
def test_a_small_safetensors_file_that_declares_a_huge_tensor_is_refused(tmp_path, shape):
    config, weights, _ = write_tiny_clip(tmp_path, "tiny-huge")
    for end in (8, 4 * 10**12):
        header = json.dumps(
            {"logit_scale": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        ).encode()
        weights.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(UserError, match=r"not (readable|weights of)"):
            load_clip(str(config), str(weights))
    weights.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(UserError, match=r"not (readable|weights of)"):
        load_clip(str(config), str(weights))


def test_a_small_pt_file_that_declares_a_huge_tensor_is_refused_as_weights(tmp_path):
    config, _, model = write_tiny_clip(tmp_path, "tiny-huge")
    torch.save(
        model.state_dict() | {"visual.proj": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "w.pt"
    )
    with pytest.raises(UserError, match=r"not (readable|weights of)"):
        load_clip(str(config), str(tmp_path / "w.pt"))


@pytest.mark.parametrize("key", ["layers", "width"])
def test_a_configuration_of_a_huge_model_is_refused_at_once(tmp_path, key):
    config, weights, _ = write_tiny_clip(tmp_path, "tiny-vast")
    content = json.loads(config.read_text())
    content["text_cfg"][key] = 10**8
    config.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{key} is 100000000"):
        load_clip(str(config), str(weights))


@pytest.mark.parametrize(
    ("main", "flags", "folder"),
    [
        (cache_embeddings.main, faults.CACHE, "embeddings"),
        (train_script.main, faults.TRAIN, "checkpoints"),
    ],
)
def test_a_file_where_a_folder_must_be_is_one_line(shop, script, main, flags, folder):
    os.chdir(Path("data").parent)
    if folder == "checkpoints":
        make_cache("tiny")
    Path(folder).write_text("")
    status, _, last = script(main, *flags)
    assert status == 2
    assert "move it away" in last


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_folder_that_may_not_be_written_is_one_line(workdir):
    make_cache("tiny")
    Path("checkpoints").mkdir(mode=0o755)
    Path("output.txt").touch(mode=0o666)
    Path("output.txt").chmod(0o666)
    before = {
        folder: folder.stat().st_mode
        for folder in (workdir, *workdir.parents)
        if str(folder).startswith(tempfile.gettempdir())
    }
    for folder, mode in before.items():
        folder.chmod(mode | 0o011)  # so that somebody else finds the way here
    assert (
        faults.finish(faults.start(train_script.main, faults.TRAIN, lambda: os.setuid(65534))) == 2
    )
    last = Path("output.txt").read_text().splitlines()[-1]
    assert "Permission denied; change its permissions" in last
    for folder, mode in before.items():
        folder.chmod(mode)
