"""Caches in many files: read, shuffled, refused when broken, trained on without being loaded; and the tars they are made of."""

import gzip
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache, write_split
from datasets.parts import TarParts
from datasets.shapes import world
from datasets.shards import Shards, in_batches, shuffled
from datasets.tars import TarShards
from tests.conftest import make_cache
from tests.ranks import REPOSITORY, ranks_of, torchrun, wait_for
from tests.test_clip import Trap, write_tiny_clip
from utils.cli import UserError
from utils.files import save_json, save_tensors, sha256

FOLDER = Path("embeddings/many/train")


@pytest.fixture
def both(workdir):
    """The same split in one file, under ./embeddings/it, and in many, under ./embeddings/many."""
    make_cache("it", dim=16)
    one = EmbeddingCache("it", "train")
    lists = (one.image_of_caption.tolist(), one.captions, one.images, None)
    write_split(FOLDER, one.image, one.text, *lists, one.meta | {"embed_dim": 16, "dtype": "float16"}, shard_rows=32)
    return one


# Read.


def test_a_cache_in_many_files_reads_as_one(both):
    assert sorted(path.name for path in FOLDER.glob("text-*.pt")) == [f"text-{n:05d}.pt" for n in range(4)]
    loaded, mapped = EmbeddingCache("many", "train"), EmbeddingCache("many", "train", mapped=True)
    assert (loaded.mapped, mapped.mapped) == (False, True)
    assert torch.equal(loaded.image, both.image)
    assert torch.equal(loaded.text, both.text)
    assert (loaded.captions, loaded.images) == (both.captions, both.images)
    assert (mapped.captions, mapped.images) == (None, None)
    rows = torch.tensor([119, 0, 31, 32, 33, 0, 64])
    for cache in (loaded, mapped):
        assert torch.equal(cache.image_of_caption, both.image_of_caption)
        assert (len(cache.text), cache.embed_dim, cache.text.dtype) == (120, 16, torch.float16)
        for found, expected in zip(cache.pairs(rows), both.pairs(rows), strict=True):
            assert torch.equal(found, expected)
    assert loaded.digest == mapped.digest


def test_files_may_be_empty_and_few_are_open_at_a_time(workdir, monkeypatch):
    monkeypatch.setattr("datasets.shards.OPEN", 2)
    sizes, index = [0, 3, 0, 0, 2, 1, 0], []
    z = torch.randn(6, 4)
    for number, part in enumerate(z.split(sizes)):
        save_tensors(part.clone(), Path(f"image-{number:05d}.pt"))
        index.append([len(part), sha256(Path(f"image-{number:05d}.pt"))])
    shards = Shards(Path(), "image", index, 4, torch.float32)
    assert torch.equal(shards[torch.tensor([5, 0, 3, 2, 4, 1])], z[[5, 0, 3, 2, 4, 1]])
    assert len(shards._open) == 2
    assert torch.equal(shards.whole(), z)


def test_evaluation_reads_a_cache_in_many_files(script, workdir):
    make_cache("it", dim=16)
    for name, shard_rows in (("one", None), ("many", 32)):
        for split in ("train", "val"):
            it = EmbeddingCache("it", split)
            meta = {"embed_dim": 16, "dtype": "float16"}
            folder = Path("embeddings") / name / split
            write_split(
                folder, it.image, it.text, it.image_of_caption.tolist(), it.captions, it.images, None, meta, shard_rows
            )
        training = ("--dataset", name, "--recipe", "small", "--epochs", 2, "--precision", "fp32", "--batch-size", 120)
        assert script(train_script.main, *training)[0] == 0
        assert script(eval_script.main, "--dataset", name, "--resamples", 0, "--no-plots", "--uncer_levels", 4)[0] == 0
    one, many = (json.loads(Path(f"results/{name}/0/asymvlm-psd.json").read_text()) for name in ("one", "many"))
    assert one["t2i"] == pytest.approx(many["t2i"], abs=0.1)  # a batch of all captions: only their order is another


# Shuffled.


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


# Refused.


def corrupt(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace(value, with_sum=True):
    """Another tensor in a file, and, unless the index is to be left as it is, its sum in the index."""

    def change(file):
        save_tensors(value, file)
        meta = json.loads((FOLDER / "meta.json").read_text())
        kind, _, number = file.stem.partition("-")
        if with_sum and number:
            meta["shards"][kind][int(number)][1] = sha256(file)
        elif with_sum:
            meta["shards"]["image_of_caption"] = sha256(file)
        (FOLDER / "meta.json").write_text(json.dumps(meta))

    return change


def swap(file):
    """Two files of the same shape in each other's place."""
    other = file.with_name("text-00000.pt")
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def put(key, value):
    def change(file):
        meta = json.loads(file.read_text())
        (meta["shards"] if key in ("image", "text", "image_of_caption") else meta)[key] = value
        file.write_text(json.dumps(meta))

    return change


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("image-00001.pt", Path.unlink, "image-00001.pt: no such file"),
        ("text-00002.pt", corrupt, "text-00002.pt: not the file that meta.json names: its SHA-256 differs"),
        ("text-00001.pt", swap, "pt: not the file that meta.json names: its SHA-256 differs"),
        (
            "image_of_caption.pt",
            replace(torch.zeros(120, dtype=torch.int64), with_sum=False),
            "image_of_caption.pt: not the file that meta.json names",
        ),
        ("text-00002.pt", replace(torch.ones(31, 16).half()), "text-00002.pt: not the tensor of shape (32, 16)"),
        (
            "text-00002.pt",
            replace(torch.ones(32, 16)),
            "text-00002.pt: not the tensor of shape (32, 16), torch.float16",
        ),
        ("text-00000.pt", replace(torch.full((32, 16), float("nan")).half()), "text-00000.pt: row"),
        ("image_of_caption.pt", Path.unlink, "image_of_caption.pt: no such file"),
        (
            "image_of_caption.pt",
            replace(torch.full((120,), 40)),
            "image_of_caption.pt: expected 120 image rows from 0 to 39",
        ),
        ("image_of_caption.pt", replace(torch.zeros(120)), "image_of_caption.pt: expected 120 image rows"),
        ("meta.json", put("text", [[0, "x"]]), "'shards' is not the index"),
        ("meta.json", put("text", [[-5, "x"], [125, "x"]]), "'shards' is not the index"),
        ("meta.json", put("image", 3), "'shards' is not the index"),
        ("meta.json", put("image_of_caption", None), "'shards' is not the index"),
        ("meta.json", put("embed_dim", "16"), "does not tell embed_dim and dtype"),
        ("meta.json", put("dtype", "Tensor"), "does not tell embed_dim and dtype"),
        ("meta.json", put("shards", []), "'shards' is not the index"),
    ],
)
def test_a_file_that_cannot_be_right_is_one_line(both, script, file, change, expected):
    change(FOLDER / file)
    status, _, line = script(
        train_script.main, "--dataset", "many", "--recipe", "small", "--epochs", 1, "--precision", "fp32"
    )
    assert status == 2
    assert expected in line
    assert not list(Path("checkpoints").rglob("*.pt"))


def test_a_row_that_is_not_finite_is_refused_by_evaluation_too(both, script):
    replace(torch.ones(32, 16).half().index_fill(0, torch.tensor([7]), float("nan")))(FOLDER / "text-00001.pt")
    status, _, line = script(eval_script.main, "--dataset", "many", "--split", "train")
    assert status == 2
    assert "text-00001.pt: row 7 is not finite" in line


def test_a_captions_file_that_is_missing_is_named(both):
    (FOLDER / "captions-00001.json").write_text("[]")
    with pytest.raises(UserError, match=r"captions-00001\.json: expected a list of 32 entries"):
        EmbeddingCache("many", "train")


def test_one_file_or_many_replaces_the_other(both):
    names = lambda: {path.name for path in FOLDER.iterdir()}  # noqa: E731
    content = (both.image, both.text, both.image_of_caption.tolist(), both.captions, both.images, None)
    write_split(FOLDER, *content, {"embed_dim": 16, "dtype": "float16"})
    assert names() == {"image.pt", "text.pt", "cap_id_to_img_id.json", "captions.json", "images.json", "meta.json"}
    write_split(FOLDER, *content, {"embed_dim": 16, "dtype": "float16"}, shard_rows=1000)
    assert names() == {
        "image-00000.pt",
        "text-00000.pt",
        "captions-00000.json",
        "images-00000.json",
        "image_of_caption.pt",
        "meta.json",
    }


# Larger than memory.

ANONYMOUS = """
import re, sys, threading, time
from pathlib import Path
import train
from utils.cli import run
most, ended = 0, False
def watch():
    global most
    while not ended:
        most = max(most, int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
        time.sleep(0.01)
thread = threading.Thread(target=watch)
thread.start()
status = run(train.main, sys.argv[1:])
ended = True
thread.join()
print("most:", most)
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: anonymous memory cannot be read")
def test_a_cache_of_2_gb_is_trained_on_within_1_gb(workdir):
    rows, files, width = 2048, 31, 4096  # 2.08 GB in float32, images and texts
    folder = Path("embeddings/large/train")
    index = []
    for number in range(files):
        z = torch.randn(rows, width, generator=torch.Generator().manual_seed(number))
        for kind in ("image", "text"):
            save_tensors(z, folder / f"{kind}-{number:05d}.pt")
        index.append([rows, sha256(folder / f"image-{number:05d}.pt")])
    save_tensors(torch.arange(rows * files), folder / "image_of_caption.pt")
    shards = {"image": index, "text": index, "image_of_caption": sha256(folder / "image_of_caption.pt")}
    save_json({"embed_dim": width, "dtype": "float32", "shards": shards}, folder / "meta.json")
    size = sum(file.stat().st_size for file in folder.glob("*.pt"))
    flags = (
        "--dataset",
        "large",
        "--recipe",
        "small",
        "--epochs",
        1,
        "--batch-size",
        512,
        "--optimizer",
        "sgd",
        "--shuffle-buffer",
        10_000,
    )
    done = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, *map(str, flags)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    for file in folder.glob("*.pt"):
        file.unlink()  # pytest keeps the folders of its last runs
    assert done.returncode == 0, done.stderr
    assert size > 2e9
    most = int(done.stdout.split("most:")[1])
    print(f"a cache of {size / 1e9:.2f} GB, at most {most / 1e9:.2f} GB of anonymous memory")
    assert most < 1e9
    assert json.loads(Path("checkpoints/large/0/asymvlm-psd.jsonl").read_text())["epoch"] == 1


# Tars.


def write_tar(path, samples):
    """Args: samples: {file name: bytes}, in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """{key: (PNG bytes, caption)} of 600 pictures of the built-in data set."""
    root = tmp_path_factory.mktemp("shapes") / "shapes"
    world.make(root, train=600, val=10)
    document = json.loads((root / "annotations/captions_train.json").read_text())
    caption_of = {entry["image_id"]: entry["caption"] for entry in document["annotations"]}
    return {
        f"{n:09d}": ((root / "train" / e["file_name"]).read_bytes(), caption_of[e["id"]])
        for n, e in enumerate(document["images"])
    }


def samples_of(pictures, start, stop):
    """What img2dataset writes of some pictures."""
    files = {}
    for key, (picture, caption) in list(pictures.items())[start:stop]:
        files |= {
            f"{key}.png": picture,
            f"{key}.txt": caption.encode(),
            f"{key}.json": json.dumps({"caption": caption, "key": key}).encode(),
        }
    return files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), "tiny-tars")


@pytest.fixture
def call(script, tiny, monkeypatch, capsys):
    """Calls cache_embeddings.py on ./tars with a tiny CLIP; returns (exit status, stderr)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = (
        "--dataset",
        "webdataset",
        "--data-root",
        "tars",
        "--split",
        "train",
        "--name",
        "web",
        "--device",
        "cpu",
        "--workers",
        0,
    )
    Path("tars").mkdir()

    def with_flags(*more):
        capsys.readouterr()
        status = cache_embeddings_run(*flags, "--model", tiny[0], "--pretrained", tiny[1], *more)
        return status, capsys.readouterr().err

    with_flags.flags = [*map(str, flags), "--model", str(tiny[0]), "--pretrained", str(tiny[1])]
    return with_flags


def cache_embeddings_run(*flags):
    from utils.cli import run

    return run(cache_embeddings.main, [str(flag) for flag in flags])


def all_bytes(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def test_a_tar_becomes_the_same_embeddings_as_its_pictures_and_captions(call, pictures, tiny):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 70))  # more than a chunk of 64
    write_tar("tars/00001.tar", samples_of(pictures, 70, 75))
    assert call()[0] == 0
    cache = EmbeddingCache("web", "train")
    keys = list(pictures)[:75]
    assert cache.images == keys
    assert cache.captions == [pictures[key][1] for key in keys]
    assert cache.image_of_caption.tolist() == list(range(75))
    assert (cache.meta["image_count"], cache.meta["skipped"], [rows for rows, _ in cache.meta["shards"]["text"]]) == (
        75,
        [],
        [70, 5],
    )
    Path("table").mkdir()
    with open("table/train.csv", "w", encoding="utf-8") as file:
        file.write("filepath\ttitle\n")
        for key in keys:
            Path(f"table/{key}.png").write_bytes(pictures[key][0])
            file.write(f"{key}.png\t{pictures[key][1]}\n")
    plain = (
        "--dataset",
        "csv",
        "--data-root",
        "table",
        "--csv-separator",
        "\\t",
        "--split",
        "train",
        "--name",
        "plain",
        "--device",
        "cpu",
    )
    assert cache_embeddings_run(*plain, "--workers", 0, "--model", tiny[0], "--pretrained", tiny[1]) == 0
    expected = EmbeddingCache("plain", "train")
    torch.testing.assert_close(
        cache.image.float(), expected.image.float(), rtol=2e-2, atol=2e-3
    )  # other chunks: other last bits
    torch.testing.assert_close(cache.text.float(), expected.text.float(), rtol=2e-2, atol=2e-3)
    assert (
        cache.image.float() - cache.image.float().roll(1, dims=0)
    ).abs().max() > 0.1  # rows differ by more than that


def test_bytes_depend_on_neither_batch_size_nor_workers(call, pictures):
    for number in range(3):
        write_tar(f"tars/{number:05d}.tar", samples_of(pictures, 70 * number, 70 * number + 70))
    assert call("--name", "a")[0] == 0
    assert call("--name", "b", "--workers", 2, "--batch-size", 1, "--data-root", "tars/{00000..00002}.tar")[0] == 0
    assert all_bytes("embeddings/a") == all_bytes("embeddings/b")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc: ranks cannot be found")
def test_a_hundred_tars_cached_by_two_ranks_killed_twice_are_those_of_one(call, pictures):
    for number in range(100):
        write_tar(f"tars/{number:05d}.tar", samples_of(pictures, 6 * number, 6 * number + 6))
    assert call("--name", "unbroken")[0] == 0
    parts = Path("embeddings/web/train/.parts")

    def count():
        return len(list(parts.glob("notes-*.json")))

    for ranks, more in ((2, 10), (3, 10)):
        before = count()
        process = torchrun(ranks, REPOSITORY / "cache_embeddings.py", *call.flags, wait=False)
        wait_for(lambda: len(ranks_of(process)) == ranks, process)  # noqa: B023  called at once
        numbers = [process.pid, *ranks_of(process).values()]
        wait_for(lambda: count() >= before + more, process)  # noqa: B023  called at once
        for number in numbers:
            os.kill(number, signal.SIGKILL)
        process.communicate()
        assert before + more <= count() < 100
        assert not Path("embeddings/web/train/meta.json").exists()
    done = torchrun(2, REPOSITORY / "cache_embeddings.py", *call.flags)
    assert done.returncode == 0, done.stdout
    assert all_bytes("embeddings/web") == all_bytes("embeddings/unbroken")


def test_a_run_that_is_stopped_while_it_moves_its_files_goes_on(call, pictures, monkeypatch):
    for number in range(3):
        write_tar(f"tars/{number:05d}.tar", samples_of(pictures, 5 * number, 5 * number + 5))
    assert call("--name", "unbroken")[0] == 0
    real, moved = os.replace, []

    def replace_some(source, target):
        if Path(source).parent.name == ".parts" and "partial" not in Path(source).name:
            if len(moved) == 5:
                raise KeyboardInterrupt
            moved.append(target)
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("datasets.parts.os.replace", replace_some)
        assert call()[0] == 130
    assert len(moved) == 5
    with pytest.raises(UserError, match="unfinished"):
        EmbeddingCache("web", "train")
    monkeypatch.setattr(TarParts, "write_tar", None)  # nothing is encoded again
    assert call()[0] == 0
    assert all_bytes("embeddings/web") == all_bytes("embeddings/unbroken")


def test_a_tar_that_was_mended_is_encoded_again_and_the_others_are_not(call, pictures, monkeypatch):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 5))
    write_tar("tars/00001.tar", samples_of(pictures, 5, 10) | {"000000005.png": b"broken"})
    status, stderr = call()
    assert (status, "tars/00001.tar: 000000005: " in stderr, "--max-broken" in stderr) == (2, True, True)
    write_tar("tars/00001.tar", samples_of(pictures, 5, 10))
    written, write = [], TarParts.write_tar
    monkeypatch.setattr(
        TarParts, "write_tar", lambda self, number, *rest: written.append(number) or write(self, number, *rest)
    )
    assert call()[0] == 0
    assert written == [1]
    assert len(EmbeddingCache("web", "train").text) == 10


def test_broken_samples_are_named_and_fatal_beyond_what_is_allowed(call, pictures, monkeypatch):
    files = samples_of(pictures, 0, 6)
    files["000000000.png"] = b"no picture"
    del files["000000001.png"]
    del files["000000002.txt"], files["000000002.json"]
    files["000000003.txt"] = b"\xff\xfe"
    del files["000000004.txt"]  # its .json has the caption
    write_tar("tars/00000.tar", files)
    write_tar("tars/00001.tar", samples_of(pictures, 6, 9))
    status, stderr = call()
    assert status == 2
    for key, reason in (
        ("0", "cannot identify"),
        ("1", "no picture"),
        ("2", "no caption"),
        ("3", "no caption in UTF-8 beside it"),
    ):
        assert f"00000.tar: 00000000{key}: {reason}" in stderr
    assert "(4 broken samples so far" in stderr.splitlines()[-1]
    assert call("--max-broken", 3)[0] == 2
    assert not Path("embeddings/web/train/meta.json").exists()
    assert call("--max-broken", 4)[0] == 0
    cache = EmbeddingCache("web", "train")
    assert cache.images == [f"{n:09d}" for n in (4, 5, 6, 7, 8)]
    assert cache.captions[0] == pictures["000000004"][1]
    assert [name for name, _ in cache.meta["skipped"]] == [f"00000.tar: 00000000{n}" for n in range(4)]
    assert "4 broken images were left out" in call()[1].splitlines()[-1]
    assert call("--max-broken", 4)[0] == 0


def test_a_tar_of_broken_samples_only_is_an_empty_file_among_the_others(call, pictures, script):
    write_tar("tars/00000.tar", {"a.png": b"x", "a.txt": b"a cat"})
    write_tar("tars/00001.tar", samples_of(pictures, 0, 8))
    assert call("--max-broken", 1)[0] == 0
    assert [rows for rows, _ in EmbeddingCache("web", "train", mapped=True).meta["shards"]["image"]] == [0, 8]
    training = ("--dataset", "web", "--recipe", "small", "--epochs", 2, "--batch-size", 3)
    assert script(train_script.main, *training)[0] == 0
    Path("tars/00001.tar").unlink()
    status, stderr = call("--max-broken", 1, "--name", "none")
    assert (status, "holds no sample" in stderr.splitlines()[-1]) == (2, True)


@pytest.mark.parametrize("cut", [700, 1024, 5000])
def test_a_tar_that_was_cut_off_is_refused(call, pictures, cut):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 5))
    content = Path("tars/00000.tar").read_bytes().rstrip(b"\0")
    Path("tars/00000.tar").write_bytes(content[: len(content) - cut])
    status, stderr = call()
    assert (status, "00000.tar: is cut off, or no tar" in stderr.splitlines()[-1]) == (2, True)
    assert not Path("embeddings").exists()


def test_a_tar_that_is_broken_inside_is_refused(call, pictures):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 5))
    write_tar("tars/00001.tar", samples_of(pictures, 5, 10))
    content = bytearray(Path("tars/00001.tar").read_bytes())
    content[512 * 3 : 512 * 9] = b"\xff" * 512 * 6
    Path("tars/00001.tar").write_bytes(content)
    status, stderr = call()
    last = stderr.splitlines()[-1]
    assert status == 2
    assert "00001.tar: " in last
    assert not Path("embeddings/web/train/meta.json").exists()


@pytest.mark.parametrize("how", ["pipe", "failing pipe", "zeros"])
def test_a_tar_that_ends_between_two_samples_is_refused(call, pictures, how):
    write_tar("tars/whole.bin", samples_of(pictures, 0, 6))
    with tarfile.open("tars/whole.bin") as tar:
        start = tar.getmembers()[9].offset  # of the fourth sample
    content = Path("tars/whole.bin").read_bytes()
    Path("tars/cut.bin").write_bytes(content[:start])
    Path("zeros.tar").write_bytes(content[:start] + bytes(2**21))
    root = {
        "pipe": "pipe:cat tars/cut.bin",
        "failing pipe": "pipe:cat tars/whole.bin; exec >&-; sleep 0.3; exit 18",
        "zeros": "zeros.tar",
    }[how]
    status, stderr = call("--data-root", root)
    assert (status, f"{root}: cannot be used to its end" in stderr.splitlines()[-1]) == (2, True)
    assert not Path("embeddings/web/train/meta.json").exists()


def test_whole_tars_are_read_through_pipes_and_packed_under_any_name(call, pictures):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 6))
    assert call("--name", "plain")[0] == 0
    Path("packed.tar").write_bytes(gzip.compress(Path("tars/00000.tar").read_bytes()))
    for root in ("packed.tar", "pipe:cat tars/00000.tar", "tars/*.tar"):
        assert call("--name", "other", "--data-root", root, "--overwrite")[0] == 0
        for file in ("image-00000.pt", "text-00000.pt", "captions-00000.json"):
            assert (
                Path(f"embeddings/other/train/{file}").read_bytes()
                == Path(f"embeddings/plain/train/{file}").read_bytes()
            )


def test_keys_with_dots_are_refused_and_other_fields_are_not(call, pictures):
    files = samples_of(pictures, 0, 3)
    write_tar("tars/00000.tar", files | {"000000002.mask.png": b"not looked at", "000000002.cls": b"7"})
    assert call()[0] == 0
    assert len(EmbeddingCache("web", "train").text) == 3
    write_tar("tars/00000.tar", {name.replace("00000000", "img.00"): content for name, content in files.items()})
    status, stderr = call("--name", "dots")
    assert (status, "img.000.png has a dot in its key" in stderr.splitlines()[-1]) == (2, True)


def test_other_tars_of_the_same_names_are_other_tars(call, pictures):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 5))
    assert call()[0] == 0
    Path("more").mkdir()
    write_tar("more/00000.tar", samples_of(pictures, 5, 11))
    status, stderr = call("--data-root", "more")
    assert (status, "tar_files was" in stderr.splitlines()[-1]) == (2, True)
    assert call("--data-root", "more", "--overwrite")[0] == 0
    assert EmbeddingCache("web", "train").captions == [caption for _, caption in list(pictures.values())[5:11]]


def test_a_url_whose_samples_were_broken_is_looked_at_again(call, pictures):
    write_tar("tars/a.tar", samples_of(pictures, 0, 5) | {"000000001.png": b"broken"})
    assert call("--data-root", "pipe:cat tars/a.tar")[0] == 2
    write_tar("tars/a.tar", samples_of(pictures, 0, 5))
    assert call("--data-root", "pipe:cat tars/a.tar")[0] == 0
    assert len(EmbeddingCache("web", "train").text) == 5


def test_tars_leave_nothing_of_what_was_there_before(call, pictures):
    make_cache("web", images=4, captions_per_image=1, splits=("train",), relevance=[[0, 1]] * 4)
    write_tar("tars/00000.tar", samples_of(pictures, 0, 4))
    assert call("--overwrite")[0] == 0
    assert EmbeddingCache("web", "train").relevance is None
    names = {path.name for path in Path("embeddings/web/train").iterdir()}
    assert names == {
        "image-00000.pt",
        "text-00000.pt",
        "captions-00000.json",
        "images-00000.json",
        "image_of_caption.pt",
        "meta.json",
    }


def test_a_cache_that_another_run_finished_meanwhile_is_not_made_over(call, pictures, monkeypatch):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 5))
    Path("more").mkdir()
    write_tar("more/00000.tar", samples_of(pictures, 5, 11))
    load = cache_embeddings.load_clip

    def load_slowly(*arguments):
        monkeypatch.setattr(cache_embeddings, "load_clip", load)
        assert call()[0] == 0  # the other run
        return load(*arguments)

    monkeypatch.setattr(cache_embeddings, "load_clip", load_slowly)
    status, stderr = call("--data-root", "more")
    assert (status, "was made with other settings" in stderr.splitlines()[-1]) == (2, True)
    assert len(EmbeddingCache("web", "train").text) == 5


def test_nothing_in_a_tar_is_unpickled(call, pictures, workdir):
    trap = pickle.dumps(Trap(workdir / "sprung"))
    write_tar("tars/00000.tar", samples_of(pictures, 0, 2) | {"000000001.pyd": trap, "000000001.pth": trap})
    assert call()[0] == 0
    assert not (workdir / "sprung").exists()
    pickle.loads(trap)
    assert (workdir / "sprung").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--data-root", "tars/{00000..00003}.tar"), "tars/00001.tar: no such file"),
        (("--data-root", "nowhere"), "nowhere: no such file"),
        (("--data-root", "empty"), "expected .tar files, found an empty folder"),
        (("--split", "train", "val"), "the tars are one split"),
        (("--skip-broken",), "takes --max-broken instead"),
        (("--shard-rows", "5"), "has a file a tar"),
        (("--max-broken", "-1"), "--max-broken"),
        (("--dataset", "coco", "--max-broken", "1"), "--max-broken: goes with --dataset webdataset"),
        (("--data-root", "pipe:cat nowhere.tar"), "pipe:cat nowhere.tar: cannot be used to its end: "),
        (("--data-root", "tars/{00000..00003.tar"), "tars/{00000..00003.tar: not a pattern of paths"),
        (("--data-root", "tars/${USER}.tar"), "not a pattern of paths"),
        (("--data-root", "tars/1*.tar"), "expected .tar files, found only 00000.tar"),
    ],
)
def test_what_the_user_can_put_right_ends_in_one_line(call, pictures, flags, expected):
    Path("empty").mkdir()
    write_tar("tars/00000.tar", samples_of(pictures, 0, 2))
    status, stderr = call(*flags)
    assert status == 2
    assert expected in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


def test_the_missing_package_is_named(call, pictures, monkeypatch):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 2))
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match="pip install webdataset"):
        TarShards("tars/{00000..00000}.tar", "train", None)


def test_an_ordinary_data_set_goes_into_files_of_so_many_rows(script, tiny, workdir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    world.make("small", train=40, val=10)
    flags = (
        "--dataset",
        "shapes",
        "--data-root",
        "small",
        "--device",
        "cpu",
        "--workers",
        0,
        "--model",
        tiny[0],
        "--pretrained",
        tiny[1],
    )
    assert script(cache_embeddings.main, *flags, "--name", "one")[0] == 0
    assert script(cache_embeddings.main, *flags, "--name", "many", "--shard-rows", 16)[0] == 0
    one, many = (EmbeddingCache(name, "val") for name in ("one", "many"))
    assert torch.equal(one.text, many.text)
    assert (one.captions, one.relevance, one.meta["caption_ids"]) == (
        many.captions,
        many.relevance,
        many.meta["caption_ids"],
    )
    assert EmbeddingCache("many", "val", mapped=True).mapped
    assert "whole already" in many_again(script, flags)


def many_again(script, flags):
    import logging

    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    status = None

    def main(argv):
        logging.getLogger().addHandler(handler)
        return cache_embeddings.main(argv)

    status, _, _ = script(main, *flags, "--name", "many", "--shard-rows", 16)
    logging.getLogger().removeHandler(handler)
    assert status == 0
    return " ".join(records)
