"""The embeddings on disk: written, read back, refused when broken; and cache_embeddings.py as a whole, on a tiny data set and a tiny CLIP."""

import errno
import hashlib
import importlib.metadata
import json
import os
import pickle
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cache_embeddings
from cache_embeddings import main, read_texts
from datasets import DATASETS, parts
from datasets.coco import CocoCaptions
from datasets.embedding import EmbeddingCache, load_texts, write_split, write_texts
from datasets.parts import Parts
from datasets.shapes import world
from tests.test_clip import CONFIG, Trap, write_tiny_clip
from utils import encode
from utils.cli import UserError, run
from utils.files import load_tensors, locked, save_json, save_tensors, written_aside

IMAGES, CAPTIONS, DIM = 4, 6, 8
FOLDER = Path("embeddings/it/val")


def content(**changes):
    rng = torch.Generator().manual_seed(0)
    plain = {
        "image": torch.randn(IMAGES, DIM, generator=rng).half(),
        "text": torch.randn(CAPTIONS, DIM, generator=rng).half(),
        "image_of_caption": [2, 0, 0, 3, 2, 2],
        "captions": [f"caption {i} 🐈" for i in range(CAPTIONS)],
        "images": [f"{i}.png" for i in range(IMAGES)],
        "relevance": [[2], [0, 1], [0], [1, 2, 3], [2], [2]],
        "meta": {"model": "tiny", "image_ids": [1, 2, 3, 4]},
    }
    return plain | changes


@pytest.fixture
def cache(workdir):
    """A whole cache of the split val under ./embeddings/it."""
    write_split(FOLDER, **content())
    return workdir / FOLDER


def read():
    return EmbeddingCache("it", "val")


def refusal():
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Written and read.


def test_what_was_written_is_read(cache):
    found, expected = read(), content()
    assert torch.equal(found.image, expected["image"])
    assert torch.equal(found.text, expected["text"])
    assert found.image.dtype == torch.float16
    assert found.image_of_caption.tolist() == expected["image_of_caption"]
    assert found.image_of_caption.dtype == torch.int64
    assert (found.captions, found.images) == (expected["captions"], expected["images"])
    assert (found.relevance, found.meta) == (expected["relevance"], expected["meta"])
    assert found.embed_dim == DIM


def test_pairs_are_a_captions_text_and_its_image(cache):
    expected = content()
    image, text = read().pairs(torch.tensor([3, 1, 1]))
    assert torch.equal(image, expected["image"][[3, 0, 0]])
    assert torch.equal(text, expected["text"][[3, 1, 1]])


def test_the_three_files_of_the_papers_repository_are_enough(cache):
    for path in cache.iterdir():
        if path.name not in ("image.pt", "text.pt", "cap_id_to_img_id.json"):
            path.unlink()
    found = read()
    assert torch.equal(found.text, content()["text"])
    assert (found.captions, found.images, found.relevance, found.meta) == (None, None, None, {})


def test_files_are_as_the_papers_repository_reads_them(cache):
    """It calls torch.load and json.load and looks rows up by the caption's row as a string."""
    assert torch.equal(torch.load(cache / "text.pt", weights_only=True), content()["text"])
    assert json.loads((cache / "cap_id_to_img_id.json").read_text()) == {"0": 2, "1": 0, "2": 0, "3": 3, "4": 2, "5": 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_every_precision_are_read(cache, dtype):
    torch.save(content()["image"].to(dtype), cache / "image.pt")
    assert read().image.dtype == dtype


def test_an_older_file_of_torch_is_read(cache):
    torch.save(content()["image"], cache / "image.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read().image, content()["image"])


def test_embeddings_that_were_saved_with_a_gradient_come_without(cache):
    torch.save(content()["image"].float().requires_grad_() * 2, cache / "image.pt")
    assert not read().image.requires_grad


def test_a_relevance_from_before_does_not_stay(cache):
    write_split(FOLDER, **content(relevance=None))
    assert read().relevance is None


def test_the_same_content_gives_the_same_bytes_whatever_the_name(tmp_path):
    for name in ("one.pt", "another.pt"):
        save_tensors({"z": torch.arange(5), "name": "x"}, tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()


# Broken embeddings.


def with_nan(z):
    z[2, 3] = float("nan")
    return z


def with_infinity(z):
    z[2, 3] = float("inf")
    return z


BROKEN_EMBEDDINGS = {
    "of another width": (lambda z: z[:, 1:].clone(), "wide"),
    "with nan": (with_nan, "row 2"),
    "with infinity": (with_infinity, "row 2"),
    "of whole numbers": (lambda z: z.long(), "torch.int64"),
    "of complex numbers": (lambda z: z.to(torch.complex64), "complex"),
    "of 8 bits": (lambda z: z.to(torch.float8_e4m3fn), "float8"),
    "of one dimension": (lambda z: z.flatten(), "shape"),
    "of three dimensions": (lambda z: z[None], "shape"),
    "of no rows": (lambda z: z[:0].clone(), "shape"),
    "of no width": (lambda z: z[:, :0].clone(), "shape"),
    "a list": (lambda z: z.tolist(), "list"),
    "a dict": (lambda z: {"image": z}, "dict"),
    "a number": (lambda z: 3.5, "float"),
    "huge, with a stride of 0": (lambda z: torch.zeros(1).expand(10**6, 10**6), "not stored in full"),
    "transposed": (lambda z: z.T.contiguous().T, "not stored in full"),
    "sparse": (lambda z: z.to_sparse(), "not stored in full"),
    "sparse in rows": (lambda z: z.to_sparse_csr(), "not stored in full"),
    "on no device": (lambda z: z.to("meta"), "not stored in full"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("file", ["image.pt", "text.pt"])
@pytest.mark.parametrize("kind", BROKEN_EMBEDDINGS)
def test_embeddings_that_cannot_be_right_are_refused(cache, file, kind):
    change, expected = BROKEN_EMBEDDINGS[kind]
    torch.save(change(content()[file.removesuffix(".pt")]), cache / file)
    message = refusal()
    assert f"{FOLDER}{'' if kind == 'of another width' else '/' + file}: " in message
    assert file in message
    assert expected in message


@pytest.mark.parametrize("file", ["image.pt", "text.pt"])
@pytest.mark.parametrize("junk", ["nothing", "random", "text", "zip", "cut"])
def test_files_of_other_bytes_are_refused(cache, file, junk):
    whole = (cache / file).read_bytes()
    random = np.random.default_rng(0).bytes(3000)
    bytes_of = {
        "nothing": b"",
        "random": random,
        "text": b"hello",
        "zip": b"PK\x03\x04" + random,
        "cut": whole[: len(whole) // 2],
    }
    (cache / file).write_bytes(bytes_of[junk])
    assert f"{FOLDER / file}: not a file of tensors" in refusal()


@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_code_in_an_embeddings_file_is_not_run(cache, saved_by):
    sprung = cache / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works
    sprung.unlink()
    if saved_by == "torch":
        torch.save(Trap(sprung), cache / "image.pt")
    else:
        (cache / "image.pt").write_bytes(pickle.dumps(Trap(sprung)))
    assert "image.pt: not a file of tensors that can be read safely" in refusal()
    assert not sprung.exists()


def test_no_byte_of_a_file_can_be_changed_into_a_traceback(cache):
    whole = (cache / "image.pt").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        changed = bytearray(whole)
        for position in rng.integers(len(whole), size=3):
            changed[position] = rng.integers(256)
        (cache / "image.pt").write_bytes(changed)
        try:
            assert torch.isfinite(read().image).all()
        except UserError as error:
            assert str(FOLDER) in str(error)


@pytest.mark.parametrize("file", ["text.pt", "cap_id_to_img_id.json"])
def test_a_missing_file_is_named(cache, file):
    (cache / file).unlink()
    assert f"{FOLDER / file}: no such file" in refusal()


# Broken JSON.


def put(file, value):
    (FOLDER / file).write_text(value if isinstance(value, str) else json.dumps(value))


MAP = {str(caption): row for caption, row in enumerate(content()["image_of_caption"])}


@pytest.mark.parametrize(
    "changes",
    [{"3": 4}, {"3": -1}, {"3": True}, {"3": False}, {"3": 1.0}, {"3": "1"}, {"3": None}, {"3": [1]}],
    ids=["too large", "negative", "true", "false", "fraction", "text", "null", "list"],
)
def test_a_map_to_anything_but_image_rows_is_refused(cache, changes):
    put("cap_id_to_img_id.json", MAP | changes)
    assert f"{FOLDER}/cap_id_to_img_id.json: caption 3" in refusal()


@pytest.mark.parametrize(
    "value",
    [
        {key: row for key, row in MAP.items() if key != "3"},
        {"7" if key == "3" else key: row for key, row in MAP.items()},
        MAP | {"6": 0},
        list(MAP.values()),
        {},
        "",
        "{",
        "null",
    ],
    ids=["one less", "other key", "one more", "list", "empty", "no JSON", "half", "null"],
)
def test_a_map_of_other_captions_is_refused(cache, value):
    put("cap_id_to_img_id.json", value)
    assert f"{FOLDER}/cap_id_to_img_id.json: " in refusal()


@pytest.mark.parametrize("file", ["captions.json", "images.json", "relevance.json"])
def test_lists_of_other_lengths_or_kinds_are_refused(cache, file):
    right = json.loads((cache / file).read_text())
    for wrong in (right[1:], [*right, right[0]], [*right[1:], 3], [*right[1:], None], {}, "", "[1", "null"):
        put(file, wrong)
        assert f"{FOLDER / file}: " in refusal()
    put(file, right)
    read()


@pytest.mark.parametrize("rows", [[], [4], [-1], [True], [1.0], ["1"], [[1]], [None]])
def test_relevance_of_anything_but_image_rows_is_refused(cache, rows):
    put("relevance.json", [*content()["relevance"][1:], rows])
    assert f"{FOLDER}/relevance.json: entry 5" in refusal()


@pytest.mark.parametrize("value", ["", "[]", "3", "{"])
def test_a_broken_meta_is_refused(cache, value):
    put("meta.json", value)
    assert f"{FOLDER}/meta.json: " in refusal()


# Missing caches.


def test_a_missing_cache_names_the_command_and_the_data_set_that_needs_no_download(workdir):
    with pytest.raises(UserError) as caught:
        EmbeddingCache("coco", "train")
    assert "python cache_embeddings.py --dataset coco" in str(caught.value)
    assert "python cache_embeddings.py --dataset shapes" in str(caught.value)
    with pytest.raises(UserError) as caught:
        EmbeddingCache("shapes", "train")
    assert str(caught.value).count("--dataset shapes") == 2  # what was asked for and the command, without a hint


def test_a_missing_cache_lists_those_that_are_there(cache):
    with pytest.raises(UserError, match=r"found caches: it\)"):
        EmbeddingCache("coco", "train")


def test_a_missing_split_names_the_command_that_makes_it(cache):
    with pytest.raises(
        UserError, match=r"found val\); run python cache_embeddings.py --dataset \{coco,.*\} --name it --split train"
    ):
        EmbeddingCache("it", "train")


# Files whole or not at all.


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
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "deeper").iterdir()] == [("a.txt", b"before")]


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
    assert run(lambda argv: save_json([1], tmp_path / "a.json")) == 2
    assert list(tmp_path.iterdir()) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "disk is full" in line
    assert "a.json" in line


def test_a_split_that_could_not_be_finished_has_no_meta(cache):
    with pytest.raises(ValueError):
        write_split(FOLDER, **content(relevance=[[float("nan")]]))
    assert not (cache / "meta.json").exists()
    assert not list(cache.glob(".*"))


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        save_json({"x": float("nan")}, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_nested_tensors_are_checked_too(tmp_path):
    torch.save({"state_dict": {"w": [torch.zeros(1).expand(1000)]}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: .*shape \(1000,\)"):
        load_tensors(tmp_path / "a.pt")


# Further texts.


def test_texts_that_were_written_are_read(workdir):
    z = torch.randn(3, DIM)
    write_texts("it", "v1.2", z, ["a", "b", "c"], {"model": "tiny"}, chains=[[0, 1], [2]])
    texts, found, chains = load_texts("it", "v1.2", DIM)
    assert (texts, chains) == (["a", "b", "c"], [[0, 1], [2]])
    assert torch.equal(found, z)
    assert load_texts("it", "absent", DIM) is None
    with pytest.raises(UserError, match="the cache is 9 wide"):
        load_texts("it", "v1.2", 9)
    for broken in ({"texts": ["a", "b"]}, {"texts": ["a", "b", 3]}, {}, []):
        Path("embeddings/it/texts/v1.2.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"v1\.2\.json: expected 3 texts"):
            load_texts("it", "v1.2", DIM)


# The whole script.

TRAIN_IDS, VAL_IDS = (
    [51, 3, 20],
    [int(i) for i in np.random.default_rng(0).permutation(1000)[:70]],
)  # more than a chunk of 64
WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "big",
    "small",
    "red",
    "blue",
    "cat",
    "dog",
    "house",
    "tree",
    "sky",
    "river",
    "car",
    "star",
]


def draw_data(root, splits=(("train", TRAIN_IDS), ("val", VAL_IDS)), layout=DATASETS["shapes"].layout):
    """A data set in COCO's format: every picture is noise of its own and of its own size, ids and names are in no order."""
    for split, ids in splits:
        rng = np.random.default_rng(len(ids))
        folder, captions_file = root / layout.images.format(split=split), root / layout.captions.format(split=split)
        folder.mkdir(parents=True)
        captions_file.parent.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for image_id in ids:
            name = f"{rng.integers(10**9):09d}.png"
            blocks = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
            blocks.resize((int(rng.integers(32, 50)), int(rng.integers(32, 50))), Image.Resampling.NEAREST).save(
                folder / name
            )
            images.append({"id": image_id, "file_name": name})
            for text in (" ".join(rng.choice(WORDS, size=5)), "a photo of a cat"):  # the second is every picture's
                annotations.append({"id": int(rng.integers(10**9)), "image_id": image_id, "caption": text})
        rng.shuffle(annotations)
        captions_file.write_text(json.dumps({"images": images, "annotations": annotations}))
        if layout.relevance and split == "val":
            relevance = {
                entry["id"]: [entry["image_id"]] if entry["caption"] != "a photo of a cat" else sorted(ids)
                for entry in annotations
            }
            (root / layout.relevance.format(split=split)).write_text(json.dumps(relevance))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_data(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), "tiny-cache")


@pytest.fixture
def call(script, data, tiny, monkeypatch):
    """Calls cache_embeddings.py on the tiny data set with the tiny CLIP; later flags win."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(
        DATASETS, "shapes", replace(DATASETS["shapes"], chains=None)
    )  # a thousand texts more, for every cache
    flags = [
        "--dataset",
        "shapes",
        "--data-root",
        data,
        "--model",
        tiny[0],
        "--pretrained",
        tiny[1],
        "--device",
        "cpu",
        "--workers",
        0,
    ]

    def with_flags(*more):
        return script(main, *flags, *more)

    with_flags.flags = [str(flag) for flag in flags]
    return with_flags


def plain_split(root, split):
    """The split by plain json: images in order of id, captions in order of id with their image's row."""
    document = json.loads((root / "annotations" / f"captions_{split}.json").read_text())
    images = sorted(document["images"], key=lambda image: image["id"])
    annotations = sorted(document["annotations"], key=lambda annotation: annotation["id"])
    row_of = {image["id"]: row for row, image in enumerate(images)}
    return images, annotations, [row_of[annotation["image_id"]] for annotation in annotations]


def direct_images(model, files):
    """Embeddings one picture at a time with open_clip's own transform."""
    import open_clip

    transform = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        return torch.cat([model.encode_image(transform(Image.open(file))[None]) for file in files])


def direct_texts(model, texts):
    import open_clip

    with torch.no_grad():
        return torch.cat([model.encode_text(open_clip.tokenize([text], context_length=16)) for text in texts])


def test_every_row_is_its_own_picture_or_text_encoded(call, data, tiny):
    assert call("--precision", "fp32", "--dtype", "float32")[:2] == (0, "")
    for split, count in (("train", 3), ("val", 70)):
        cache = EmbeddingCache("shapes", split)
        images, annotations, image_of_caption = plain_split(data, split)
        assert cache.images == [image["file_name"] for image in images]
        assert cache.captions == [annotation["caption"] for annotation in annotations]
        assert cache.image_of_caption.tolist() == image_of_caption
        expected = direct_images(tiny[2], [data / split / name for name in cache.images])
        assert cache.image.shape == (count, 16)
        torch.testing.assert_close(cache.image, expected, atol=1e-5, rtol=1e-5)
        assert torch.cdist(expected, expected).fill_diagonal_(9).min() > 1e-2  # so that no row fits another picture
        texts = direct_texts(tiny[2], cache.captions)
        assert cache.text.shape == (2 * count, 16)
        torch.testing.assert_close(cache.text, texts, atol=1e-5, rtol=1e-5)
        assert torch.unique(texts.round(decimals=3), dim=0).shape[0] == len(set(cache.captions))


def test_embeddings_are_float16_and_not_normalised_by_default(call, data, tiny):
    assert call()[0] == 0
    for split in ("train", "val"):
        cache = EmbeddingCache("shapes", split)
        assert cache.image.dtype == cache.text.dtype == torch.float16
        expected = direct_images(tiny[2], [data / split / name for name in cache.images])
        torch.testing.assert_close(
            cache.image.float(), expected, atol=0.05, rtol=0.05
        )  # bfloat16 where the machine computes it
        assert (expected.norm(dim=1) - 1).abs().min() > 0.1
        assert ((cache.image.float().norm(dim=1) - expected.norm(dim=1)).abs() < 0.05 * expected.norm(dim=1)).all()


def test_captions_of_one_text_have_one_embedding(call):
    assert call("--split", "val")[0] == 0
    cache = EmbeddingCache("shapes", "val")
    cats = cache.text[[row for row, text in enumerate(cache.captions) if text == "a photo of a cat"]]
    assert len(cats) == 70
    assert (cats == cats[0]).all()


def all_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_bytes_depend_on_neither_batch_size_nor_workers(call, workdir):
    caches = []
    for name, flags in {
        "a": (),
        "b": ("--batch-size", 1),
        "c": ("--batch-size", 65, "--workers", 2),
        "d": ("--batch-size", 10**6),
    }.items():
        assert call("--name", name, *flags)[0] == 0
        caches.append(all_bytes(workdir / "embeddings" / name))
    assert caches[0] == caches[1] == caches[2] == caches[3]
    assert len(caches[0]) == 6 + 7 + 2  # train, val with its relevance, the ladder


def test_the_encoders_see_the_same_chunks_of_one_size_whatever_the_batch_size(call, monkeypatch):
    """Where a row's last bits depend on the rows beside it, equal chunks are what keeps the bytes equal."""
    seen = []
    load = cache_embeddings.load_clip

    def load_and_record(*args):
        clip = load(*args)
        for name in ("encode_image", "encode_text"):
            encode = getattr(clip.model, name)
            setattr(
                clip.model, name, lambda inputs, encode=encode: (seen[-1].append(inputs.clone()), encode(inputs))[1]
            )
        return clip

    monkeypatch.setattr(cache_embeddings, "load_clip", load_and_record)
    for batch_size in (1, 64, 65, 1000):
        seen.append([])
        assert call("--split", "val", "--batch-size", batch_size, "--overwrite")[0] == 0
        assert [len(inputs) for inputs in seen[-1]] == [
            64,
            64,
            64,
            64,
            64,
        ]  # 70 pictures, 71 distinct captions, the ladder
        assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the open files of the process in /proc")
def test_a_batch_takes_a_worker_no_open_file_a_picture(call):
    def give_up(*_):
        raise TimeoutError("the loader hangs")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        status, _, last = call("--split", "val", "--batch-size", 64, "--workers", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert status == 0, last
    assert len(EmbeddingCache("shapes", "val").image) == 70


def test_relevance_passes_through_as_image_rows(call, data):
    assert call()[0] == 0
    images, annotations, image_of_caption = plain_split(data, "val")
    expected = [
        list(range(len(images))) if annotation["caption"] == "a photo of a cat" else [row]
        for annotation, row in zip(annotations, image_of_caption, strict=True)
    ]
    assert EmbeddingCache("shapes", "val").relevance == expected
    assert EmbeddingCache("shapes", "train").relevance is None


def test_the_ladder_is_embedded_with_the_same_clip(call, tiny):
    assert call("--precision", "fp32")[0] == 0
    texts, z, chains = load_texts("shapes", "ladder", 16)
    assert texts == list(DATASETS["shapes"].ladder)
    assert chains is None
    torch.testing.assert_close(z.float(), direct_texts(tiny[2], texts), atol=2e-3, rtol=2e-3)


def test_meta_tells_all_that_the_embeddings_depend_on(call, data, tiny):
    assert call("--precision", "bf16", "--dtype", "float32")[0] == 0
    for split, ids in (("train", TRAIN_IDS), ("val", VAL_IDS)):
        meta = EmbeddingCache("shapes", split).meta
        _, annotations, _ = plain_split(data, split)
        assert meta == {
            "dataset": "shapes",
            "split": split,
            "model": str(tiny[0]),
            "model_sha256": hashlib.sha256(tiny[0].read_bytes()).hexdigest(),
            "pretrained": str(tiny[1]),
            "pretrained_sha256": hashlib.sha256(tiny[1].read_bytes()).hexdigest(),
            "image_list": meta["image_list"],
            "caption_list": meta["caption_list"],
            "skipped": [],
            "embed_dim": 16,
            "image_size": [32, 32],
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "context_length": 16,
            "logit_scale": pytest.approx(1 / 0.07),
            "precision": "bf16",
            "dtype": "float32",
            "image_count": len(ids),
            "caption_count": 2 * len(ids),
            "image_ids": sorted(ids),
            "caption_ids": [annotation["id"] for annotation in annotations],
            "versions": {
                name: importlib.metadata.version(name) for name in ("torch", "torchvision", "open_clip_torch", "pillow")
            },
        }


def test_lower_precision_is_close_but_not_equal(call, tiny):
    for precision in ("fp32", "bf16"):
        assert call("--split", "train", "--name", precision, "--precision", precision, "--dtype", "float32")[0] == 0
    full, low = EmbeddingCache("fp32", "train"), EmbeddingCache("bf16", "train")
    assert not torch.equal(full.image, low.image)
    torch.testing.assert_close(low.image, full.image, atol=0.05, rtol=0.05)


def test_the_folders_of_coco_are_read(call, tmp_path, data, tiny):
    root = draw_data(tmp_path / "mine", splits=(("train", TRAIN_IDS),), layout=DATASETS["coco"].layout)
    assert call("--dataset", "coco", "--data-root", root, "--split", "train")[0] == 0
    assert EmbeddingCache("coco", "train").image.shape == (3, 16)
    assert load_texts("coco", "ladder", 16)[0] == list(DATASETS["coco"].ladder)


def test_the_default_data_root_is_under_data(call, workdir):
    draw_data(workdir / "data" / "coco", splits=(("val", TRAIN_IDS),), layout=DATASETS["coco"].layout)
    flags = [flag for flag in call.flags if flag not in ("--data-root", call.flags[3])]
    assert run(main, [*flags, "--dataset", "coco", "--split", "val"]) == 0
    assert len(EmbeddingCache("coco", "val").text) == 6


# What can go wrong.


def stderr_of(call, capsys, *more):
    capsys.readouterr()
    status = run(main, [*call.flags, *map(str, more)])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_all_broken_pictures_are_named_and_nothing_is_written(call, capsys, tmp_path, workdir, workers):
    root = draw_data(tmp_path / "mine", splits=(("val", VAL_IDS),))
    files = sorted((root / "val").iterdir())
    files[0].write_bytes(b"")
    files[30].write_bytes(files[30].read_bytes()[:60])
    files[50].write_text("no picture")
    files[69].unlink()
    status, err = stderr_of(call, capsys, "--data-root", root, "--split", "val", "--workers", workers)
    assert status == 2
    for row, path in enumerate(files):
        assert (path.name in err) == (row in (0, 30, 50, 69))
    assert "4 broken image files in all" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (workdir / "embeddings").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--dataset", "nosuch"], ["nosuch", "coco", "shapes"]),
        (["--model", "ViT-B-33"], ["--model ViT-B-33", "ViT-B-32"]),
        (["--model", "absent.json"], ["--model absent.json", "no such file"]),
        (["--pretrained", "absent.pt"], ["--pretrained absent.pt", "no such file"]),
        (["--pretrained", "nosuch"], ["--pretrained nosuch", "no published weights"]),
        (
            ["--model", "ViT-B-32-quickgelu", "--pretrained", "nosuch"],
            ["--pretrained nosuch", "openai", "metaclip_400m"],
        ),
        (["--data-root", ".", "--split", "val"], ["--data-root .", "annotations/captions_val.json", "empty folder"]),
        (["--split", "test"], ["annotations/captions_test.json"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--batch-size", "many"], ["--batch-size"]),
        (["--workers", "-1"], ["--workers"]),
        (["--device", "nosuch"], ["--device nosuch"]),
        (["--precision", "fp16"], ["--precision fp16"]),
        (["--precision", "fp8"], ["--precision", "fp8"]),
        (["--name", "../mine"], ["--name", "plain name"]),
        (["--split", "texts"], ["--split", "plain name"]),
        (["--texts", "ladder.txt"], ["ladder.txt", "another name"]),
        (["--texts", "absent.txt"], ["--texts absent.txt", "no such file"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_what_the_user_can_put_right_ends_in_one_line_and_status_2(call, capsys, workdir, flags, expected):
    status, err = stderr_of(call, capsys, *flags)
    assert status == 2
    (line,) = err.splitlines()
    for part in expected:
        assert part in line
    assert list(workdir.iterdir()) == []


def test_a_tag_without_a_network_ends_in_one_line(call, capsys, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    status, err = stderr_of(call, capsys, "--model", "ViT-B-32-quickgelu", "--pretrained", "openai")
    assert status == 2
    (line,) = err.splitlines()
    assert "cannot be downloaded" in line
    assert "local weights file" in line


def test_pretrained_given_as_nothing_is_the_data_sets_own(call, monkeypatch):
    """--pretrained '' falls back to the data set's weights; random weights are never used."""
    asked = []
    monkeypatch.setattr(
        cache_embeddings,
        "load_clip",
        lambda model, pretrained, device, dtype: asked.append((model, pretrained)) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        call("--pretrained", "", "--model", "")
    assert asked == [("datasets/shapes/clip.json", "datasets/shapes/clip.safetensors")]


def test_embeddings_too_large_for_float16_are_refused(call, tiny, tmp_path):
    weights = tiny[2].state_dict() | {"visual.proj": tiny[2].visual.proj.detach() * 1e7}
    save_file(weights, tmp_path / "large.safetensors")
    status, _, last = call("--pretrained", tmp_path / "large.safetensors", "--split", "train")
    assert status == 2
    assert "--dtype float32" in last
    assert call("--pretrained", tmp_path / "large.safetensors", "--split", "train", "--dtype", "float32")[0] == 0


def test_long_captions_and_unknown_words_are_told_once(call, capsys, tmp_path, tiny):
    root = draw_data(tmp_path / "mine", splits=(("val", TRAIN_IDS),))
    file = root / "annotations" / "captions_val.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["caption"] = "a photo of a cat " * 10
    document["annotations"][1]["caption"] = "a zebra 🐈 \u0000 \ud800"
    file.write_text(json.dumps(document))
    weights = tiny[2].state_dict() | {"token_embedding.weight": tiny[2].token_embedding.weight.detach().clone()}
    weights["token_embedding.weight"][22548] = 0  # zebra
    save_file(weights, tmp_path / "w.safetensors")
    status, err = stderr_of(
        call, capsys, "--data-root", root, "--split", "val", "--pretrained", tmp_path / "w.safetensors"
    )
    assert status == 0
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3  # the third is on the ladder, whose last prompt is too long for this CLIP
    assert notes[0].startswith("note: 1 texts are longer than the model reads (16 tokens)")
    assert notes[1].startswith("note: 1 texts have words that this CLIP has never seen, such as 'a zebra")


# Killed and called again.


@pytest.fixture
def small_parts(monkeypatch):
    """Val has two parts of images and two of texts."""
    monkeypatch.setattr(parts, "PART", 64)


@pytest.fixture
def stopped(call, small_parts, monkeypatch):
    """Calls cache_embeddings.py on val and stops it before its third part: both image parts are kept, no text part."""

    def stop(*flags):
        written, write = [], Parts.write

        def write_two(self, *args):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(write(self, *args))

        with monkeypatch.context() as patch:
            patch.setattr(Parts, "write", write_two)
            assert call("--split", "val", *flags)[0] == 130

    return stop


def test_parts_give_the_bytes_of_no_parts(call, workdir, monkeypatch):
    assert call("--name", "a")[0] == 0
    monkeypatch.setattr(parts, "PART", 64)
    assert call("--name", "b", "--batch-size", 7)[0] == 0
    assert all_bytes(workdir / "embeddings" / "a") == all_bytes(workdir / "embeddings" / "b")


def test_what_was_encoded_before_a_stop_is_not_encoded_again(call, stopped, workdir, monkeypatch):
    assert call("--split", "val", "--name", "whole")[0] == 0
    stopped()
    with pytest.raises(UserError, match="unfinished; run cache_embeddings"):
        EmbeddingCache("shapes", "val")
    monkeypatch.setattr(encode.CocoImages, "__getitem__", lambda *_: pytest.fail("a picture was decoded again"))
    assert call("--split", "val")[0] == 0
    assert all_bytes(workdir / "embeddings" / "shapes") == all_bytes(workdir / "embeddings" / "whole")


def test_a_finished_cache_is_not_made_again_and_needs_no_clip(call, capsys, workdir, monkeypatch):
    assert call()[0] == 0
    before = all_bytes(workdir / "embeddings")
    monkeypatch.setattr(cache_embeddings, "load_clip", lambda *_: pytest.fail("CLIP was loaded"))
    status, err = stderr_of(call, capsys)
    assert status == 0
    assert [line for line in err.splitlines() if "whole already" in line] == [
        f"embeddings/shapes/{split}: whole already; --overwrite makes it anew" for split in ("train", "val")
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
def test_other_settings_are_refused_with_the_difference(call, stopped, tiny, tmp_path, change, expected, finished):
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
    old = EmbeddingCache("shapes", "val").image.clone()
    stopped("--overwrite", "--dtype", "float32")
    assert torch.equal(EmbeddingCache("shapes", "val").image, old)
    assert call("--split", "val", "--overwrite", "--dtype", "float32")[0] == 0
    assert all_bytes(workdir / "embeddings" / "shapes") == all_bytes(workdir / "embeddings" / "whole")


def test_overwrite_starts_an_unfinished_cache_anew_and_goes_on_with_its_own(call, stopped, monkeypatch):
    seen = []
    read = encode.CocoImages.__getitem__
    monkeypatch.setattr(encode.CocoImages, "__getitem__", lambda self, row: seen.append(row) or read(self, row))
    stopped()
    assert len(seen) == 70
    stopped("--overwrite")
    assert len(seen) == 140
    assert call("--split", "val", "--overwrite")[0] == 0
    assert len(seen) == 140


def test_a_cache_that_does_not_tell_what_it_is_stays(call, cache, workdir):
    cache.rename(workdir / "embeddings" / "shapes")
    (workdir / "embeddings" / "shapes").rename(workdir / "val")
    (workdir / "embeddings" / "shapes").mkdir()
    (workdir / "val").rename(workdir / "embeddings" / "shapes" / "val")
    (workdir / "embeddings/shapes/val/meta.json").unlink()
    before = all_bytes(workdir / "embeddings")
    status, _, last = call("--split", "val")
    assert status == 2
    assert "--overwrite" in last
    assert all_bytes(workdir / "embeddings") == before
    assert call("--split", "val", "--overwrite")[0] == 0
    assert len(EmbeddingCache("shapes", "val").image) == 70


def test_the_splits_of_a_cache_come_from_one_clip(call, tiny, tmp_path):
    _, other, _ = write_tiny_clip(tmp_path, "other", text_cfg=CONFIG["text_cfg"] | {"layers": 2})
    assert call("--split", "train")[0] == 0
    status, _, last = call("--split", "val", "--model", other.with_suffix(".json"), "--pretrained", other)
    assert status == 2
    assert "embeddings/shapes/train: was made with another CLIP: model was tiny-cache.json" in last
    assert not Path("embeddings/shapes/val").exists()


def test_texts_that_another_clip_left_behind_are_refused(call, script, workdir, tiny, tmp_path):
    assert call("--split", "val")[0] == 0
    Path("lines.txt").write_text("a cat\n")
    assert script(main, *texts_flags("lines.txt"), "--name", "shapes")[0] == 0
    other = write_tiny_clip(tmp_path, "other")
    assert call("--split", "val", "--overwrite", "--model", other[0], "--pretrained", other[1])[0] == 0
    meta = EmbeddingCache("shapes", "val").meta
    assert load_texts("shapes", "ladder", 16, meta=meta) is not None  # was made anew
    with pytest.raises(
        UserError, match=r"lines\.pt: embedded with another CLIP than the cache: .*; embed it again, or remove it"
    ):
        load_texts("shapes", "lines", 16, meta=meta)


def test_texts_of_another_clip_than_the_caches_are_refused(call, tiny, tmp_path):
    assert call("--split", "val", "--name", "it")[0] == 0
    Path("a.txt").write_text("a photo\n")
    save_file(tiny[2].state_dict() | {"logit_scale": torch.tensor(1.0)}, tmp_path / "other.safetensors")
    status, _, last = call("--name", "it", "--texts", "a.txt", "--pretrained", tmp_path / "other.safetensors")
    assert status == 2
    assert "made with another CLIP: pretrained was tiny-cache.safetensors" in last


@pytest.fixture
def broken_root(tmp_path):
    """Val with its pictures of rows 2 and 66, in order of id, broken. Returns: (folder, the two file names)."""
    root = draw_data(tmp_path / "broken", splits=(("val", VAL_IDS),))
    names = [plain_split(root, "val")[0][row]["file_name"] for row in (2, 66)]
    (root / "val" / names[0]).write_bytes(b"")
    (root / "val" / names[1]).write_text("no picture")
    return root, names


def test_what_was_encoded_before_a_broken_picture_is_kept(call, small_parts, broken_root, data, monkeypatch):
    root, names = broken_root
    (root / "val" / names[0]).write_bytes((data / "val" / names[0]).read_bytes())
    assert call("--data-root", root, "--split", "val")[0] == 2
    (root / "val" / names[1]).write_bytes((data / "val" / names[1]).read_bytes())
    seen = []
    read = encode.CocoImages.__getitem__
    monkeypatch.setattr(encode.CocoImages, "__getitem__", lambda self, row: seen.append(row) or read(self, row))
    assert call("--data-root", root, "--split", "val")[0] == 0
    assert seen == list(range(64, 70))


def test_pictures_that_were_skipped_are_looked_at_again_without_the_flag(call, stopped, broken_root):
    root, names = broken_root
    stopped("--data-root", root, "--skip-broken")
    status, _, last = call("--data-root", root, "--split", "val")
    assert status == 2
    assert names[1] in last
    assert "2 broken image files in all" in last


def test_after_a_broken_picture_nothing_is_encoded(call, small_parts, capsys, broken_root, monkeypatch):
    root, names = broken_root
    seen = []
    monkeypatch.setattr(encode, "in_chunks", lambda *_: seen.append(1))
    status, err = stderr_of(call, capsys, "--data-root", root, "--split", "val", "--batch-size", 1)
    assert status == 2
    assert not seen
    assert all(name in err for name in names)
    assert "--skip-broken" in err.splitlines()[-1]
    assert not Path("embeddings").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_pictures_and_their_captions_are_left_out_and_recorded(call, small_parts, broken_root, data, workers):
    root, names = broken_root
    assert call("--split", "val", "--name", "all")[0] == 0
    assert call("--data-root", root, "--split", "val", "--skip-broken", "--workers", workers)[0] == 0
    cache, full = EmbeddingCache("shapes", "val"), EmbeddingCache("all", "val")
    left = [row for row in range(70) if row not in (2, 66)]
    assert [name for name, _ in cache.meta["skipped"]] == names
    assert all(reason and str(root) not in reason for _, reason in cache.meta["skipped"])
    assert cache.images == [full.images[row] for row in left]
    assert torch.equal(cache.image, full.image[left])
    captions = [row for row, image in enumerate(full.image_of_caption.tolist()) if image in left]
    assert cache.captions == [full.captions[row] for row in captions]
    assert torch.equal(cache.text, full.text[captions])
    assert [left[row] for row in cache.image_of_caption.tolist()] == full.image_of_caption[captions].tolist()
    assert [[left[row] for row in rows] for rows in cache.relevance] == [
        [row for row in full.relevance[i] if row in left] for i in captions
    ]
    assert cache.meta["image_ids"] == [full.meta["image_ids"][row] for row in left]


def test_skipping_goes_on_after_a_stop_with_the_same_bytes_and_is_not_forgotten(call, stopped, broken_root, workdir):
    flags = ["--data-root", broken_root[0], "--split", "val", "--skip-broken"]
    assert call(*flags, "--name", "whole")[0] == 0
    stopped(*flags)
    assert call(*flags)[0] == 0
    assert all_bytes(workdir / "embeddings" / "shapes") == all_bytes(workdir / "embeddings" / "whole")
    status, _, last = call(*flags[:-1])
    assert status == 2
    assert "2 broken images were left out" in last


def test_a_cache_of_broken_pictures_only_is_refused(call, tmp_path):
    root = draw_data(tmp_path / "mine", splits=(("train", TRAIN_IDS),))
    for path in (root / "train").iterdir():
        path.write_bytes(b"")
    status, _, last = call("--data-root", root, "--split", "train", "--skip-broken")
    assert status == 2
    assert "no caption is left" in last


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


def test_what_dead_processes_began_is_removed_and_what_live_ones_do_is_not(workdir):
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    dead, alive, other = (
        workdir / name
        for name in (f".a.json.{process}.partial", f".a.json.{os.getppid()}.partial", f".b.json.{process}.partial")
    )
    for path in (dead, alive, other):
        path.write_text("half")
    save_json([1], workdir / "a.json")
    assert sorted(workdir.iterdir()) == sorted([alive, other, workdir / "a.json"])
    (workdir / f".set.{process}.partial" / "train").mkdir(parents=True)
    world.make(workdir / "set", train=1, val=1)
    assert not (workdir / f".set.{process}.partial").exists()


@pytest.mark.parametrize("file", ["image.pt", "text.pt"])
def test_a_bit_that_changed_on_disk_is_noticed(cache, file):
    content = bytearray((cache / file).read_bytes())
    position = bytes(content).index(torch.load(cache / file, weights_only=True).numpy().tobytes())
    content[position + 5] ^= 1
    (cache / file).write_bytes(content)
    assert f"{file}: not a file of tensors that can be read safely" in refusal()
    assert "checksum" in refusal()


@pytest.mark.parametrize("value", ["1", -1, 0, [1], float("inf")])
def test_a_logit_scale_that_is_none_is_refused(cache, value):
    put("meta.json", {"logit_scale": value})
    assert "logit_scale" in refusal()


def test_relevance_without_captions_is_refused(cache):
    (cache / "captions.json").unlink()
    assert "captions.json: no such file" in refusal()


def test_a_captions_file_with_categories_is_read(tmp_path):
    root = draw_data(tmp_path / "mine", splits=(("val", TRAIN_IDS),))
    file = root / "annotations" / "captions_val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"categories": [3], "info": None}))
    assert len(CocoCaptions(root, "val", DATASETS["shapes"].layout).captions) == 6


# --texts.


@pytest.fixture
def made(call):
    assert call("--name", "it", "--split", "val", "--precision", "fp32")[0] == 0
    return call


def texts_flags(file):
    return ["--name", "it", "--texts", str(file), "--device", "cpu"]


def test_texts_a_line_are_embedded_as_the_cache_was(made, script, workdir, tiny):
    Path("my prompts.txt").write_text("\ufeffa photo\n\n  a photo of a cat  \r\n🐈\na photo\n", encoding="utf-8")
    before = all_bytes(workdir / "embeddings" / "it" / "val")
    assert script(main, *texts_flags("my prompts.txt"))[0] == 0  # model, weights and precision are the cache's
    texts, z, chains = load_texts("it", "my prompts", 16)
    assert texts == ["a photo", "a photo of a cat", "🐈", "a photo"]
    assert chains is None
    assert z.dtype == torch.float16
    torch.testing.assert_close(z.float(), direct_texts(tiny[2], texts), atol=2e-3, rtol=2e-3)
    cache = EmbeddingCache("it", "val")
    assert torch.equal(z[1], cache.text[cache.captions.index("a photo of a cat")])  # bit for bit
    assert all_bytes(workdir / "embeddings" / "it" / "val") == before


HIERARCHIES = 'id,captions,image_url\n0,"table => table with plates, three => A table.",http://x\n1,bird => blue bird,http://y\n2,cat,http://z\n'


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "as spreadsheets write it"])
def test_caption_hierarchies_are_embedded_chain_by_chain(made, script, start, tiny):
    Path("hierarchies.csv").write_text(start + HIERARCHIES, encoding="utf-8")
    assert script(main, *texts_flags("hierarchies.csv"))[0] == 0
    texts, z, chains = load_texts("it", "hierarchies", 16)
    assert texts == ["table", "table with plates, three", "A table.", "bird", "blue bird", "cat"]
    assert chains == [[0, 1, 2], [3, 4], [5]]
    torch.testing.assert_close(z.float(), direct_texts(tiny[2], texts), atol=2e-3, rtol=2e-3)


def test_a_csv_whose_first_column_is_the_captions_may_start_with_a_mark(tmp_path):
    (tmp_path / "a.csv").write_text("captions\na => b\n", encoding="utf-8-sig")
    assert read_texts(tmp_path / "a.csv") == (["a", "b"], [[0, 1]])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "not readable as UTF-8"),
        ("a.csv", b"", "no column 'captions'"),
        ("a.csv", b"id,texts\n1,a\n", "found: id, texts"),
        ("a.csv", b"id,captions\n", "holds no text"),
        ("a.csv", b"id,captions\n1,a => b\n2,a => => b\n", "line 3 has an empty caption"),
        ("a.csv", b"id,captions\n1\n", "line 2 has an empty caption"),
        ("a.csv", b"captions\n\xe9\n", "not readable as UTF-8"),
        ("a.csv", b'captions\n"' + b"a" * 200_000 + b'"\n', "not readable"),
    ],
)
def test_files_without_proper_texts_are_refused(made, script, workdir, name, text, expected):
    Path(name).write_bytes(text)
    status, _, last = script(main, *texts_flags(name))
    assert status == 2
    assert name in last
    assert expected in last
    assert not Path("embeddings/it/texts/a.pt").exists()


def test_a_missing_file_of_texts_is_named(made, script):
    status, _, last = script(main, *texts_flags("absent.txt"))
    assert status == 2
    assert "--texts absent.txt: no such file" in last


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": 3},
        {"precision": None},
        {"dtype": "float"},
        {"dtype": "nn"},
        {"model": None},
        {"pretrained": 7},
        None,
    ],
)
def test_texts_for_a_cache_with_a_broken_meta_are_refused(made, script, changes):
    Path("a.txt").write_text("a photo\n")
    file = Path("embeddings/it/val/meta.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes if changes else [1]))
    status, _, last = script(main, *texts_flags("a.txt"))
    assert status == 2
    assert "embeddings/it/val/meta.json" in last


def test_texts_for_a_cache_without_a_meta_are_refused(made, script):
    Path("a.txt").write_text("a photo\n")
    Path("embeddings/it/val/meta.json").unlink()
    status, _, last = script(main, *texts_flags("a.txt"))
    assert status == 2
    assert "no cache with a meta.json in embeddings/it" in last
