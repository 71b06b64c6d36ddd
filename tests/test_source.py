"""What caching needs of a split, of every data set: a fingerprint, units that are kept, a cache that they become."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets.embedding import EmbeddingCache
from datasets.registry import DATASETS
from datasets.shapes import classes
from datasets.source import ListSplit, ListUnit, Split
from datasets.units import UnitStore
from tests.conftest import VAL_IDS, draw, draw_data, write_flickr30k, write_karpathy_coco, write_tar
from utils.embed import embed_units
from utils.files import save_tensors
from utils.preprocess import load_clip


def drawn(name, root):
    return draw_data(root, (("val", VAL_IDS),), DATASETS[name].layout)


def table(root):
    draw(root / "a.png", 1), draw(root / "b.png", 2)
    (root / "val.csv").write_text("filepath,title\na.png,one\nb.png,two\na.png,three\n")


def tars(root):
    draw(root / "a.png", 1), draw(root / "b.png", 2)
    for number, name in enumerate("ab"):
        write_tar(
            root / f"{number}.tar",
            {"x.png": (root / f"{name}.png").read_bytes(), "x.txt": name.encode()},
        )


def flickr8k(root):
    write_flickr30k(root, "Flicker8k_Dataset")
    (root / "dataset_flickr30k.json").rename(root / "dataset_flickr8k.json")


def arrays(root):
    (root / "val").mkdir(parents=True)
    for name, rows in (("image", 2), ("text", 3)):
        np.save(root / "val" / f"{name}.npy", np.random.default_rng(rows).normal(size=(rows, 16)))
    np.save(root / "val" / "image_of_caption.npy", np.array([0, 1, 1]))


def class_folders(root):
    for name in ("cat", "dog"):
        (root / "val" / name).mkdir(parents=True)
        draw(root / "val" / name / "a.png", len(name))


MAKE = {  # the files of the split val of every data set, under a folder
    "coco": lambda root: drawn("coco", root),
    "coco-karpathy": write_karpathy_coco,
    "csv": table,
    "flickr8k": flickr8k,
    "flickr30k": write_flickr30k,
    "arrays": arrays,
    "imagefolder": class_folders,
    "shapes": lambda root: drawn("shapes", root),
    "shapes-classes": lambda root: classes.make(root, train=1, val=1),
    "webdataset": tars,
}
COUNTS = {
    "coco": (70, 140),
    "coco-karpathy": (1, 1),
    "csv": (2, 3),
    "flickr8k": (1, 1),
    "flickr30k": (1, 1),
    "shapes": (70, 140),
}
COUNTS |= {"arrays": (2, 3), "imagefolder": (2, 10), "shapes-classes": (80, 640)}
COUNTS |= {"webdataset": (2, 2)}  # images and captions


@pytest.fixture(params=DATASETS)
def named(request, tmp_path, monkeypatch):
    """(name, function that opens the split val of that data set)."""
    monkeypatch.chdir(tmp_path)
    MAKE[request.param](tmp_path / "data")
    data_set = DATASETS[request.param]
    return request.param, lambda root="data": data_set.reader(
        tmp_path / root, "val", data_set.layout
    )


def test_every_data_set_is_a_split_with_a_readable_fingerprint(named, tmp_path):
    name, open_split = named
    split = open_split()
    assert isinstance(split, Split)
    assert isinstance(split, ListSplit) == (name not in ("webdataset", "arrays"))
    for says in (split.fingerprint(), split.state()):
        assert json.loads(json.dumps(says)) == says
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in says.items())
    assert split.fingerprint()
    assert (open_split().fingerprint(), open_split().state()) == (
        split.fingerprint(),
        split.state(),
    )
    (tmp_path / "data").rename(tmp_path / "moved")  # where it lies does not matter
    assert open_split("moved").fingerprint() == split.fingerprint()


def test_the_units_of_every_data_set_become_a_cache_that_is_read(named, tiny, tmp_path):
    name, open_split = named
    split = open_split()
    clip = load_clip(str(tiny[0]), str(tiny[1]))
    folder = tmp_path / "embeddings" / name / "val"
    store = UnitStore(folder, split.fingerprint(), torch.float16)
    assert [unit.left_out(store.folder) for unit in split.units()] == [None] * len(split.units())
    embed_units(split.units(), clip, store)
    assert [unit.left_out(store.folder) for unit in open_split().units()] == [{}] * len(
        split.units()
    )
    embed_units(open_split().units(), replace(clip, model=None), store)  # nothing is left to encode
    meta = open_split().assemble(
        store, folder, {"dtype": "float16", **split.fingerprint(), **clip.info}
    )
    cache = EmbeddingCache(name, "val", tmp_path / "embeddings")
    assert {key: value for key, value in cache.meta.items() if key != "shards"} == meta
    images, captions = COUNTS[name]
    assert (cache.image.shape, cache.text.shape) == ((images, 16), (captions, 16))
    assert (meta["image_count"], meta["caption_count"], meta["embed_dim"]) == (images, captions, 16)
    assert (len(cache.images), len(cache.captions)) == (images, captions)
    assert meta["skipped"] == []
    if isinstance(split, ListSplit):
        assert (cache.images, cache.captions) == (split.image_names, split.captions)
        assert cache.image_of_caption.tolist() == split.image_of_caption
        assert cache.relevance == split.relevance


# Lists.

PLAIN = ListSplit(
    [7, 8, 9], ["/d/a", "/d/b", "/d/c"], ["a", "b", "c"], [1, 2, 3, 4], list("wxyz"), [0, 1, 2, 2]
)
MANY = replace(PLAIN, relevance=[[0, 1], [1], [0, 2], [2]])
JUDGED = replace(
    PLAIN, relevance={"eccv": {"t2i": [[0, 1], [], [2], []], "i2t": [[0, 2], [], [1, 2, 3]]}}
)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_ids": [7, 8, 10]},
        {"image_names": ["a", "b", "d"]},
        {"caption_ids": [1, 2, 3, 5]},
        {"captions": list("wxyy")},
        {"image_of_caption": [0, 1, 2, 1]},
        {"relevance": [[0], [1], [0, 2], [2]]},
        {"relevance": JUDGED.relevance},
    ],
)
def test_the_fingerprint_changes_with_whatever_is_in_the_lists_but_the_paths(changes):
    assert replace(MANY, **changes).fingerprint() != MANY.fingerprint()
    assert replace(MANY, image_files=["/e/a", "/e/b", "/e/c"]).fingerprint() == MANY.fingerprint()


def test_a_split_without_some_images_has_the_others_with_their_captions():
    assert MANY.without(()) == MANY
    left = MANY.without([1])
    assert (left.image_ids, left.image_files, left.image_names) == (
        [7, 9],
        ["/d/a", "/d/c"],
        ["a", "c"],
    )
    assert (left.caption_ids, left.captions, left.image_of_caption) == (
        [1, 3, 4],
        ["w", "y", "z"],
        [0, 1, 1],
    )
    assert left.relevance == [[0], [0, 1], [1]]
    assert MANY.without({0}).relevance == [[0], [1], [1]]
    assert JUDGED.without([1]).relevance == {
        "eccv": {"t2i": [[0], [1], []], "i2t": [[0, 1], [1, 2]]}
    }
    assert PLAIN.without([0]).relevance is None
    assert PLAIN.without([0, 1, 2]).captions == []


def test_a_unit_of_an_earlier_version_has_reasons_without_the_path(tmp_path):
    unit = ListUnit("image", 0, ["d/a.png", "d/b.png"])
    left_out = {1: "d/b.png: no such file"}
    save_tensors({"rows": torch.ones(1, 4), "left_out": left_out}, tmp_path / "image-00000.pt")
    assert unit.left_out(tmp_path) == {1: "no such file"}
