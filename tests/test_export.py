"""eval.py --export: what the table says against a plain computation, in every form; it is whole or not there."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.isotonic import IsotonicRegression

import eval as eval_script
from datasets.embedding import EmbeddingCache
from datasets.texts import write_texts
from models import METHODS
from models.base import SMALL
from tests.conftest import REPOSITORY, make_cache, write_tar
from utils.checkpoint import load_adaptor, save_adaptor
from utils.questions import export as exporting
from utils.questions.export import COLUMNS

FLAGS = ("--dataset", "tiny", "--device", "cpu")
IMAGES, CAPTIONS = 30, 90
AWKWARD = 'a "quoted", caption\nof two\rlines, \u65e5'


@pytest.fixture
def tiny_cache(workdir):
    """./embeddings/tiny with captions that CSV must quote, and untrained adaptors of it."""
    make_cache("tiny", IMAGES, captions=[AWKWARD, *(f"caption {i}" for i in range(1, CAPTIONS))])
    for number, method in enumerate(("asymvlm-psd", "prolip", "asymvlm-psd-image")):
        make_checkpoint(method, "tiny", number)
    make_checkpoint("prolip", "tiny", 7, seed=1)
    return EmbeddingCache("tiny", "val")


def make_checkpoint(method, name, start, seed=0):
    torch.manual_seed(start)
    save_adaptor(
        METHODS[method](64), method, SMALL, {}, Path(f"checkpoints/{name}/{seed}/{method}.pt")
    )


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_bytes().decode().split("\n")[:-1]]


def plain(method, cache):
    """Similarities (N, M), and uncertainty of texts and images, of a method's checkpoint: arrays."""
    adaptor = load_adaptor(f"checkpoints/tiny/0/{method}.pt")
    image, text = cache.image.read().float(), cache.text.read().float()
    with torch.no_grad():
        return [
            None if value is None else value.double().numpy()
            for value in (
                adaptor.similarity(image, text),
                adaptor.adapt_text(text)[1],
                adaptor.adapt_image(image)[1],
            )
        ]


def sklearns(uncertainty, is_right, asked):
    return (
        IsotonicRegression(increasing=False, out_of_bounds="clip")
        .fit(uncertainty, is_right)
        .predict(asked)
    )


def test_captions_and_images_are_those_of_a_plain_computation(tiny_cache, script):
    status, printed, _ = script(
        eval_script.main, *FLAGS, "--method", "prolip", "--export", "out/scores.jsonl"
    )
    assert (status, printed) == (0, "")
    rows = read_jsonl("out/scores.jsonl")
    assert {tuple(row) for row in rows} == {tuple(COLUMNS)}
    similarity, of_text, of_image = plain("prolip", tiny_cache)
    owner = tiny_cache.image_of_caption.numpy()
    assert [row["kind"] for row in rows] == ["caption"] * CAPTIONS + ["image"] * IMAGES
    assert [row["row"] for row in rows] == [*range(CAPTIONS), *range(IMAGES)]
    captions, images = rows[:CAPTIONS], rows[CAPTIONS:]
    column = lambda rows, name: [row[name] for row in rows]  # noqa: E731
    assert column(captions, "text") == tiny_cache.captions
    assert column(captions, "image") == [tiny_cache.images[image] for image in owner]
    assert column(images, "image") == tiny_cache.images
    assert column(images, "text") == [None] * IMAGES
    assert column(captions, "first") == [tiny_cache.images[image] for image in similarity.argmax(0)]
    assert column(images, "first") == [
        tiny_cache.captions[caption] for caption in similarity.argmax(1)
    ]
    ranks = [(similarity[:, c] > similarity[owner[c], c]).sum() + 1 for c in range(CAPTIONS)]
    assert column(captions, "rank") == ranks
    image_ranks = [
        (similarity[i] > similarity[i, owner == i].max()).sum() + 1 for i in range(IMAGES)
    ]
    assert column(images, "rank") == image_ranks
    for part, uncertainty, rank in ((captions, of_text, ranks), (images, of_image, image_ranks)):
        np.testing.assert_allclose(column(part, "uncertainty"), uncertainty, rtol=1e-5)
        given = np.array(column(part, "uncertainty"))
        percentiles = [stats.percentileofscore(given, value, kind="strict") for value in given]
        np.testing.assert_allclose(column(part, "percentile"), percentiles)
        np.testing.assert_allclose(
            column(part, "p_right"), sklearns(given, np.array(rank) == 1, given), atol=1e-12
        )
    assert len(set(column(captions, "p_right"))) > 1


def test_an_image_that_has_no_caption_has_no_rank(workdir, script):
    make_cache("tiny", IMAGES, 1, image_of_caption=[0] * 10 + [*range(9, 29)])
    make_checkpoint("prolip", "tiny", 0)
    assert (
        script(eval_script.main, *FLAGS, "--method", "prolip", "--export", "scores.jsonl")[0] == 0
    )
    images = read_jsonl("scores.jsonl")[IMAGES:]
    bare = [row["row"] for row in images if row["rank"] is None]
    assert bare == [row["row"] for row in images if row["first"] is None] == [*range(1, 9), 29]
    assert all(0 <= row["p_right"] <= 1 for row in images)


def test_csv_says_what_jsonl_says_of_several_methods_and_seeds(tiny_cache, script):
    several = (*FLAGS, "--method", "prolip", "--seed", 0, 1, "--export")
    for file in ("scores.csv", "scores.jsonl"):
        assert script(eval_script.main, *several, file)[0] == 0
    table, expected = read_csv("scores.csv"), read_jsonl("scores.jsonl")
    assert table == [{k: "" if v is None else str(v) for k, v in row.items()} for row in expected]
    assert table[0]["text"] == AWKWARD
    assert [(row["method"], row["seed"]) for row in table[:: CAPTIONS + IMAGES]] == [
        ("prolip", "0"),
        ("prolip", "1"),
    ]
    both = (*FLAGS, "--method", "asymvlm-psd", "asymvlm-psd-image", "--export")
    assert script(eval_script.main, *both, "scores.csv")[0] == 0  # the file is replaced
    kinds = [("asymvlm-psd", "caption")] * CAPTIONS + [("asymvlm-psd-image", "image")] * IMAGES
    assert [(row["method"], row["kind"]) for row in read_csv("scores.csv")] == kinds


def test_the_frozen_clip_finds_the_first_answers_where_it_ranks(tiny_cache, script):
    frozen = torch.cosine_similarity(
        tiny_cache.image.read()[:, None].float(), tiny_cache.text.read().float(), dim=2
    )
    first = [tiny_cache.images[image] for image in frozen.argmax(0)]
    write_texts("tiny", "same", tiny_cache.text.read(), tiny_cache.captions, {})
    for more in ((), ("--texts", "same")):
        assert (
            script(
                eval_script.main, *FLAGS, "--score", "frozen", "--export", "scores.jsonl", *more
            )[0]
            == 0
        )
        rows = read_jsonl("scores.jsonl")
        assert [row["first"] for row in rows] == first
    assert script(eval_script.main, *FLAGS, "--export", "scores.jsonl")[0] == 0
    assert [row["first"] for row in read_jsonl("scores.jsonl")] != first


def test_further_texts_are_placed_among_the_captions_of_the_split(tiny_cache, script):
    z = torch.cat(
        [
            tiny_cache.text.read()[:2],
            torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half(),
        ]
    )
    texts = ["of caption 0", "of caption 1", "c", "d", "e"]
    write_texts("tiny", "more", z, texts, {})
    assert script(eval_script.main, *FLAGS, "--export", "captions.jsonl")[0] == 0
    assert script(eval_script.main, *FLAGS, "--export", "texts.jsonl", "--texts", "more")[0] == 0
    captions, rows = read_jsonl("captions.jsonl"), read_jsonl("texts.jsonl")
    assert [(row["kind"], row["text"], row["image"], row["rank"]) for row in rows] == [
        ("text", text, None, None) for text in texts
    ]
    for row, caption in zip(rows[:2], captions, strict=False):
        assert row["first"] == caption["first"]
        assert [row[key] for key in ("uncertainty", "percentile", "p_right")] == pytest.approx(
            [caption[key] for key in ("uncertainty", "percentile", "p_right")], rel=1e-5
        )
    known = [caption["uncertainty"] for caption in captions]
    p = sklearns(
        known, [caption["rank"] == 1 for caption in captions], [row["uncertainty"] for row in rows]
    )
    np.testing.assert_allclose([row["p_right"] for row in rows], p, atol=1e-12)
    with torch.no_grad():
        similarity = load_adaptor("checkpoints/tiny/0/asymvlm-psd.pt").similarity(
            tiny_cache.image.read(), z
        )
    assert [row["first"] for row in rows] == [
        tiny_cache.images[image] for image in similarity.argmax(0)
    ]


def test_a_split_in_shards_stays_on_the_disk_and_readmes_lines_filter_its_tars(
    workdir, script, monkeypatch
):
    keys, captions = [f"{i:04d}" for i in range(IMAGES)], [f"caption {i}" for i in range(IMAGES)]
    changes = {"captions": captions, "splits": ("train",), "captions_per_image": 1}
    make_cache("cc3m", IMAGES, **changes)
    make_checkpoint("asymvlm-psd", "cc3m", 0)
    command = ("--dataset", "cc3m", "--split", "train", "--device", "cpu", "--export")
    assert script(eval_script.main, *command, "whole.csv")[0] == 0
    make_cache("cc3m", IMAGES, **changes, shard_rows=8, meta={"embed_dim": 64, "dtype": "float16"})
    for names in Path("embeddings").rglob("images-*.json"):  # keys, as tars give them
        names.write_text(names.read_text().replace(".png", ""))
    monkeypatch.setattr("datasets.rows.RowsOnDisk.read", None)  # nothing may read all of them
    monkeypatch.setattr(exporting, "BATCH", 7)
    status, _, error = script(eval_script.main, *command, "captions.csv")
    assert status == 0, error
    absent = {"first": "", "rank": "", "p_right": ""}
    expected = [
        row | absent | {"image": row["image"].removesuffix(".png")} for row in read_csv("whole.csv")
    ]
    rows = read_csv("captions.csv")
    assert [{**row, "uncertainty": None} for row in rows] == [
        {**row, "uncertainty": None} for row in expected
    ]
    near = [[float(row["uncertainty"]) for row in part] for part in (rows, expected)]
    np.testing.assert_allclose(*near, rtol=1e-5)

    Path("cc3m").mkdir()
    write_tar(
        "cc3m/00000.tar",
        {f"{key}.txt": caption.encode() for key, caption in zip(keys, captions, strict=True)},
    )
    readme = (REPOSITORY / "datasets/README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n((?:(?!```).)*captions\.csv.*?)```", readme, re.DOTALL)[
        1
    ].replace("00329", "00000")
    names = {}
    exec(code, names)
    certain = {row["image"] for row in rows if float(row["percentile"]) < 90}
    assert len(certain) == 27
    assert {sample["__key__"] for sample in names["certain"]} == certain


def test_parquet_says_what_jsonl_says(tiny_cache, script):
    parquet = pytest.importorskip("pyarrow.parquet")
    for file in ("scores.parquet", "scores.jsonl"):
        assert script(eval_script.main, *FLAGS, "--method", "prolip", "--export", file)[0] == 0
    table = parquet.read_table("scores.parquet")
    assert [str(kind) for kind in table.schema.types] == [
        kind.replace("float64", "double") for kind in COLUMNS.values()
    ]
    assert table.to_pylist() == read_jsonl("scores.jsonl")


WRONG = [
    (("--export", "scores.xlsx"), ["--export", "scores.xlsx", ".csv, .jsonl, .parquet"]),
    (("--export", "embeddings.csv/"), ["embeddings.csv", "folder"]),
    (("--export", "scores.parquet"), ["--export", "pip install pyarrow"]),
    (
        ("--export", "scores.csv", "--texts", "absent"),
        ["--texts absent", "cache_embeddings.py --name tiny --texts FILE"],
    ),
    (
        ("--export", "scores.csv", "--texts", "ladder", "--method", "asymvlm-psd-image"),
        ["asymvlm-psd-image"],
    ),
    (("--export", "scores.csv", "--prompts", "a"), ["--export", "--prompts"]),
    (("--export", "scores.csv", "--seed", 5), ["checkpoints/tiny/5", "train.py"]),
    (("--texts", "ladder"), ["--texts", "--export"]),
]


def test_what_cannot_be_exported_is_one_line_and_no_file(tiny_cache, script, workdir, monkeypatch):
    Path("embeddings.csv").mkdir()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None
    )  # as where pyarrow is not installed
    before = sorted(workdir.rglob("*"))
    for more, words in WRONG:
        status, printed, error = script(eval_script.main, *FLAGS, *more)
        assert (status, printed) == (2, ""), more
        assert all(word in error for word in words), error
        assert sorted(workdir.rglob("*")) == before


@pytest.mark.parametrize("suffix", exporting.WRITERS)
def test_an_export_that_fails_half_way_leaves_the_file_that_was_there(
    suffix, tiny_cache, script, workdir, monkeypatch
):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    file = workdir / f"scores{suffix}"
    file.write_text("as it was")
    before, several = (
        sorted(workdir.rglob("*")),
        ("--method", "asymvlm-psd", "prolip", "--export", file),
    )
    real, calls = exporting.rank_queries, []

    def full_disk(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(file))
        return real(*arguments)

    monkeypatch.setattr(exporting, "rank_queries", full_disk)
    status, _, error = script(eval_script.main, *FLAGS, *several)
    assert (status, len(calls)) == (2, 2)
    assert "the disk is full" in error
    assert file.read_text() == "as it was"
    assert sorted(workdir.rglob("*")) == before
