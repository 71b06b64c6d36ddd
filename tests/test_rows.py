"""Rows of embeddings in memory and on the disk: one interface, an epoch's order, and a cache larger than memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datasets import rows as rows_module
from datasets.embedding import EmbeddingCache
from datasets.rows import RowsInMemory, RowsOnDisk, SomeRows, in_batches, shuffled
from tests.conftest import REPOSITORY, make_cache
from tests.devices import PretendedDevice
from utils.cli import UserError
from utils.files import save_json, save_tensors, sha256

SIZES = (0, 3, 0, 0, 2, 1, 0)  # rows of each file; files may be empty


def on_disk(z, sizes=SIZES):
    """RowsOnDisk of a tensor, in the current folder."""
    index = []
    for number, part in enumerate(z.split(list(sizes))):
        file = Path(f"image-{number:05d}.pt")
        save_tensors(part.clone(), file)
        index.append([len(part), sha256(file)])
    return RowsOnDisk(Path(), "image", index, z.shape[1], z.dtype)


def some(of):
    """Makes the same rows of twice as many, of which every other is chosen."""
    return lambda z: SomeRows(of(z.repeat_interleave(2, dim=0)), torch.arange(0, 2 * len(z), 2))


MAKERS = [
    RowsInMemory,
    on_disk,
    some(RowsInMemory),
    some(lambda z: on_disk(z, (5, 0, 7))),
    some(some(RowsInMemory)),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_are_read_the_same_way_wherever_they_lie(workdir, make, dtype):
    z = torch.randn(6, 4).to(dtype)
    rows = make(z)
    assert (len(rows), rows.shape, rows.dtype) == (6, (6, 4), dtype)
    for wanted in ([5, 0, 3, 2, 4, 1], [3, 3, 0], [5], []):
        found = rows[torch.tensor(wanted, dtype=torch.int64)]
        assert torch.equal(found, z[wanted])
        assert found.dtype == dtype
    assert torch.equal(rows.read(), z)
    assert rows.to("cpu") is rows
    (order,) = rows.order(torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(6))
    assert order.dtype == torch.int64
    (again,) = rows.order(torch.Generator().manual_seed(0))
    assert torch.equal(order, again)


@pytest.mark.parametrize("make", MAKERS)
def test_rows_come_on_the_device_that_is_asked_for(workdir, make):
    rows = make(torch.randn(6, 4)).to("meta")
    numbers = torch.tensor([5, 0], device=rows.device)
    assert rows[numbers].device == torch.device("meta")
    assert rows.read().device == torch.device("meta")


def test_few_files_are_open_at_a_time(workdir, monkeypatch):
    monkeypatch.setattr(rows_module, "OPEN", 2)
    z = torch.randn(6, 4)
    rows = on_disk(z)
    assert torch.equal(rows[torch.tensor([5, 0, 3, 2, 4, 1])], z[[5, 0, 3, 2, 4, 1]])
    assert rows._shard.cache_info().currsize == 2
    assert torch.equal(rows.read(), z)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_on_the_disk_that_is_not_finite_is_named_when_it_is_read(workdir, bad):
    z = torch.randn(6, 4)
    z[4, 2] = bad
    rows = on_disk(z)
    assert torch.equal(rows[torch.tensor([5, 3])], z[[5, 3]])
    for read in (lambda: rows[torch.tensor([5, 4])], rows.read):
        with pytest.raises(UserError, match=r"image-00004\.pt: row 1 is not finite"):
            read()


# An epoch's order.


def test_an_epoch_has_every_row_once_and_every_seed_its_own_order():
    sizes = [7, 0, 5, 30, 1, 12]
    orders = []
    for seed in (0, 0, 1):
        batches = list(in_batches(shuffled(sizes, 10, torch.Generator().manual_seed(seed)), 8))
        assert [len(batch) for batch in batches] == [8] * 6 + [7]
        orders.append(torch.cat(batches).tolist())
        assert sorted(orders[-1]) == list(range(55))
    assert orders[0] == orders[1] != orders[2]


def test_rows_are_shuffled_among_the_files_of_one_buffer():
    sizes = [10] * 40
    buffers = list(shuffled(sizes, 40, torch.Generator().manual_seed(0)))
    files = [sorted(set((rows // 10).tolist())) for rows in buffers]
    assert [len(rows) for rows in buffers] == [40] * 10
    assert all(len(four) == 4 for four in files)
    assert files != [list(range(n, n + 4)) for n in range(0, 40, 4)]  # other files than neighbours
    assert any((rows[:10] // 10).unique().numel() > 1 for rows in buffers)  # and mixed


def test_a_buffer_of_everything_is_a_full_shuffle():
    (rows,) = shuffled([3, 4, 5], 10**9, torch.Generator().manual_seed(0))
    assert sorted(rows.tolist()) == list(range(12))


# Larger than memory.

ANONYMOUS = """
import re, sys, threading, time
from pathlib import Path
import train
from models import layers
from utils.cli import run_script
layers.HIDDEN = 16  # hidden units: what the adaptor itself takes is not the question, only time
name, most = "start", {}
def watch():
    while name != "ended":
        now = int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        most[name] = max(most.get(name, 0), now)
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
status = 0
for name in ("small", "large"):
    status = status or run_script(train.main, ["--dataset", name, *sys.argv[1:]])
name = "ended"
thread.join()
print("more:", most["large"] - most["small"])
sys.exit(status)
"""


def write_large(name, files, rows=2048, width=1024):
    """A cache of float32 in many files. Returns: its size in bytes."""
    folder = Path("embeddings") / name / "train"
    index = []
    for number in range(files):
        z = torch.randn(rows, width, generator=torch.Generator().manual_seed(number))
        for kind in ("image", "text"):
            save_tensors(z, folder / f"{kind}-{number:05d}.pt")
        index.append([rows, sha256(folder / f"image-{number:05d}.pt")])
    save_tensors(torch.arange(rows * files), folder / "image_of_caption.pt")
    shards = {
        "image": index,
        "text": index,
        "image_of_caption": sha256(folder / "image_of_caption.pt"),
    }
    save_json({"embed_dim": width, "dtype": "float32", "shards": shards}, folder / "meta.json")
    return sum(file.stat().st_size for file in folder.glob("*.pt"))


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="no /proc: anonymous memory cannot be read"
)
@pytest.mark.parametrize("share", [0, 0.05])
def test_training_on_a_cache_of_300_mb_takes_no_100_mb_more_than_on_a_small_one(workdir, share):
    sizes = {"small": write_large("small", 2), "large": write_large("large", 20)}
    flags = "--recipe small --epochs 1 --batch-size 256 --optimizer sgd --shuffle-buffer 5000 --device cpu"
    flags += f" --validation {share}"
    done = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, *flags.split()],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    for file in Path("embeddings").rglob("*.pt"):
        file.unlink()  # pytest keeps the folders of its last runs
    assert done.returncode == 0, done.stderr
    assert sizes["large"] - sizes["small"] > 3e8 - 1e7
    more = int(done.stdout.split("more:")[1])
    print(
        f"{(sizes['large'] - sizes['small']) / 1e6:.0f} MB more of cache, {more / 1e6:.0f} MB of anonymous memory"
    )
    assert more < 1e8
    for name in sizes:
        assert json.loads(Path(f"checkpoints/{name}/0/asymvlm-psd.jsonl").read_text())["epoch"] == 1


@pytest.mark.parametrize("make", [on_disk, some(lambda z: on_disk(z, (5, 0, 7)))])
def test_loaded_rows_are_read_on_the_device_and_others_from_the_disk(workdir, make, monkeypatch):
    z = torch.randn(6, 4)
    with PretendedDevice("cuda") as device:
        rows = make(z).to("cuda")
        rows.load(torch.tensor([4, 3]), max_rows=100)
        with monkeypatch.context() as patch:
            on_disk_rows = getattr(rows, "_rows", rows)
            patch.setattr(on_disk_rows, "_shard", None)  # it would fail if it were called
            found = rows[torch.tensor([4, 3, 4])]
        assert found.device.type == "cuda"
        mixed = rows[torch.tensor([0, 4])]
        assert torch.equal(found.cpu(), z[[4, 3, 4]])
        assert torch.equal(mixed.cpu(), z[[0, 4]])
        rows.load(torch.tensor([0]), max_rows=1)  # more rows than that: nothing is loaded
        assert torch.equal(rows[torch.tensor([0])].cpu(), z[[0]])
        assert not [wait for wait in device.waits if "device.py" in wait]  # batches are sent


def test_batches_of_a_cache_in_shards_are_the_same_on_a_device(workdir):
    meta = {"model": "none", "pretrained": "none", "embed_dim": 8, "dtype": "float16"}
    make_cache("tiny", 12, 2, 8, meta=meta, shard_rows=5)
    batches = []
    for name in ("cpu", "cuda"):
        with PretendedDevice("cuda"):
            cache = EmbeddingCache("tiny", "train", mapped=True).to(name)
            for rows in cache.batches(4, torch.Generator().manual_seed(0), buffer=9):
                batches.append([rows, *(z.cpu() for z in cache.pairs(rows))])
    half = len(batches) // 2
    assert half == 6
    torch.testing.assert_close(batches[:half], batches[half:], rtol=0, atol=0)
