"""The embeddings on disk: written and read back, in one file or in many; refused when broken, with the file named."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_script
import train as train_script
from datasets.checks import check_rows
from datasets.embedding import EmbeddingCache, clip_id
from datasets.write import write_split
from tests.conftest import Trap, make_cache
from utils.cli import UserError
from utils.files import save_tensors, sha256

IMAGES, CAPTIONS, DIM = 4, 6, 8
FOLDER = Path("embeddings/it/val")
MANY = Path("embeddings/many/train")


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
    """A cache of the split val under ./embeddings/it."""
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
    assert torch.equal(found.image.read(), expected["image"])
    assert torch.equal(found.text.read(), expected["text"])
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
    with pytest.raises(
        UserError, match=r"no cache with a meta\.json in embeddings/it to take the CLIP from"
    ):
        clip_id("it")
    assert torch.equal(found.text.read(), content()["text"])
    assert (found.captions, found.images, found.relevance, found.meta) == (None, None, None, {})


def test_files_are_as_the_papers_repository_reads_them(cache):
    """It calls torch.load and json.load and looks rows up by the caption's row as a string."""
    assert torch.equal(torch.load(cache / "text.pt", weights_only=True), content()["text"])
    assert json.loads((cache / "cap_id_to_img_id.json").read_text()) == {
        "0": 2,
        "1": 0,
        "2": 0,
        "3": 3,
        "4": 2,
        "5": 2,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_every_precision_are_read(cache, dtype):
    torch.save(content()["image"].to(dtype), cache / "image.pt")
    assert read().image.dtype == dtype


def test_an_older_file_of_torch_is_read(cache):
    torch.save(content()["image"], cache / "image.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read().image.read(), content()["image"])


def test_embeddings_that_were_saved_with_a_gradient_come_without(cache):
    torch.save(content()["image"].float().requires_grad_() * 2, cache / "image.pt")
    assert not read().image.read().requires_grad


def test_a_relevance_from_before_does_not_stay(cache):
    write_split(FOLDER, **content(relevance=None))
    assert read().relevance is None


def test_a_split_that_could_not_be_finished_has_no_meta(cache):
    with pytest.raises(ValueError):
        write_split(FOLDER, **content(relevance=[[float("nan")]]))
    assert not (cache / "meta.json").exists()
    assert not list(cache.glob(".*"))


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
    "huge, with a stride of 0": (
        lambda z: torch.zeros(1).expand(10**6, 10**6),
        "not stored in full",
    ),
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
    problem = "the file is empty" if junk == "nothing" else "not a file of tensors"
    bytes_of = {
        "nothing": b"",
        "random": random,
        "text": b"hello",
        "zip": b"PK\x03\x04" + random,
        "cut": whole[: len(whole) // 2],
    }
    (cache / file).write_bytes(bytes_of[junk])
    assert f"{FOLDER / file}: {problem}" in refusal()


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
            assert torch.isfinite(read().image.read()).all()
        except UserError as error:
            assert str(FOLDER) in str(error)


@pytest.mark.parametrize("file", ["image.pt", "text.pt"])
def test_a_bit_that_changed_on_disk_is_noticed(cache, file):
    content = bytearray((cache / file).read_bytes())
    position = bytes(content).index(torch.load(cache / file, weights_only=True).numpy().tobytes())
    content[position + 5] ^= 1
    (cache / file).write_bytes(content)
    assert f"{file}: not a file of tensors that can be read safely" in refusal()
    assert "checksum" in refusal()


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
    [
        {"3": 4},
        {"3": -1},
        {"3": True},
        {"3": False},
        {"3": 1.0},
        {"3": "1"},
        {"3": None},
        {"3": [1]},
    ],
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


def test_a_map_is_read_alike_in_every_form_that_json_has(cache):
    forms = [
        json.dumps(MAP),
        json.dumps(MAP) + "\n",
        json.dumps(MAP, indent=1),
        json.dumps(MAP, separators=",:"),
    ]
    forms += [
        json.dumps(dict(reversed(MAP.items()))),
        '{"3": 0, ' + json.dumps(MAP)[1:],
    ]  # the last "3" counts
    for form in forms:
        put("cap_id_to_img_id.json", form)
        assert read().image_of_caption.tolist() == content()["image_of_caption"], form
    for form in (
        json.dumps(MAP).replace('"3"', '"03"'),
        json.dumps(MAP).replace("3,", "3 "),
        json.dumps(MAP) + "}",
    ):
        put("cap_id_to_img_id.json", form)
        assert "cap_id_to_img_id.json: " in refusal(), form


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_row_that_is_not_finite_is_named(dtype, value):
    rng = np.random.default_rng(0)
    largest = torch.finfo(dtype).max
    z = torch.from_numpy(rng.normal(size=(70, 33))).to(dtype)
    z[3, 5], z[4, 5], z[5, 5] = largest, -largest, largest  # whose sum is not finite
    check_rows(z, "image.pt")
    for row in (0, 41, 69):
        z[row, rng.integers(33)] = value
        z[69, 1] = value
        with pytest.raises(UserError, match=rf"image\.pt: row {row} is not finite"):
            check_rows(z, "image.pt")
        z[[row, 69]] = 1.0
    check_rows(z[:0], "image.pt")
    z[50] = 0.0
    z[50, 3] = -0.0
    with pytest.raises(UserError, match=r"image\.pt: row 50 is all zeros"):
        check_rows(z, "image.pt")


@pytest.mark.parametrize("file", ["captions.json", "images.json", "relevance.json"])
def test_lists_of_other_lengths_or_kinds_are_refused(cache, file):
    right = json.loads((cache / file).read_text())
    for wrong in (
        right[1:],
        [*right, right[0]],
        [*right[1:], 3],
        [*right[1:], None],
        {},
        "",
        "[1",
        "null",
    ):
        put(file, wrong)
        assert f"{FOLDER / file}: " in refusal()
    put(file, right)
    read()


@pytest.mark.parametrize("rows", [[], [4], [-1], [True], [1.0], ["1"], [[1]], [None]])
def test_relevance_of_anything_but_image_rows_is_refused(cache, rows):
    put("relevance.json", [*content()["relevance"][1:], rows])
    assert f"{FOLDER}/relevance.json: entry 5" in refusal()


def test_relevance_without_captions_is_refused(cache):
    (cache / "captions.json").unlink()
    assert "captions.json: no such file" in refusal()


@pytest.mark.parametrize("value", ["", "[]", "3", "{"])
def test_a_broken_meta_is_refused(cache, value):
    put("meta.json", value)
    assert f"{FOLDER}/meta.json: " in refusal()


@pytest.mark.parametrize("value", [[], [6], [-1], ["0"], [True], 0, {"0": 1}])
def test_a_meta_with_broken_rows_of_annotated_captions_is_refused(cache, value):
    put("meta.json", {"annotated": value})
    assert f"{FOLDER}/meta.json: 'annotated' is not a list of caption rows from 0 to 5" in refusal()


@pytest.mark.parametrize("value", ["1", -1, 0, [1], float("inf")])
def test_a_logit_scale_that_is_none_is_refused(cache, value):
    put("meta.json", {"logit_scale": value})
    assert "logit_scale" in refusal()


# Missing caches.


def test_a_missing_cache_names_the_command_and_the_data_set_that_needs_no_download(workdir):
    with pytest.raises(UserError) as caught:
        EmbeddingCache("coco", "train")
    assert "python cache_embeddings.py --dataset coco" in str(caught.value)
    assert "python cache_embeddings.py --dataset shapes" in str(caught.value)
    with pytest.raises(UserError) as caught:
        EmbeddingCache("shapes", "train")
    assert (
        str(caught.value).count("--dataset shapes") == 2
    )  # what was asked for and the command, without a hint
    assert "--dataset DATA_SET --name shapes if the data set has another name" in str(caught.value)


def test_a_missing_cache_lists_those_that_are_there(cache):
    with pytest.raises(UserError, match=r"found caches: it\)"):
        EmbeddingCache("coco", "train")


def test_a_missing_split_names_the_command_that_makes_it(cache):
    command = r"run python cache_embeddings.py --dataset it --split train, or --dataset DATA_SET --name it if"
    with pytest.raises(
        UserError, match=rf"no train split in embeddings/it \(found val\); {command}"
    ):
        EmbeddingCache("it", "train")


# In many files.


def rewrite(cache, folder, shard_rows=None):
    """Write a split of float16 anew, in one file or in many."""
    lists = (cache.image_of_caption.tolist(), cache.captions, cache.images, None)
    meta = cache.meta | {"embed_dim": cache.embed_dim, "dtype": "float16"}
    write_split(folder, cache.image.read(), cache.text.read(), *lists, meta, shard_rows)


@pytest.fixture
def both(workdir):
    """The same split in one file, under ./embeddings/it, and in many, under ./embeddings/many."""
    make_cache("it", dim=16)
    one = EmbeddingCache("it", "train")
    rewrite(one, MANY, shard_rows=32)
    return one


def test_a_cache_in_many_files_reads_as_one(both):
    assert sorted(path.name for path in MANY.glob("text-*.pt")) == [
        f"text-{n:05d}.pt" for n in range(4)
    ]
    loaded, mapped = EmbeddingCache("many", "train"), EmbeddingCache("many", "train", mapped=True)
    assert (loaded.mapped, mapped.mapped) == (False, True)
    assert torch.equal(loaded.image.read(), both.image.read())
    assert torch.equal(loaded.text.read(), both.text.read())
    assert (loaded.captions, loaded.images) == (both.captions, both.images)
    assert (mapped.captions, mapped.images) == (None, None)
    rows = torch.tensor([119, 0, 31, 32, 33, 0, 64])
    for cache in (loaded, mapped):
        assert torch.equal(cache.image_of_caption, both.image_of_caption)
        assert (len(cache.text), cache.embed_dim, cache.text.dtype) == (120, 16, torch.float16)
        for found, expected in zip(cache.pairs(rows), both.pairs(rows), strict=True):
            assert torch.equal(found, expected)
        assert sorted(torch.cat(list(cache.batches(50, torch.Generator()))).tolist()) == list(
            range(120)
        )
    assert loaded.digest == mapped.digest


def test_the_digest_by_which_a_run_knows_its_cache_stays_as_it_was(workdir):
    """It stands in the state of a run that is to be resumed."""
    make_cache("it", dim=16)
    assert EmbeddingCache("it", "train").digest == "fbf404141ef34a55"


def test_one_file_or_many_replaces_the_other(both):
    one = "image.pt text.pt cap_id_to_img_id.json captions.json images.json meta.json"
    many = "image-00000.pt text-00000.pt captions-00000.json images-00000.json image_of_caption.pt meta.json"
    for shard_rows, expected in ((None, one), (1000, many)):
        rewrite(both, MANY, shard_rows)
        assert {path.name for path in MANY.iterdir()} == set(expected.split())


def test_evaluation_reads_a_cache_in_many_files(script, workdir):
    make_cache("it", dim=16)
    for name, shard_rows in (("one", None), ("many", 32)):
        for split in ("train", "val"):
            rewrite(EmbeddingCache("it", split), Path("embeddings") / name / split, shard_rows)
        training = "--recipe small --epochs 2 --precision fp32 --batch-size 120".split()
        assert script(train_script.main, "--dataset", name, *training)[0] == 0
        evaluation = "--resamples 0 --no-plots --uncer_levels 4".split()
        assert script(eval_script.main, "--dataset", name, *evaluation)[0] == 0
    one, many = (
        json.loads(Path(f"results/{name}/0/asymvlm-psd.json").read_text())
        for name in ("one", "many")
    )
    assert one["t2i"] == pytest.approx(
        many["t2i"], abs=0.1
    )  # a batch of all captions: only their order is another


def corrupt(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace(value, with_sum=True):
    """Another tensor in a file, and, unless the index is to be left as it is, its sum in the index."""

    def change(file):
        save_tensors(value, file)
        meta = json.loads((MANY / "meta.json").read_text())
        kind, _, number = file.stem.partition("-")
        if with_sum and number:
            meta["shards"][kind][int(number)][1] = sha256(file)
        elif with_sum:
            meta["shards"]["image_of_caption"] = sha256(file)
        (MANY / "meta.json").write_text(json.dumps(meta))

    return change


def swap(file):
    """Two files of the same shape in each other's place."""
    other = file.with_name("text-00000.pt")
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def put_meta(key, value):
    def change(file):
        meta = json.loads(file.read_text())
        (meta["shards"] if key in ("image", "text", "image_of_caption") else meta)[key] = value
        file.write_text(json.dumps(meta))

    return change


OTHER_FILE = "not the file that meta.json names: its SHA-256 differs"
NO_INDEX = "'shards' is not the index"
NO_MAP = "image_of_caption.pt: expected 120 image rows"
BROKEN_FILES = [
    ("image-00001.pt", Path.unlink, "image-00001.pt: no such file"),
    ("text-00002.pt", corrupt, f"text-00002.pt: {OTHER_FILE}"),
    ("text-00001.pt", swap, f"pt: {OTHER_FILE}"),
    (
        "image_of_caption.pt",
        replace(torch.zeros(120).long(), with_sum=False),
        f"image_of_caption.pt: {OTHER_FILE}",
    ),
    (
        "text-00002.pt",
        replace(torch.ones(31, 16).half()),
        "text-00002.pt: not the tensor of shape (32, 16)",
    ),
    (
        "text-00002.pt",
        replace(torch.ones(32, 16)),
        "text-00002.pt: not the tensor of shape (32, 16), torch.float16",
    ),
    ("text-00000.pt", replace(torch.full((32, 16), float("nan")).half()), "text-00000.pt: row"),
    ("image_of_caption.pt", Path.unlink, "image_of_caption.pt: no such file"),
    ("image_of_caption.pt", replace(torch.full((120,), 40)), f"{NO_MAP} from 0 to 39"),
    ("image_of_caption.pt", replace(torch.zeros(120)), NO_MAP),
    ("meta.json", put_meta("text", [[0, "x"]]), NO_INDEX),
    ("meta.json", put_meta("text", [[-5, "x"], [125, "x"]]), NO_INDEX),
    ("meta.json", put_meta("image", 3), NO_INDEX),
    ("meta.json", put_meta("image_of_caption", None), NO_INDEX),
    ("meta.json", put_meta("embed_dim", "16"), "does not give embed_dim and dtype"),
    ("meta.json", put_meta("dtype", "Tensor"), "does not give embed_dim and dtype"),
    ("meta.json", put_meta("shards", []), NO_INDEX),
]


@pytest.mark.parametrize(("file", "change", "expected"), BROKEN_FILES)
def test_a_file_that_cannot_be_right_is_one_line(both, script, file, change, expected):
    change(MANY / file)
    training = "--dataset many --recipe small --epochs 1 --precision fp32".split()
    status, _, line = script(train_script.main, *training)
    assert status == 2
    assert expected in line
    assert not list(Path("checkpoints").rglob("*.pt"))


def test_a_row_that_is_not_finite_is_refused_by_evaluation_too(both, script):
    replace(torch.ones(32, 16).half().index_fill(0, torch.tensor([7]), float("nan")))(
        MANY / "text-00001.pt"
    )
    status, _, line = script(eval_script.main, "--dataset", "many", "--split", "train")
    assert status == 2
    assert "text-00001.pt: row 7 is not finite" in line


def test_a_captions_file_that_is_missing_is_named(both):
    (MANY / "captions-00001.json").write_text("[]")
    with pytest.raises(UserError, match=r"captions-00001\.json: expected a list of 32 entries"):
        EmbeddingCache("many", "train")
