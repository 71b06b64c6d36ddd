"""--dataset arrays: embeddings from elsewhere equal the same ones cached by hand; what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.numpy import save_file

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from tests.conftest import REPOSITORY, load_result, make_cache

IMPORT = ("--dataset", "arrays", "--data-root", "arrays", "--name", "mine", "--dtype", "float32")
TRAIN = ("--recipe", "small", "--epochs", 2, "--batch-size", 50, "--device", "cpu")


@pytest.fixture
def made(workdir):
    """A cache "hand", and its content in arrays: {split: {name: array}}."""
    make_cache("hand")
    content = {}
    for split in ("train", "val"):
        cache = EmbeddingCache("hand", split)
        content[split] = {
            "image": cache.image.read().float().numpy(),
            "text": cache.text.read().float().numpy(),
            "image_of_caption": cache.image_of_caption.numpy(),
        }
        folder = Path("arrays") / split
        folder.mkdir(parents=True)
        for name, array in content[split].items():
            np.save(folder / f"{name}.npy", array)
        (folder / "captions.txt").write_text("\n".join(cache.captions) + "\n")
        (folder / "images.txt").write_text("\n".join(cache.images))
    return content


def test_arrays_give_the_results_of_the_same_cache_by_hand(made, script):
    assert script(cache_embeddings.main, *IMPORT, "--logit-scale", 50)[0] == 0
    found, expected = EmbeddingCache("mine", "val"), EmbeddingCache("hand", "val")
    assert torch.equal(found.image.read(), expected.image.read().float())
    assert torch.equal(found.image_of_caption, expected.image_of_caption)
    assert (found.captions, found.images) == (expected.captions, expected.images)
    assert (found.meta["model"], found.meta["logit_scale"]) == ("arrays", 50.0)
    metrics = []
    for name in ("hand", "mine"):
        assert script(train_script.main, "--dataset", name, *TRAIN)[0] == 0
        flags = ("--dataset", name, "--no-plots", "--resamples", 20, "--device", "cpu")
        assert script(eval_script.main, *flags)[0] == 0
        metrics.append(load_result(name, 0, "asymvlm-psd")[0]["metrics"])
    assert metrics[0]["t2i"].keys() == metrics[1]["t2i"].keys()
    assert metrics[1]["i2t"]["R@1"] == pytest.approx(metrics[0]["i2t"]["R@1"], abs=0.1)
    assert script(cache_embeddings.main, *IMPORT)[0] == 0
    assert "cached already" in script.stderr


def test_another_logit_scale_is_another_cache_and_flags_that_do_not_fit_are_refused(made, script):
    assert script(cache_embeddings.main, *IMPORT, "--logit-scale", 50)[0] == 0
    assert script(cache_embeddings.main, *IMPORT)[0] == 0  # cached already
    status, _, line = script(cache_embeddings.main, *IMPORT, "--logit-scale", 20)
    assert status == 2
    assert "logit_scale was 50.0, now 20.0" in line
    for flags, words in ((("--logit-scale", 0), "above 0"), (("--shard-rows", 5), "leave it out")):
        status, _, line = script(cache_embeddings.main, *IMPORT, *flags)
        assert status == 2
        assert words in line


def test_a_broken_meta_of_the_split_that_is_rebuilt_is_no_obstacle(made, script):
    assert script(cache_embeddings.main, *IMPORT)[0] == 0
    Path("embeddings/mine/val/meta.json").write_text("{")
    assert script(cache_embeddings.main, *IMPORT)[0] == 2
    assert script(cache_embeddings.main, *IMPORT, "--overwrite")[0] == 0
    assert len(EmbeddingCache("mine", "val").image) == 40


def test_a_permuted_encoder_with_a_known_answer_is_retrieved(workdir, script):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = Path("arrays") / split
        folder.mkdir(parents=True)
        image = rng.normal(size=(30, 16)).astype("float32")
        rows = rng.permutation(np.repeat(np.arange(30), 3))
        np.save(folder / "image.npy", image)
        np.save(folder / "text.npy", 3 * image[rows])
        np.save(folder / "image_of_caption.npy", rows.astype("int32"))
    assert script(cache_embeddings.main, *IMPORT)[0] == 0
    assert script(train_script.main, "--dataset", "mine", *TRAIN)[0] == 0
    flags = ("--dataset", "mine", "--no-plots", "--resamples", 0, "--score", "frozen")
    assert script(eval_script.main, *flags)[0] == 0
    metrics = load_result("mine", 0, "asymvlm-psd.frozen")[0]["metrics"]
    assert metrics["t2i"]["R@1"] == metrics["i2t"]["R@1"] == 1.0


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_files_hold_the_same(made, script, suffix):
    assert script(cache_embeddings.main, *IMPORT)[0] == 0
    for split, arrays in made.items():
        for name, array in arrays.items():
            Path(f"arrays/{split}/{name}.npy").unlink()
            file = f"arrays/{split}/{name}{suffix}"
            if suffix == ".pt":
                torch.save(torch.from_numpy(array), file)
            else:
                save_file({name: array}, file)
    assert script(cache_embeddings.main, *IMPORT[:-3], "again", *IMPORT[-2:])[0] == 0
    assert EmbeddingCache("again", "val").digest == EmbeddingCache("mine", "val").digest


def test_shards_of_clip_retrieval_equal_one_array(workdir, script):
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(25, 8)).astype("float16") for _ in range(2))
    captions = [f"caption {n}" for n in range(25)]
    one, many = Path("arrays/train"), Path("many/train")
    one.mkdir(parents=True)
    np.save(one / "image.npy", image)
    np.save(one / "text.npy", text)
    (one / "captions.txt").write_text("\n".join(captions))
    for folder in ("img_emb", "text_emb", "metadata"):
        (many / folder).mkdir(parents=True)
    for number, rows in enumerate((slice(0, 10), slice(10, 12), slice(12, 25))):
        np.save(many / f"img_emb/img_emb_{number}.npy", image[rows])
        np.save(many / f"text_emb/text_emb_{number}.npy", text[rows])
        table = {"caption": captions[rows], "image_path": [f"{c}.jpg" for c in captions[rows]]}
        parquet.write_table(pyarrow.table(table), many / f"metadata/metadata_{number}.parquet")
    for number in range(3, 11):  # 10 comes after 9, not after 1
        np.save(many / f"img_emb/img_emb_{number}.npy", image[:1] + number)
        np.save(many / f"text_emb/text_emb_{number}.npy", text[:1] + number)
    flags = ("--dataset", "arrays", "--split", "train", "--dtype", "float16")
    assert script(cache_embeddings.main, *flags, "--data-root", "arrays", "--name", "one")[0] == 0
    assert script(cache_embeddings.main, *flags, "--data-root", "many", "--name", "many")[0] == 0
    single, shards = EmbeddingCache("one", "train"), EmbeddingCache("many", "train")
    assert torch.equal(shards.image.read()[:25], single.image.read())
    assert torch.equal(shards.text.read()[:25], single.text.read())
    assert shards.captions[:25] == single.captions
    assert shards.images[0] == "caption 0.jpg"
    assert shards.image_of_caption.tolist() == list(range(33))
    assert (
        shards.image.read()[25:, 0].tolist()
        == (image[0, 0] + np.arange(3, 11, dtype="float16")).tolist()
    )


def put(name, array):
    def change():
        np.save(f"arrays/val/{name}.npy", array)

    return change


REFUSED = {
    "no image": (lambda: Path("arrays/val/image.npy").unlink(), "expected image.npy and text.npy"),
    "a row of zeros": (
        put("text", np.eye(120, 64)),
        "row 64 is all zeros, which has no direction; leave it out",
    ),
    "not finite": (put("text", np.full((120, 64), np.nan)), "row 0 is not finite"),
    "another width": (put("text", np.ones((120, 7))), "7 wide, the others are 64 wide"),
    "one dimension": (put("text", np.ones(120)), "2 dimensions, found shape (120,)"),
    "texts": (put("text", np.full((120, 64), "a")), "expected numbers"),
    "objects": (put("text", np.array([[{}]], dtype=object)), "not an array of numbers"),
    "other bytes first": (put("text", np.ones((24, 16), ">f4")), "save it again as float32"),
    "float128": (put("text", np.ones((24, 16), np.longdouble)), "save it again as float32"),
    "yes and no": (put("text", np.ones((24, 16), bool)), "expected numbers, found bool"),
    "a map that points outside": (
        put("image_of_caption", np.full(120, 40)),
        "expected 120 image rows from 0 to 39",
    ),
    "a map of floats": (put("image_of_caption", np.zeros(120)), "whole numbers"),
    "no map": (
        lambda: Path("arrays/val/image_of_caption.npy").unlink(),
        "has 120 rows, arrays/val/image.npy 40; give image.npy, text.npy and image_of_caption.npy",
    ),
    "fewer captions": (
        lambda: Path("arrays/val/captions.txt").write_text("one\n"),
        "expected 120 texts, one for each row, found 1 of them",
    ),
    "two forms": (
        lambda: torch.save(torch.ones(40, 64), "arrays/val/image.pt"),
        "found image.npy and image.pt; keep one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_one_line(made, script, case):
    change, words = REFUSED[case]
    change()
    status, _, line = script(cache_embeddings.main, *IMPORT)
    assert status == 2
    assert words in line
    assert not Path("embeddings/mine/val/meta.json").exists()


@pytest.mark.parametrize("case", ["a row of zeros", "another width", "a map that points outside"])
def test_a_new_file_that_is_wrong_leaves_the_old_cache_whole(made, script, case):
    assert script(cache_embeddings.main, *IMPORT)[0] == 0
    before = EmbeddingCache("mine", "val")
    files = sorted(Path("embeddings/mine/val").iterdir())
    change, words = REFUSED[case]
    change()
    status, _, line = script(cache_embeddings.main, *IMPORT, "--split", "val", "--overwrite")
    assert (status, words in line) == (2, True)
    after = EmbeddingCache("mine", "val")
    assert (after.digest, after.captions) == (before.digest, before.captions)
    assert torch.equal(after.text.read(), before.text.read())
    assert sorted(Path("embeddings/mine/val").iterdir()) == files


def test_files_of_other_numbers_are_refused(workdir, script):
    for folder, count in (("img_emb", 2), ("text_emb", 1)):
        path = Path("arrays/train", folder)
        path.mkdir(parents=True)
        for number in range(count):
            np.save(path / f"{folder}_{number}.npy", np.ones((3, 4)))
    status, _, line = script(cache_embeddings.main, *IMPORT, "--split", "train")
    assert status == 2
    assert "differ (2 and 1 files)" in line


def test_texts_are_added_as_arrays_and_words_cannot_be(made, script):
    assert script(cache_embeddings.main, *IMPORT)[0] == 0
    for flags in (
        (cache_embeddings.main, "--name", "mine", "--texts", "arrays/val/captions.txt"),
        (eval_script.main, "--dataset", "mine", "--prompts", "a cat"),
    ):
        if flags[0] is eval_script.main:
            assert script(train_script.main, "--dataset", "mine", *TRAIN)[0] == 0
        status, _, line = script(*flags)
        assert status == 2
        assert "made of arrays, without a CLIP" in line and "--texts FILE.npy" in line
    np.save("more.npy", made["val"]["text"][:3])
    Path("more.txt").write_text("one\ntwo\nthree\n")
    assert script(cache_embeddings.main, "--name", "mine", "--texts", "more.npy")[0] == 0
    flags = ("--dataset", "mine", "--export", "scores.csv", "--texts", "more")
    assert script(eval_script.main, *flags)[0] == 0
    assert len(Path("scores.csv").read_text().splitlines()) == 4
    Path("more.txt").write_text("one\n")
    status, _, line = script(cache_embeddings.main, "--name", "mine", "--texts", "more.npy")
    assert (status, "expected 3 lines" in line) == (2, True)


def test_texts_go_to_a_cache_of_their_width_under_a_free_name(made, script):
    assert script(cache_embeddings.main, *IMPORT)[0] == 0
    Path("more.txt").write_text("a\nb\n")
    np.save("more.npy", np.ones((2, 7)))
    Path("meta.txt").write_text("a\n")
    for name, file, words in (
        ("mine", "more.npy", "7 wide, those of the cache 64"),
        ("mime", "more.npy", "no cache in embeddings/mime"),
        ("mine", "meta.txt", "give the file another name"),
    ):
        status, _, line = script(cache_embeddings.main, "--name", name, "--texts", file)
        assert status == 2
        assert words in line
    assert not Path("embeddings/mime").exists()
    assert not Path("embeddings/mine/texts").exists()


def test_normalised_arrays_are_told(made, script):
    for split, arrays in made.items():
        for name in ("image", "text"):
            z = arrays[name]
            np.save(f"arrays/{split}/{name}.npy", z / np.linalg.norm(z, axis=1, keepdims=True))
    assert script(cache_embeddings.main, *IMPORT)[0] == 0
    assert "have norm 1" in script.stderr


def test_a_set_larger_than_memory_is_imported_a_part_at_a_time(workdir):
    folder = Path("arrays/train")
    folder.mkdir(parents=True)
    shape = (300_000, 512)  # 600 MB each in float32
    for name in ("image", "text"):
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
        for start in range(0, shape[0], 50_000):
            array[start : start + 50_000] = 1.0 + start / 10_000
        del array
    flags = "--dataset arrays --data-root arrays --name mine --split train --dtype float16".split()
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import cache_embeddings as c; "
    )
    code += (
        "from utils.cli import run_script; import torch; before = resource.getrusage(0).ru_maxrss; "
    )
    code += "status = run_script(c.main, sys.argv[1:]); "
    code += "print(status, (resource.getrusage(0).ru_maxrss - before) // 1024)"
    command = [sys.executable, "-c", code, str(REPOSITORY), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    status, megabytes = map(int, done.stdout.split())
    assert status == 0, done.stderr
    assert megabytes < 1_000
    assert EmbeddingCache("mine", "train", mapped=True).image.shape == shape
    shutil.rmtree("arrays")
