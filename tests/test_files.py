"""Files are there in full or not at all, and nothing that is in one is run or believed unread."""

import errno
import os

import pytest
import torch

from datasets.shapes import world
from utils.cli import UserError, run_script
from utils.files import load_tensors, save_json, save_tensors, written_aside


def test_a_file_that_could_not_be_finished_leaves_what_was_there(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            with written_aside(tmp_path / "deeper" / "a.txt") as file:
                file.write(b"half")
                raise error
        assert list((tmp_path / "deeper").iterdir()) == []
    (tmp_path / "deeper" / "a.txt").write_bytes(b"before")
    with pytest.raises(ValueError):
        with written_aside(tmp_path / "deeper" / "a.txt") as file:
            file.write(b"half")
            raise ValueError
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "deeper").iterdir()] == [
        ("a.txt", b"before")
    ]


def test_a_file_appears_when_it_is_whole(tmp_path):
    with written_aside(tmp_path / "a.txt") as file:
        file.write(b"whole")
        file.flush()
        assert not (tmp_path / "a.txt").exists()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.txt", b"whole")]


def test_a_full_disk_leaves_nothing_and_is_told_with_the_file(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run_script(lambda argv: save_json([1], tmp_path / "a.json")) == 2
    assert list(tmp_path.iterdir()) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "disk is full" in line
    assert "a.json" in line


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        save_json({"x": float("nan")}, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_nested_tensors_are_checked_too(tmp_path):
    torch.save({"state_dict": {"w": [torch.zeros(1).expand(1000)]}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: .*shape \(1000,\)"):
        load_tensors(tmp_path / "a.pt")


def test_the_same_content_gives_the_same_bytes_whatever_the_name(tmp_path):
    for name in ("one.pt", "another.pt"):
        save_tensors({"z": torch.arange(5), "name": "x"}, tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()


@pytest.mark.parametrize("number", range(1, 12))
def test_ctrl_c_in_any_write_of_tensors_stays_ctrl_c_and_leaves_what_was_there(
    tmp_path, monkeypatch, number
):
    save_tensors({"z": torch.ones(2)}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    real, calls = torch.save, []

    class Interrupted:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            calls.append(content)
            if len(calls) == number:
                raise KeyboardInterrupt
            return self.file.write(content)

        def flush(self):
            self.file.flush()

    monkeypatch.setattr(torch, "save", lambda content, file: real(content, Interrupted(file)))
    with pytest.raises(KeyboardInterrupt):
        save_tensors({"z": torch.zeros(1000), "more": [torch.zeros(7)]}, tmp_path / "a.pt")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.pt", before)]


def test_what_dead_processes_began_is_removed_and_what_live_ones_do_is_not(workdir):
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    dead, alive, other = (
        workdir / name
        for name in (
            f".a.json.{process}.partial",
            f".a.json.{os.getppid()}.partial",
            f".b.json.{process}.partial",
        )
    )
    for path in (dead, alive, other):
        path.write_text("half")
    save_json([1], workdir / "a.json")
    assert sorted(workdir.iterdir()) == sorted([alive, other, workdir / "a.json"])
    (workdir / f".set.{process}.partial" / "train").mkdir(parents=True)
    world.make(workdir / "set", train=1, val=1)
    assert not (workdir / f".set.{process}.partial").exists()
