"""WebDataset tars through cache_embeddings.py: the same embeddings, broken samples, tars that are cut, kills."""

import gzip
import io
import json
import os
import pickle
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

import cache_embeddings
import train as train_script
from datasets.embedding import EmbeddingCache
from datasets.shapes import world
from datasets.tars import TarSplit, TarUnit
from tests import faults
from tests.conftest import Trap, all_bytes, make_cache, write_tar
from tests.ranks import Ranks
from utils.cli import UserError, run_script


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """{key: (PNG bytes, caption)} of 210 pictures of the built-in data set."""
    document = world.make_split(0, "train", 210)
    caption_of = {entry["image_id"]: entry["caption"] for entry in document["annotations"]}
    found = {}
    for number, image in enumerate(document["images"]):
        file = io.BytesIO()
        world.paint(image["scene"]).save(file, format="PNG")
        found[f"{number:09d}"] = (file.getvalue(), caption_of[image["id"]])
    return found


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


@pytest.fixture
def call(workdir, tiny, monkeypatch, capsys):
    """Calls cache_embeddings.py on ./tars with a tiny CLIP. Returns: (exit status, stderr)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    clip = [
        "--model",
        str(tiny[0]),
        "--pretrained",
        str(tiny[1]),
        *"--device cpu --workers 0".split(),
    ]
    flags = "--dataset webdataset --data-root tars --split train --name web".split() + clip
    Path("tars").mkdir()

    def with_flags(*more):
        capsys.readouterr()
        status = run_script(cache_embeddings.main, [*flags, *map(str, more)])
        return status, capsys.readouterr().err

    with_flags.flags, with_flags.clip = flags, clip
    return with_flags


def test_a_tar_becomes_the_same_embeddings_as_its_pictures_and_captions(call, pictures):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 70))  # more than a chunk of 64
    write_tar("tars/00001.tar", samples_of(pictures, 70, 75))
    assert call()[0] == 0
    cache = EmbeddingCache("web", "train")
    keys = list(pictures)[:75]
    assert cache.images == keys
    assert cache.captions == [pictures[key][1] for key in keys]
    assert cache.image_of_caption.tolist() == list(range(75))
    assert (cache.meta["image_count"], cache.meta["skipped"]) == (75, [])
    assert [rows for rows, _ in cache.meta["shards"]["text"]] == [70, 5]
    Path("table").mkdir()
    with open("table/train.csv", "w", encoding="utf-8") as file:
        file.write("filepath\ttitle\n")
        for key in keys:
            Path(f"table/{key}.png").write_bytes(pictures[key][0])
            file.write(f"{key}.png\t{pictures[key][1]}\n")
    plain = "--dataset csv --data-root table --csv-separator \\t --split train --name plain".split()
    assert run_script(cache_embeddings.main, plain + call.clip) == 0
    expected = EmbeddingCache("plain", "train")
    found = {"image": cache.image.read().float(), "text": cache.text.read().float()}
    for kind, of in (
        ("image", expected.image),
        ("text", expected.text),
    ):  # other chunks: other last bits
        torch.testing.assert_close(found[kind], of.read().float(), rtol=2e-2, atol=2e-3)
    difference = (found["image"] - found["image"].roll(1, dims=0)).abs()
    assert difference.max() > 0.1  # rows differ by more than that


def test_bytes_depend_on_neither_batch_size_nor_workers(call, pictures):
    for number in range(3):
        write_tar(f"tars/{number:05d}.tar", samples_of(pictures, 70 * number, 70 * number + 70))
    assert call("--name", "a")[0] == 0
    assert (
        call(
            "--name",
            "b",
            "--workers",
            2,
            "--batch-size",
            1,
            "--data-root",
            "tars/{00000..00002}.tar",
        )[0]
        == 0
    )
    assert all_bytes("embeddings/a") == all_bytes("embeddings/b")


def test_a_hundred_tars_cached_by_two_ranks_killed_twice_are_those_of_one(call, pictures):
    for number in range(100):
        write_tar(f"tars/{number:05d}.tar", samples_of(pictures, 2 * number, 2 * number + 2))
    assert (
        faults.finish(faults.start(cache_embeddings.main, [*call.flags, "--name", "unbroken"])) == 0
    )
    units = Path("embeddings/web/train/.parts")

    def count():
        return len(list(units.glob("notes-*.json")))

    for ranks, more in ((2, 10), (3, 10)):
        before, end = count(), time.monotonic() + faults.LIMIT
        with Ranks(ranks, cache_embeddings.main, call.flags) as started:
            while count() < before + more and time.monotonic() < end:
                time.sleep(0.002)
            assert started.kill() == [signal.SIGKILL] * ranks, started.output()
            assert before + more <= count() < 100, started.output()
        assert not Path("embeddings/web/train/meta.json").exists()
    with Ranks(2, cache_embeddings.main, call.flags) as started:
        assert started.wait() == [0, 0], started.output()
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
        patch.setattr(os, "replace", replace_some)
        assert call()[0] == 130
    assert len(moved) == 5
    with pytest.raises(UserError, match="unfinished"):
        EmbeddingCache("web", "train")
    monkeypatch.setattr(TarUnit, "save", None)  # nothing is encoded again
    assert call()[0] == 0
    assert all_bytes("embeddings/web") == all_bytes("embeddings/unbroken")


def test_a_tar_that_was_mended_is_encoded_again_and_the_others_are_not(call, pictures, monkeypatch):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 5))
    write_tar("tars/00001.tar", samples_of(pictures, 5, 10) | {"000000005.png": b"broken"})
    status, stderr = call()
    assert (status, "tars/00001.tar: 000000005: " in stderr, "--max-broken" in stderr) == (
        2,
        True,
        True,
    )
    write_tar("tars/00001.tar", samples_of(pictures, 5, 10))
    written, save = [], TarUnit.save
    monkeypatch.setattr(
        TarUnit, "save", lambda self, *rest: written.append(self.number) or save(self, *rest)
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
        ("1", "no image"),
        ("2", "no caption"),
        ("3", "no caption in UTF-8 beside it"),
    ):
        assert f"00000.tar: 00000000{key}: {reason}" in stderr
    cure = "fix them, or leave them out with --skip-broken, or --max-broken 4 or more"
    assert stderr.splitlines()[-1].endswith(f" (4 broken samples so far; {cure})")
    assert call("--max-broken", 3)[0] == 2
    assert not Path("embeddings/web/train/meta.json").exists()
    assert call("--max-broken", 4)[0] == 0
    cache = EmbeddingCache("web", "train")
    assert cache.images == [f"{n:09d}" for n in (4, 5, 6, 7, 8)]
    assert cache.captions[0] == pictures["000000004"][1]
    assert [name for name, _ in cache.meta["skipped"]] == [
        f"00000.tar: 00000000{n}" for n in range(4)
    ]
    assert "broken samples left out: 4" in call()[1].splitlines()[-1]
    assert call("--max-broken", 4)[0] == 0
    assert call("--skip-broken", "--name", "skip")[0] == 0
    assert all_bytes("embeddings/skip") == all_bytes("embeddings/web")


def test_a_tar_of_broken_samples_only_is_an_empty_file_among_the_others(call, pictures, script):
    write_tar("tars/00000.tar", {"a.png": b"x", "a.txt": b"a cat"})
    write_tar("tars/00001.tar", samples_of(pictures, 0, 8))
    assert call("--max-broken", 1)[0] == 0
    assert [
        rows for rows, _ in EmbeddingCache("web", "train", mapped=True).meta["shards"]["image"]
    ] == [0, 8]
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
    assert (status, f"{root}: cannot be read to its end" in stderr.splitlines()[-1]) == (2, True)
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
    write_tar(
        "tars/00000.tar", files | {"000000002.mask.png": b"not looked at", "000000002.cls": b"7"}
    )
    assert call()[0] == 0
    assert len(EmbeddingCache("web", "train").text) == 3
    write_tar(
        "tars/00000.tar",
        {name.replace("00000000", "img.00"): content for name, content in files.items()},
    )
    status, stderr = call("--name", "dots")
    assert status == 2
    assert "img.000.png: it has a dot in its key; name it without" in stderr
    assert "(3 broken samples so far" in stderr.splitlines()[-1]


def test_other_tars_of_the_same_names_are_other_tars(call, pictures):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 5))
    assert call()[0] == 0
    Path("more").mkdir()
    write_tar("more/00000.tar", samples_of(pictures, 5, 11))
    status, stderr = call("--data-root", "more")
    assert (status, "tar_files was" in stderr.splitlines()[-1]) == (2, True)
    assert call("--data-root", "more", "--overwrite")[0] == 0
    assert EmbeddingCache("web", "train").captions == [
        caption for _, caption in list(pictures.values())[5:11]
    ]


def test_a_url_whose_samples_were_broken_is_looked_at_again(call, pictures):
    write_tar("tars/a.tar", samples_of(pictures, 0, 5) | {"000000001.png": b"broken"})
    assert call("--data-root", "pipe:cat tars/a.tar")[0] == 2
    write_tar("tars/a.tar", samples_of(pictures, 0, 5))
    assert call("--data-root", "pipe:cat tars/a.tar")[0] == 0
    assert len(EmbeddingCache("web", "train").text) == 5


@pytest.mark.parametrize("root", ["tars/{a,b}.tar", "pipe:cat tars/{a,b}.tar"])
def test_a_tar_that_was_kept_without_a_sample_is_looked_at_again_once_it_may_be_mended(
    call, pictures, monkeypatch, root
):
    """A file that was fixed has another time of its last change; of a URL nothing tells."""
    write_tar("tars/a.tar", samples_of(pictures, 0, 5) | {"000000001.png": b"broken"})
    write_tar("tars/b.tar", samples_of(pictures, 5, 10))
    flags = ("--data-root", root, "--max-broken", 1)
    save = TarUnit.save

    def save_one(self, *rest):
        if self.number:
            raise KeyboardInterrupt
        save(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TarUnit, "save", save_one)
        assert call(*flags)[0] == 130
    write_tar("tars/a.tar", samples_of(pictures, 0, 5))
    assert call(*flags)[0] == 0
    assert len(EmbeddingCache("web", "train").text) == 10


def test_tars_leave_nothing_of_what_was_there_before(call, pictures):
    make_cache("web", images=4, captions_per_image=1, splits=("train",), relevance=[[0, 1]] * 4)
    write_tar("tars/00000.tar", samples_of(pictures, 0, 4))
    assert call("--overwrite")[0] == 0
    assert EmbeddingCache("web", "train").relevance is None
    names = "image-00000.pt text-00000.pt captions-00000.json images-00000.json image_of_caption.pt meta.json"
    assert {path.name for path in Path("embeddings/web/train").iterdir()} == set(names.split())


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
    write_tar(
        "tars/00000.tar",
        samples_of(pictures, 0, 2) | {"000000001.pyd": trap, "000000001.pth": trap},
    )
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
        (("--shard-rows", "5"), "has shards of its own"),
        (("--max-broken", "-1"), "--max-broken"),
        (
            ("--data-root", "pipe:cat nowhere.tar"),
            "pipe:cat nowhere.tar: cannot be read to its end: ",
        ),
        (
            ("--data-root", "tars/{00000..00003.tar"),
            "tars/{00000..00003.tar: not a pattern of paths",
        ),
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
        TarSplit("tars/{00000..00000}.tar", "train", None)


# Tars as people have them.


def skipped_of(name="web"):
    return dict(EmbeddingCache(name, "train").meta["skipped"])


@pytest.mark.parametrize("form", ["txt", "json", "empty txt"])
def test_every_line_or_entry_is_a_caption_of_the_image(call, pictures, form):
    files = samples_of(pictures, 0, 3)
    captions = ["a dog", "a big dog", "a dog on grass"]
    lines = "\r\n".join(["a dog", "", " a big dog ", "a dog on grass", ""]).encode()
    document = json.dumps({"caption": captions}).encode()
    files["000000001.txt"] = {"txt": lines, "json": b"", "empty txt": b" \n"}[form]
    files["000000001.json"] = document
    if form == "json":
        del files["000000001.txt"]
    write_tar("tars/00000.tar", files)
    write_tar("tars/00001.tar", samples_of(pictures, 3, 5))
    assert call()[0] == 0
    cache = EmbeddingCache("web", "train")
    assert cache.image_of_caption.tolist() == [0, 1, 1, 1, 2, 3, 4]
    assert cache.captions[1:4] == captions
    assert (len(cache.image), len(cache.text), cache.meta["caption_count"]) == (5, 7, 7)
    assert call()[0] == 0


def test_what_is_twice_is_broken_and_counted_once(call, pictures):
    files = list(samples_of(pictures, 0, 4).items())
    picture = files[0][1]
    files.insert(1, files[0])  # 0.png twice
    files += [("000000004.png", picture), ("000000004.jpg", picture), ("000000004.txt", b"four")]
    files += [("000000002.png", picture), ("000000002.txt", b"again")]  # a key comes back
    with tarfile.open("tars/00000.tar", "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    status, stderr = call()
    assert status == 2
    assert "(3 broken samples so far" in stderr.splitlines()[-1]
    assert call("--skip-broken")[0] == 0
    assert EmbeddingCache("web", "train").images == ["000000001", "000000002", "000000003"]
    reasons = skipped_of()
    assert "000000000.png is twice" in reasons["00000.tar: 000000000"]
    assert "several images (png, jpg)" in reasons["00000.tar: 000000004"]
    assert "its key comes twice" in reasons["00000.tar: 000000002 (again)"]


def test_a_key_that_is_in_two_tars_is_told(call, pictures):
    write_tar("tars/00000.tar", samples_of(pictures, 0, 3))
    write_tar("tars/00001.tar", samples_of(pictures, 2, 5))
    status, stderr = call()
    assert status == 0
    assert "note: 1 keys, such as 000000002, are in more than one tar" in stderr
    assert len(EmbeddingCache("web", "train").text) == 6


@pytest.mark.parametrize("size", [2, 70])
def test_a_tar_that_is_not_sorted_is_one_line(call, pictures, size):
    files = samples_of(pictures, 0, size)
    files = {name: files[name] for name in sorted(files, key=lambda name: name[::-1])}
    write_tar("tars/00000.tar", files)
    status, stderr = call()
    assert status == 2
    assert "00000.tar: cannot be read to its end" in stderr.splitlines()[-1]
    assert "not sorted by name" in stderr and "tar --sort=name" in stderr
    assert "beside it" not in stderr


def test_what_macos_adds_is_ignored(call, pictures):
    files = samples_of(pictures, 0, 3)
    extra = {".DS_Store": b"x", "__MACOSX/._000000000.png": b"x"}
    for name in list(files):
        extra[f"._{name}"] = b"x"
        extra[f"./._{name}"] = b"x"
    write_tar("tars/00000.tar", {**extra, **files})
    write_tar("tars/._00000.tar", {"a.txt": b"x"})
    Path("tars/.DS_Store").write_bytes(b"x")
    assert call()[0] == 0
    assert EmbeddingCache("web", "train").images == ["000000000", "000000001", "000000002"]
    assert not skipped_of()


def test_names_that_are_not_utf8_and_links_are_told_or_cleaned(call, pictures):
    files = samples_of(pictures, 0, 3)
    with tarfile.open(
        "tars/00000.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1"
    ) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("000000001", "caf\xe9"))
            info.size = len(content)
            if name == "000000002.png":
                info.type, info.size, info.linkname = tarfile.SYMTYPE, 0, "000000000.png"
                content = b""
            tar.addfile(info, io.BytesIO(content))
    assert call("--skip-broken")[0] == 0
    assert EmbeddingCache("web", "train").images == ["000000000", "caf\ufffd"]
    assert "links are not followed" in skipped_of()["00000.tar: 000000002"]
