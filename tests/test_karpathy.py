"""KarpathyCaptions on small files made here and on COCO pictures, through cache_embeddings.py."""

import json
import shutil

import numpy as np
import pytest

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets import karpathy
from datasets.embedding import EmbeddingCache
from datasets.karpathy import KarpathyCaptions
from datasets.registry import DATASETS
from datasets.texts import load_texts
from tests.conftest import (
    ENTRIES,
    SHAPES_CLIP,
    check_rows,
    coco_sample,
    karpathy_document,
    write_flickr30k,
    write_karpathy_coco,
)
from utils.cli import UserError

pytestmark = pytest.mark.usefixtures("without_eccv_caption")


def load(root, split="test", layout=karpathy.COCO):
    return KarpathyCaptions(root, split, layout)


def refusal(root, split="test", layout=karpathy.COCO):
    """The message with which a data set is refused; it is one line."""
    with pytest.raises(UserError) as caught:
        load(root, split, layout).check_broken(0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Order.


def test_images_come_in_order_of_imgid_and_captions_in_order_of_sentid(tmp_path):
    data = load(write_karpathy_coco(tmp_path))
    assert data.image_ids == [
        70,
        60,
        40,
    ]  # cocoids in order of imgid 1, 2, 4; 60 has no caption and stays
    assert data.image_names == ["val2014/70.png", "val2014/60.png", "val2014/40.png"]
    assert data.image_files == [tmp_path / name for name in data.image_names]
    assert data.caption_ids == [2, 9, 11]
    assert data.captions == ["a picture", "a red square", "a blue circle\n"]
    assert data.image_of_caption == [2, 2, 0]
    assert data.relevance is None


def test_restval_belongs_to_cocos_train(tmp_path):
    data = load(write_karpathy_coco(tmp_path), "train")
    assert data.image_ids == [30, 10]
    assert data.image_files == [tmp_path / "val2014" / "30.png", tmp_path / "train2014" / "10.png"]
    assert list(zip(data.caption_ids, data.image_of_caption, strict=True)) == [
        (1, 1),
        (8, 1),
        (12, 0),
    ]


def test_flickr30k_has_imgids_and_no_restval(tmp_path):
    data = load(write_flickr30k(tmp_path), "train", karpathy.FLICKR30K)
    assert (data.image_ids, data.caption_ids) == ([3], [1, 8])
    assert data.image_names == ["10.png"]
    assert data.image_files == [tmp_path / "flickr30k-images" / "10.png"]


def test_flickr30ks_pictures_may_lie_in_images(tmp_path):
    data = load(write_flickr30k(tmp_path, "images"), "val", karpathy.FLICKR30K)
    assert data.image_files == [tmp_path / "images" / "20.png"]


def test_the_order_in_the_file_does_not_matter(tmp_path):
    straight, content = load(write_karpathy_coco(tmp_path)), karpathy_document()
    content["images"].reverse()
    for image in content["images"]:
        image["sentences"].reverse()
    turned = load(write_karpathy_coco(tmp_path, content))
    assert vars(turned) == vars(straight)


# What can go wrong.


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (karpathy.COCO, "dataset_coco.json and train2014/ or val2014/"),
        (karpathy.FLICKR30K, "dataset_flickr30k.json and flickr30k-images/ or images/"),
    ],
    ids=["coco", "flickr"],
)
def test_a_wrong_root_says_what_was_expected_and_what_was_found(tmp_path, layout, expected):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.txt").touch()
    assert f"expected {expected}, found only a.txt, elsewhere/" in refusal(tmp_path, layout=layout)
    assert "found no such folder" in refusal(tmp_path / "absent", layout=layout)


def test_a_missing_folder_of_pictures_is_named(tmp_path):
    shutil.rmtree(write_karpathy_coco(tmp_path) / "train2014")
    expected = "expected train2014/ with the images of dataset_coco.json, found only dataset_coco.json, val2014/"
    assert expected in refusal(tmp_path, "train")
    assert load(tmp_path, "test").image_ids == [70, 60, 40]  # which has no picture there
    shutil.rmtree(write_flickr30k(tmp_path / "flickr") / "flickr30k-images")
    assert "expected flickr30k-images/ or images/ with" in refusal(
        tmp_path / "flickr", layout=karpathy.FLICKR30K
    )


def test_an_unknown_split_lists_those_that_are_there(tmp_path):
    assert "no image of the split dev (found: restval, test, train, val)" in refusal(
        write_karpathy_coco(tmp_path), "dev"
    )


def test_a_split_without_captions_is_refused(tmp_path):
    content = karpathy_document()
    content["images"][4]["sentences"] = []
    assert "the images of the split val have no captions" in refusal(
        write_karpathy_coco(tmp_path, content), "val"
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{}", '{"images": []}', '{"images": {"imgid": 1}}', "[" * 100_000],
)
def test_what_is_not_of_the_format_is_refused(tmp_path, text):
    assert "dataset_coco.json: not " in refusal(write_karpathy_coco(tmp_path, text or " "))


def set_image(row, field, value):
    return lambda images: (
        images[row].update({field: value}) if value is not ... else images[row].pop(field)
    )


def set_sentence(row, k, field, value):
    return lambda images: (
        images[row]["sentences"][k].update({field: value})
        if value is not ...
        else images[row]["sentences"][k].pop(field)
    )


BROKEN = {
    "an imgid comes twice": (set_image(1, "imgid", 4), ["images[1]", "imgid 4 comes twice"]),
    "a cocoid comes twice": (set_image(1, "cocoid", 40), ["images[1]", "cocoid 40 comes twice"]),
    "a sentid comes twice": (
        set_sentence(1, 0, "sentid", 9),
        ["images[1].sentences[0]", "sentid 9 comes twice"],
    ),
    "a word for an imgid": (
        set_image(0, "imgid", "four"),
        ["images[0]", "'imgid'", '"four"', "whole number"],
    ),
    "a fraction for a cocoid": (
        set_image(0, "cocoid", 40.5),
        ["images[0] (imgid 4)", "'cocoid'", "40.5"],
    ),
    "true for a sentid": (
        set_sentence(0, 1, "sentid", True),
        ["images[0].sentences[1]", "'sentid'", "true"],
    ),
    "no cocoid": (set_image(0, "cocoid", ...), ["images[0] (imgid 4)", "'cocoid'", "null"]),
    "no split": (set_image(2, "split", ...), ["images[2] (imgid 3)", "'split'"]),
    "no file name": (set_image(2, "filename", ...), ["images[2] (imgid 3)", "'filename'"]),
    "no folder": (set_image(2, "filepath", ...), ["images[2] (imgid 3)", "'filepath'"]),
    "an unknown folder": (
        set_image(2, "filepath", ".."),
        ["images[2] (imgid 3)", "'filepath' is '..'", "train2014 or val2014"],
    ),
    "a blank caption": (
        set_sentence(0, 1, "raw", " \n"),
        ["images[0], sentid 2", "is a blank sentence"],
    ),
    "null for a caption": (
        set_sentence(0, 1, "raw", None),
        ["images[0].sentences[1] (sentid 2)", "'raw'", "null"],
    ),
    "no caption": (set_sentence(0, 1, "raw", ...), ["images[0].sentences[1] (sentid 2)", "'raw'"]),
    "another image's caption": (
        set_sentence(0, 0, "imgid", 1),
        ["images[0].sentences[0] (sentid 9)", "imgid 1", "imgid 4"],
    ),
    "no captions": (set_image(0, "sentences", ...), ["images[0] (imgid 4)", "'sentences'"]),
    "an object for captions": (
        set_image(0, "sentences", {}),
        ["images[0] (imgid 4)", "'sentences'"],
    ),
    "a text for a caption's object": (
        lambda images: images[0]["sentences"].insert(1, "a star"),
        ["images[0].sentences[1]", "no", "object"],
    ),
    "null for an image": (lambda images: images.insert(1, None), ["images[1]", "not an object"]),
    "the folder above": (
        set_image(0, "filename", "../../secret.png"),
        ["images[0]", "'../../secret.png' leads out of"],
    ),
    "the other folder": (
        set_image(0, "filename", "../train2014/10.png"),
        ["images[0]", "'../train2014/10.png' leads out of"],
    ),
    "a null character": (set_image(0, "filename", "a\0.png"), ["images[0]", "a\\x00.png"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_entry_is_named(tmp_path, case):
    change, expected = BROKEN[case]
    content = karpathy_document()
    change(content["images"])
    message = refusal(write_karpathy_coco(tmp_path, content))
    for part in ["dataset_coco.json", *expected]:
        assert part in message


def test_a_link_that_leads_out_of_the_folder_is_followed(tmp_path):
    write_karpathy_coco(tmp_path)
    (tmp_path / "val2014" / "40.png").replace(tmp_path / "secret.png")
    (tmp_path / "val2014" / "40.png").symlink_to(tmp_path / "secret.png")
    assert load(tmp_path).image_files[0].is_file()


def test_blank_sentences_are_left_out_and_ids_may_be_texts(tmp_path):
    content = karpathy_document()
    for image in content["images"]:
        image["imgid"] = str(image["imgid"])
        image["cocoid"] = float(image["cocoid"])
        for sentence in image["sentences"]:
            sentence["sentid"] = str(sentence["sentid"])
    expected = load(write_karpathy_coco(tmp_path / "a"))
    assert load(write_karpathy_coco(tmp_path / "b", content)).fingerprint() == (
        expected.fingerprint()
    )
    content["images"][0]["sentences"][1]["raw"] = " "
    split = load(write_karpathy_coco(tmp_path / "c", content))
    split.check_broken(1)
    assert len(split.captions) == len(expected.captions) - 1


def test_flickr8k_is_read(tmp_path):
    write_flickr30k(tmp_path, "Flicker8k_Dataset")
    (tmp_path / "dataset_flickr30k.json").rename(tmp_path / "dataset_flickr8k.json")
    assert len(load(tmp_path, "test", karpathy.FLICKR8K).captions) == 3


def test_a_linked_folder_is_followed(tmp_path):
    write_karpathy_coco(tmp_path / "a")
    (tmp_path / "a" / "val2014").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "val2014").symlink_to(tmp_path / "elsewhere")
    assert load(tmp_path / "a").image_files[0].is_file()


# Through the scripts.


@pytest.mark.parametrize("dataset", ["coco-karpathy", "flickr30k"])
def test_small_files_go_through_all_scripts(script, workdir, dataset):
    root = (write_karpathy_coco if dataset == "coco-karpathy" else write_flickr30k)(
        workdir / "data" / dataset
    )
    assert (
        script(
            cache_embeddings.main,
            "--dataset",
            dataset,
            "--split",
            "train",
            "val",
            "test",
            *SHAPES_CLIP,
        )[0]
        == 0
    )
    both = ("train", "restval") if dataset == "coco-karpathy" else ("train",)
    for split, parts in (("train", both), ("val", ("val",)), ("test", ("test",))):
        cache = EmbeddingCache(dataset, split)
        plain = sorted(
            (
                sentid,
                raw,
                root
                / (folder if dataset == "coco-karpathy" else "flickr30k-images")
                / f"{cocoid}.png",
            )
            for _, cocoid, folder, part, sentences in ENTRIES
            if part in parts
            for sentid, raw in sentences
        )
        assert cache.meta["caption_ids"] == [sentid for sentid, _, _ in plain]
        check_rows(cache, [(raw, file) for _, raw, file in plain])
    assert load_texts(dataset, "ladder", cache.embed_dim)[0] == list(DATASETS["coco"].ladder)
    assert script(train_script.main, "--dataset", dataset, "--epochs", 1)[0] == 0
    evaluation = "--split test --uncer_levels 1 --no-plots --resamples 5".split()
    assert script(eval_script.main, "--dataset", dataset, *evaluation)[0] == 0


def test_a_missing_test_split_names_the_command_that_makes_it(script, workdir):
    write_karpathy_coco(workdir / "data" / "coco-karpathy")
    assert script(cache_embeddings.main, "--dataset", "coco-karpathy", *SHAPES_CLIP)[0] == 0
    assert not (workdir / "embeddings" / "coco-karpathy" / "test").exists()
    status, _, last = script(eval_script.main, "--dataset", "coco-karpathy", "--split", "test")
    assert status == 2
    assert "run python cache_embeddings.py --dataset coco-karpathy --split test" in last


def test_bad_files_end_in_one_line_and_nothing_is_written(script, workdir):
    status, _, last = script(cache_embeddings.main, "--dataset", "flickr30k", *SHAPES_CLIP)
    assert status == 2
    assert "--data-root data/flickr30k: expected dataset_flickr30k.json and" in last
    assert list(workdir.iterdir()) == []


def test_each_coco_caption_has_the_embedding_of_its_own_picture(coco_root, script, workdir):
    sample = coco_sample(coco_root)
    imgids = np.random.default_rng(0).permutation(len(sample)).tolist()
    images = []
    for row, (image_id, file, captions) in enumerate(sample):
        folder = ("train2014", "val2014")[row % 2]
        (workdir / "mine" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, workdir / "mine" / folder / file.name)
        sentences = [
            {"raw": text, "sentid": sentid, "imgid": imgids[row]} for sentid, text in captions[::-1]
        ]
        entry = {
            "filename": file.name,
            "filepath": folder,
            "cocoid": image_id,
            "imgid": imgids[row],
        }
        entry |= {"sentences": sentences}
        images.append(entry | {"split": ("train", "restval", "val", "test")[row % 4]})
    (workdir / "mine" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    call = (
        *"--dataset coco-karpathy --data-root mine --split train val test --name mine".split(),
        *SHAPES_CLIP,
    )
    assert script(cache_embeddings.main, *call)[0] == 0
    for split, rows in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        cache = EmbeddingCache("mine", split)
        members = [part for row, part in enumerate(sample) if row % 4 in rows]
        assert len(cache.image) == len(members) == 5 * len(rows)
        captions = sorted(
            (sentid, text, file) for _, file, texts in members for sentid, text in texts
        )
        check_rows(cache, [(text, file) for _, text, file in captions])
