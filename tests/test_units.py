"""Caching that was stopped goes on with the units that it kept; other settings, runs, broken pictures are noticed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cache_embeddings
from datasets import images as image_reader
from datasets import source
from datasets.embedding import EmbeddingCache
from datasets.registry import DATASETS
from tests.conftest import VAL_IDS, all_bytes, draw_data, make_cache, plain_split
from utils import embed
from utils.cli import UserError
from utils.files import locked

# Killed and called again.


@pytest.fixture
def small_units(monkeypatch):
    """Val has two units of images and two of texts."""
    monkeypatch.setattr(source, "UNIT", 64)


@pytest.fixture
def stopped(call, small_units, monkeypatch):
    """Calls cache_embeddings.py on val and stops it before its third unit: both image units are kept, no text unit."""

    def stop(*flags):
        kept, save = [], source.save_tensors

        def save_two(content, path):
            if len(kept) == 2:
                raise KeyboardInterrupt
            kept.append(path.name)
            save(content, path)

        with monkeypatch.context() as patch:
            patch.setattr(source, "save_tensors", save_two)
            assert call("--split", "val", *flags)[0] == 130
        assert kept == ["image-00000.pt", "image-00001.pt"]

    return stop


def test_units_give_the_bytes_of_no_units(call, workdir, monkeypatch):
    assert call("--name", "a")[0] == 0
    monkeypatch.setattr(source, "UNIT", 64)
    assert call("--name", "b", "--batch-size", 7)[0] == 0
    assert all_bytes(workdir / "embeddings" / "a") == all_bytes(workdir / "embeddings" / "b")


def test_what_was_encoded_before_a_stop_is_not_encoded_again(call, stopped, workdir, monkeypatch):
    assert call("--split", "val", "--name", "whole")[0] == 0
    stopped()
    with pytest.raises(UserError, match="unfinished; run cache_embeddings"):
        EmbeddingCache("shapes", "val")
    monkeypatch.setattr(
        image_reader, "decode_file", lambda *_: pytest.fail("a picture was decoded again")
    )
    assert call("--split", "val")[0] == 0
    assert all_bytes(workdir / "embeddings" / "shapes") == all_bytes(
        workdir / "embeddings" / "whole"
    )


def test_a_finished_cache_is_not_made_again_and_needs_no_clip(call, workdir, monkeypatch):
    assert call()[0] == 0
    before = all_bytes(workdir / "embeddings")
    monkeypatch.setattr(cache_embeddings, "load_clip", lambda *_: pytest.fail("CLIP was loaded"))
    status, err = call.stderr()
    assert status == 0
    assert [line for line in err.splitlines() if "cached already" in line] == [
        f"embeddings/shapes/{split}: cached already; --overwrite rebuilds it"
        for split in ("train", "val")
    ]
    assert all_bytes(workdir / "embeddings") == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("dtype", "dtype was float16, now float32"),
        ("precision", "precision was fp32, now bf16"),
        ("weights", "pretrained was tiny-cache.safetensors (SHA-256 "),
        ("model", "model was tiny-cache.json (SHA-256 "),
        ("caption", "caption_list was 140 captions, "),
        ("image", "image_list was 70 images, "),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    call, stopped, tiny, tmp_path, change, expected, finished
):
    root = draw_data(tmp_path / "mine", splits=(("val", VAL_IDS),))
    flags = ["--data-root", root, "--split", "val", "--precision", "fp32"]
    if finished:
        assert call(*flags)[0] == 0
    else:
        stopped(*flags)
    before = all_bytes(Path("embeddings"))
    file = root / "annotations" / "captions_val.json"
    document = json.loads(file.read_text())
    if change == "dtype":
        flags += ["--dtype", "float32"]
    elif change == "precision":
        flags += ["--precision", "bf16"]
    elif change == "weights":
        weights = tmp_path / "tiny-cache.safetensors"  # of the same name
        save_file(tiny[2].state_dict() | {"logit_scale": torch.tensor(1.0)}, weights)
        flags += ["--pretrained", weights]
    elif change == "model":
        (tmp_path / "tiny-cache.json").write_text(tiny[0].read_text() + "\n")
        flags += ["--model", tmp_path / "tiny-cache.json"]
    elif change == "caption":
        document["annotations"][3]["caption"] += "!"
    elif change == "image":
        document["images"][3]["file_name"] = document["images"][4]["file_name"]
    file.write_text(json.dumps(document))
    status, _, last = call(*flags)
    assert status == 2
    assert expected in last
    assert "--overwrite" in last
    assert all_bytes(Path("embeddings")) == before


def test_overwrite_keeps_the_old_cache_until_the_new_one_is_whole(call, stopped, workdir):
    assert call("--split", "val", "--name", "whole", "--dtype", "float32")[0] == 0
    assert call("--split", "val")[0] == 0
    old = EmbeddingCache("shapes", "val").image.read().clone()
    stopped("--overwrite", "--dtype", "float32")
    assert torch.equal(EmbeddingCache("shapes", "val").image.read(), old)
    assert call("--split", "val", "--overwrite", "--dtype", "float32")[0] == 0
    assert all_bytes(workdir / "embeddings" / "shapes") == all_bytes(
        workdir / "embeddings" / "whole"
    )


def test_overwrite_starts_an_unfinished_cache_anew_and_goes_on_with_its_own(
    call, stopped, monkeypatch
):
    seen = []
    read = image_reader.decode_file
    monkeypatch.setattr(image_reader, "decode_file", lambda *of: seen.append(of) or read(*of))
    stopped()
    assert len(seen) == 70
    stopped("--overwrite")
    assert len(seen) == 140
    assert call("--split", "val", "--overwrite")[0] == 0
    assert len(seen) == 140


def test_a_cache_that_does_not_tell_what_it_is_stays(call, workdir):
    make_cache("shapes", splits=("val",))
    (workdir / "embeddings/shapes/val/meta.json").unlink()
    before = all_bytes(workdir / "embeddings")
    status, _, last = call("--split", "val")
    assert status == 2
    assert "--overwrite" in last
    assert all_bytes(workdir / "embeddings") == before
    assert call("--split", "val", "--overwrite")[0] == 0
    assert len(EmbeddingCache("shapes", "val").image) == 70


# Broken pictures.


@pytest.fixture
def broken_root(tmp_path):
    """Val with its pictures of rows 2 and 66, in order of id, broken. Returns: (folder, the two file names)."""
    root = draw_data(tmp_path / "broken", splits=(("val", VAL_IDS),))
    names = [plain_split(root, "val")[0][row]["file_name"] for row in (2, 66)]
    (root / "val" / names[0]).write_bytes(b"")
    (root / "val" / names[1]).write_text("no picture")
    return root, names


def test_what_was_encoded_before_a_broken_picture_is_kept(
    call, small_units, broken_root, data, monkeypatch
):
    root, names = broken_root
    (root / "val" / names[0]).write_bytes((data / "val" / names[0]).read_bytes())
    assert call("--data-root", root, "--split", "val")[0] == 2
    (root / "val" / names[1]).write_bytes((data / "val" / names[1]).read_bytes())
    seen = []
    read = image_reader.decode_file
    monkeypatch.setattr(
        image_reader, "decode_file", lambda path, to: seen.append(str(path)) or read(path, to)
    )
    assert call("--data-root", root, "--split", "val")[0] == 0
    assert seen == [
        str(root / "val" / image["file_name"]) for image in plain_split(root, "val")[0][64:]
    ]


def test_images_that_were_skipped_are_looked_at_again_without_the_flag(call, stopped, broken_root):
    root, names = broken_root
    stopped("--data-root", root, "--skip-broken")
    status, _, last = call("--data-root", root, "--split", "val")
    assert status == 2
    assert names[1] in last
    assert "(2 broken samples so far" in last


def test_after_a_broken_picture_nothing_is_encoded(call, small_units, broken_root, monkeypatch):
    root, names = broken_root
    seen = []
    monkeypatch.setattr(embed, "in_chunks", lambda *_: seen.append(1))
    status, err = call.stderr("--data-root", root, "--split", "val", "--batch-size", 1)
    assert status == 2
    assert not seen
    assert all(name in err for name in names)
    assert "leave them out with --skip-broken, or --max-broken 2 or more)" in err.splitlines()[-1]
    assert not Path("embeddings").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_pictures_and_their_captions_are_left_out_and_recorded(
    call, small_units, broken_root, data, workers
):
    root, names = broken_root
    assert call("--split", "val", "--name", "all")[0] == 0
    assert (
        call("--data-root", root, "--split", "val", "--skip-broken", "--workers", workers)[0] == 0
    )
    cache, full = EmbeddingCache("shapes", "val"), EmbeddingCache("all", "val")
    left = [row for row in range(70) if row not in (2, 66)]
    assert [name for name, _ in cache.meta["skipped"]] == names
    assert all(reason and str(root) not in reason for _, reason in cache.meta["skipped"])
    assert cache.images == [full.images[row] for row in left]
    assert torch.equal(cache.image.read(), full.image[left])
    captions = [row for row, image in enumerate(full.image_of_caption.tolist()) if image in left]
    assert cache.captions == [full.captions[row] for row in captions]
    assert torch.equal(cache.text.read(), full.text[captions])
    assert [left[row] for row in cache.image_of_caption.tolist()] == full.image_of_caption[
        captions
    ].tolist()
    assert [[left[row] for row in rows] for rows in cache.relevance] == [
        [row for row in full.relevance[i] if row in left] for i in captions
    ]
    assert cache.meta["image_ids"] == [full.meta["image_ids"][row] for row in left]


def test_skipping_goes_on_after_a_stop_with_the_same_bytes_and_is_not_forgotten(
    call, stopped, broken_root, workdir
):
    flags = ["--data-root", broken_root[0], "--split", "val", "--skip-broken"]
    assert call(*flags, "--name", "whole")[0] == 0
    stopped(*flags)
    assert call(*flags)[0] == 0
    assert all_bytes(workdir / "embeddings" / "shapes") == all_bytes(
        workdir / "embeddings" / "whole"
    )
    status, _, last = call(*flags[:-1])
    assert status == 2
    assert "broken samples left out: 2" in last


@pytest.fixture(params=["shapes", "coco", "csv"])
def root_with_two_broken(request, tmp_path):
    """A data set of 70 pictures, those of rows 2 and 66 broken. Returns: (flags, the two file names)."""
    root, layout = (
        tmp_path / "broken",
        DATASETS["coco" if request.param == "coco" else "shapes"].layout,
    )
    draw_data(root, (("val", VAL_IDS),), layout)
    document = json.loads((root / layout.captions.format(split="val")).read_text())
    images = sorted(document["images"], key=lambda image: image["id"])
    files = [root / layout.images.format(split="val") / image["file_name"] for image in images]
    names = [image["file_name"] for image in images]
    if request.param == "csv":
        names = [f"val/{name}" for name in names]
        (root / "val.csv").write_text(
            "\n".join(["filepath,title", *(f"{name},{name[-9:]}" for name in names)])
        )
    for row in (2, 66):
        files[row].write_bytes(b"no picture")
    flags = ("--dataset", request.param, "--name", "it", "--data-root", root, "--split", "val")
    return flags, [names[row] for row in (2, 66)]


def test_so_many_broken_pictures_as_are_allowed_are_left_out_and_no_more(
    call, small_units, root_with_two_broken
):
    flags, names = root_with_two_broken
    status, err = call.stderr(*flags, "--max-broken", 1)
    assert status == 2
    assert all(name in err for name in names)
    cure = "fix them, or leave them out with --skip-broken, or --max-broken 2 or more"
    assert err.splitlines()[-1].endswith(f"(2 broken samples so far; {cure})")
    assert not Path("embeddings/it/val/meta.json").exists()
    assert call(*flags, "--max-broken", 2)[0] == 0
    cache = EmbeddingCache("it", "val")
    assert [name for name, _ in cache.meta["skipped"]] == names
    assert (len(cache.image), set(names) & set(cache.images)) == (68, set())
    before = all_bytes("embeddings")
    for allowed in (2, 3):
        assert call(*flags, "--max-broken", allowed)[0] == 0
    assert call(*flags, "--skip-broken")[0] == 0
    status, _, last = call(*flags, "--max-broken", 1)
    assert status == 2
    assert (
        "broken samples left out: 2; to accept this, give --max-broken 2 or --skip-broken" in last
    )
    assert all_bytes("embeddings") == before
    assert call(*flags, "--skip-broken", "--overwrite")[0] == 0
    assert all_bytes("embeddings") == before


def test_images_left_out_before_a_stop_count_after_it(call, stopped, broken_root):
    root, names = broken_root
    stopped("--data-root", root, "--max-broken", 2)
    (root / "val" / names[1]).write_bytes(
        (root / "val" / plain_split(root, "val")[0][0]["file_name"]).read_bytes()
    )
    assert call("--data-root", root, "--split", "val")[0] == 2
    assert call("--data-root", root, "--split", "val", "--max-broken", 1)[0] == 0  # one was fixed
    assert [name for name, _ in EmbeddingCache("shapes", "val").meta["skipped"]] == [names[0]]


# Two runs at a time.


def hold(path, forks=False):
    """Hold a lock in another process, which sleeps. Returns: its process id."""
    ready, tell = os.pipe()
    process = os.fork()
    if process == 0:
        with locked(path, "it"):
            if forks and os.fork() == 0:  # a worker that outlives it
                time.sleep(3)
                os._exit(0)
            os.write(tell, b".")
            time.sleep(60)
        os._exit(0)
    assert os.read(ready, 1) == b"."
    return process


@pytest.mark.parametrize("forks", [False, True])
def test_two_runs_on_one_split_are_refused_until_the_first_one_is_dead(call, workdir, forks):
    holder = hold(workdir / "embeddings/shapes/.val.lock", forks)
    try:
        status, _, last = call("--split", "val")
        assert status == 2
        assert "embeddings/shapes/val: another process is at work on it" in last
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert (workdir / "embeddings/shapes/.val.lock").exists()
    assert call("--split", "val")[0] == 0
    assert not list((workdir / "embeddings").rglob("*.lock"))
