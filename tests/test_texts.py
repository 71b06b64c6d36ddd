"""Further texts of a cache: written, read, embedded as the cache was by --texts, refused where they do not fit it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cache_embeddings import main
from datasets.embedding import EmbeddingCache
from datasets.texts import load_texts, read_texts, write_texts
from tests.conftest import all_bytes, direct_texts, write_tiny_clip
from utils.cli import UserError

DIM = 8


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


# --texts.


@pytest.fixture
def made(call):
    assert call("--name", "it", "--split", "val", "--precision", "fp32")[0] == 0
    return call


def texts_flags(file):
    return ["--name", "it", "--texts", str(file), "--device", "cpu"]


def test_texts_a_line_are_embedded_as_the_cache_was(made, script, workdir, tiny):
    Path("my prompts.txt").write_text(
        "\ufeffa photo\n\n  a photo of a cat  \r\n🐈\na photo\n", encoding="utf-8"
    )
    before = all_bytes(workdir / "embeddings" / "it" / "val")
    assert (
        script(main, *texts_flags("my prompts.txt"))[0] == 0
    )  # model, weights and precision are the cache's
    texts, z, chains = load_texts("it", "my prompts", 16)
    assert texts == ["a photo", "a photo of a cat", "🐈", "a photo"]
    assert chains is None
    assert z.dtype == torch.float16
    torch.testing.assert_close(z.float(), direct_texts(tiny[2], texts), atol=2e-3, rtol=2e-3)
    cache = EmbeddingCache("it", "val")
    assert torch.equal(z[1], cache.text[cache.captions.index("a photo of a cat")])  # bit for bit
    assert all_bytes(workdir / "embeddings" / "it" / "val") == before


HIERARCHIES = """id,captions,image_url
0,"table => table with plates, three => A table.",http://x
1,bird => blue bird,http://y
2,cat,http://z
"""


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
        ("a.txt", b"\xff\xfe\x00", "line 1: byte 0xff is not UTF-8"),
        ("a.csv", b"", "no column 'captions'"),
        ("a.csv", b"id,texts\n1,a\n", "found: 'id', 'texts'"),
        ("a.csv", b"id,captions\n", "holds no text"),
        ("a.csv", b"id,captions\n1,a => b\n2,a => => b\n", "line 3 has an empty caption"),
        ("a.csv", b"id,captions\n1\n", "line 2 has 1 fields, the header 2"),
        ("a.csv", b"captions\n\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
        (
            "a.csv",
            b"captions\nanimal => a dog, black\n",
            "line 2 has 2 fields, the header 1; quote",
        ),
        ("a.csv", b'captions,n\n"a => b,1\nc => d",2\n', "lines 2 to 3"),
        ("a.json", b'["a"]', ".json files are not read; give a text file"),
        ("a.jsonl", b'{"caption": "a"}', ".jsonl files are not read"),
    ],
)
def test_files_without_proper_texts_are_refused(made, script, workdir, name, text, expected):
    Path(name).write_bytes(text)
    status, _, last = script(main, *texts_flags(name))
    assert status == 2
    assert name in last
    assert expected in last
    assert not Path("embeddings/it/texts/a.pt").exists()


def test_quotation_marks_of_a_table_of_texts_can_be_text(tmp_path):
    (tmp_path / "a.csv").write_text('captions\n"a "b" c"\n', encoding="utf-8")
    with pytest.raises(UserError, match="--csv-quoting none"):
        read_texts(tmp_path / "a.csv")
    assert read_texts(tmp_path / "a.csv", "none") == (['"a "b" c"'], [[0]])


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


def test_texts_that_another_clip_left_behind_are_refused(call, script, workdir, tiny, tmp_path):
    assert call("--split", "val")[0] == 0
    Path("lines.txt").write_text("a cat\n")
    assert script(main, *texts_flags("lines.txt"), "--name", "shapes")[0] == 0
    other = write_tiny_clip(tmp_path, "other")
    assert (
        call("--split", "val", "--overwrite", "--model", other[0], "--pretrained", other[1])[0] == 0
    )
    meta = EmbeddingCache("shapes", "val").meta
    assert load_texts("shapes", "ladder", 16, meta=meta) is not None  # was made anew
    with pytest.raises(
        UserError,
        match=r"lines\.pt: embedded with another CLIP than the cache: .*; embed it again, or remove it",
    ):
        load_texts("shapes", "lines", 16, meta=meta)


def test_texts_of_another_clip_than_the_caches_are_refused(call, tiny, tmp_path):
    assert call("--split", "val", "--name", "it")[0] == 0
    Path("a.txt").write_text("a photo\n")
    save_file(
        tiny[2].state_dict() | {"logit_scale": torch.tensor(1.0)}, tmp_path / "other.safetensors"
    )
    status, _, last = call(
        "--name", "it", "--texts", "a.txt", "--pretrained", tmp_path / "other.safetensors"
    )
    assert status == 2
    assert "made with another CLIP: pretrained was tiny-cache.safetensors" in last
