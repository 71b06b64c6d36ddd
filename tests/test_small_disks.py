"""Real small file systems: a /dev/shm as in a container, a disk that fills up in the middle of a write."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, all_bytes, make_cache

MOUNT = ["unshare", "--map-root-user", "--mount", "bash", "-e", "-c"]


def may_mount():
    try:
        done = subprocess.run([*MOUNT, "mount -t tmpfs tmpfs /mnt"], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


needs_mount = pytest.mark.skipif(not may_mount(), reason="this machine does not let a user mount")


def python(script, *flags):
    return " ".join([sys.executable, str(REPOSITORY / script), *map(str, flags)])


def cache_command(tiny, name, workers):
    flags = "--dataset shapes --split val --data-root data --device cpu --precision fp32".split()
    clip = ["--model", tiny[0], "--pretrained", tiny[1]]
    return python("cache_embeddings.py", *flags, *clip, "--name", name, "--workers", workers)


@pytest.fixture
def drawn(data, workdir):
    (workdir / "data").symlink_to(data)
    return workdir


@needs_mount
def test_a_small_shared_memory_is_enough(drawn, tiny):
    commands = [
        "mount -t tmpfs -o size=64k tmpfs /dev/shm",
        cache_command(tiny, "two", 2),
        cache_command(tiny, "none", 0),
    ]
    done = subprocess.run(
        [*MOUNT, "; ".join(commands)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert all_bytes("embeddings/two") == all_bytes("embeddings/none")


@needs_mount
def test_a_disk_that_fills_up_is_one_line_and_training_goes_on_with_room(workdir):
    make_cache("tiny")
    (workdir / "checkpoints").mkdir()
    flags = "--dataset tiny --recipe small --epochs 3 --save-every 1 --device cpu".split()
    train = python("train.py", *flags)
    commands = [
        "mount -t tmpfs -o size=20m tmpfs checkpoints",  # a checkpoint has 9 MB, a state 27
        f"{train} 2> first.txt && exit 7 || echo $? > status.txt",
        "ls -A checkpoints/tiny/0 > left.txt",
        "mount -o remount,size=200m checkpoints",
        f"{train} --resume 2> second.txt",
        "cp checkpoints/tiny/0/asymvlm-psd.pt .",
    ]
    done = subprocess.run(
        [*MOUNT, "\n".join(commands)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert Path("status.txt").read_text() == "2\n"
    last = Path("first.txt").read_text().splitlines()[-1]
    assert "train.py: error: the disk is full while writing checkpoints/tiny/0/" in last
    assert "Traceback" not in Path("first.txt").read_text()
    assert ".partial" not in Path("left.txt").read_text()
