"""KarpathyCaptions on small files made here and on COCO pictures, through cache_embeddings.py; ECCV Caption's judgements on a stand-in package."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets import DATASETS, karpathy
from datasets.embedding import EmbeddingCache, load_texts
from datasets.karpathy import KarpathyCaptions
from tests.conftest import load_result
from utils.cli import UserError
from utils.metrics import ambiguity_metrics, only_annotated
from utils.preprocess import load_clip

SHAPES_CLIP = (
    "--model",
    "datasets/shapes/clip.json",
    "--pretrained",
    "datasets/shapes/clip.safetensors",
    "--workers",
    0,
)
SHAPES_CLIP += ("--device", "cpu", "--precision", "fp32")
# (imgid, cocoid, folder, split, [(sentid, raw)]): neither ids nor splits are in order, and the order of imgids is not that of cocoids.
ENTRIES = [
    (4, 40, "val2014", "test", [(9, "a red square"), (2, "a picture")]),
    (1, 70, "val2014", "test", [(11, "a blue circle\n")]),
    (3, 10, "train2014", "train", [(8, "a star"), (1, "a big star")]),
    (0, 30, "val2014", "restval", [(12, "a small circle")]),
    (5, 20, "val2014", "val", [(3, "a square 🐈")]),
    (2, 60, "val2014", "test", []),
]


def document():
    return {
        "dataset": "made here",
        "images": [
            {
                "filename": f"{cocoid}.png",
                "filepath": folder,
                "split": split,
                "imgid": imgid,
                "cocoid": cocoid,
                "sentids": [sentid for sentid, _ in sentences],
                "sentences": [
                    {"raw": raw, "tokens": raw.split(), "sentid": sentid, "imgid": imgid} for sentid, raw in sentences
                ],
            }
            for imgid, cocoid, folder, split, sentences in ENTRIES
        ],
    }


def draw(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(shade).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)).resize(
        (64, 64), 0
    ).save(path)


def write_coco(root, content=None):
    """The files of coco-karpathy under root. content: a document or the text of its file."""
    for _, cocoid, folder, _, _ in ENTRIES:
        draw(root / folder / f"{cocoid}.png", cocoid)
    text = content if isinstance(content, str) else json.dumps(content or document())
    (root / "dataset_coco.json").write_text(text, encoding="utf-8")
    return root


def write_flickr(root, folder="flickr30k-images", content=None):
    """The files of flickr30k under root: those of COCO without cocoid and filepath."""
    content = content or document()
    for image in content["images"]:
        draw(root / folder / image["filename"], image.pop("cocoid"))
        del image["filepath"]
    (root / "dataset_flickr30k.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def load(root, split="test", layout=karpathy.COCO):
    return KarpathyCaptions(root, split, layout)


def refusal(root, split="test", layout=karpathy.COCO):
    """The message with which a data set is refused; it is one line."""
    with pytest.raises(UserError) as caught:
        load(root, split, layout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def without_eccv_caption(monkeypatch):
    """Whether the package is installed must not matter here."""
    monkeypatch.setitem(sys.modules, "eccv_caption", None)


# Order.


def test_images_come_in_order_of_imgid_and_captions_in_order_of_sentid(tmp_path):
    data = load(write_coco(tmp_path))
    assert data.image_ids == [
        70,
        60,
        40,
    ]  # cocoids in order of imgid 1, 2, 4; 60 has no caption and stays in the gallery
    assert data.image_names == ["val2014/70.png", "val2014/60.png", "val2014/40.png"]
    assert data.image_files == [tmp_path / name for name in data.image_names]
    assert data.caption_ids == [2, 9, 11]
    assert data.captions == ["a picture", "a red square", "a blue circle\n"]
    assert data.image_of_caption == [2, 2, 0]
    assert (data.relevance, data.annotated) == (None, None)


def test_restval_belongs_to_cocos_train(tmp_path):
    data = load(write_coco(tmp_path), "train")
    assert data.image_ids == [30, 10]
    assert data.image_files == [tmp_path / "val2014" / "30.png", tmp_path / "train2014" / "10.png"]
    assert list(zip(data.caption_ids, data.image_of_caption, strict=True)) == [(1, 1), (8, 1), (12, 0)]


def test_flickr30k_has_imgids_and_no_restval(tmp_path):
    data = load(write_flickr(tmp_path), "train", karpathy.FLICKR30K)
    assert (data.image_ids, data.caption_ids) == ([3], [1, 8])
    assert data.image_names == ["10.png"]
    assert data.image_files == [tmp_path / "flickr30k-images" / "10.png"]


def test_flickr30ks_pictures_may_lie_in_images(tmp_path):
    data = load(write_flickr(tmp_path, "images"), "val", karpathy.FLICKR30K)
    assert data.image_files == [tmp_path / "images" / "20.png"]


def test_the_order_in_the_file_does_not_matter(tmp_path):
    straight, content = load(write_coco(tmp_path)), document()
    content["images"].reverse()
    for image in content["images"]:
        image["sentences"].reverse()
    turned = load(write_coco(tmp_path, content))
    assert vars(turned) == vars(straight)


# What can go wrong.


@pytest.mark.parametrize(
    ("name", "layout", "expected"),
    [
        ("coco", karpathy.COCO, "expected dataset_coco.json and train2014/ or val2014/, found only a.txt, elsewhere/"),
        (
            "flickr",
            karpathy.FLICKR30K,
            "expected dataset_flickr30k.json and flickr30k-images/ or images/, found only a.txt, elsewhere/",
        ),
    ],
)
def test_a_wrong_root_says_what_was_expected_and_what_was_found(tmp_path, name, layout, expected):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.txt").touch()
    assert expected in refusal(tmp_path, layout=layout)
    assert "found no such folder" in refusal(tmp_path / "absent", layout=layout)


def test_a_missing_folder_of_pictures_is_named(tmp_path):
    shutil.rmtree(write_coco(tmp_path) / "train2014")
    assert (
        "expected train2014/ with the pictures of dataset_coco.json, found only dataset_coco.json, val2014/"
        in refusal(tmp_path, "train")
    )
    assert load(tmp_path, "test").image_ids == [70, 60, 40]  # which has no picture there
    shutil.rmtree(write_flickr(tmp_path / "flickr") / "flickr30k-images")
    assert "expected flickr30k-images/ or images/ with" in refusal(tmp_path / "flickr", layout=karpathy.FLICKR30K)


def test_an_unknown_split_lists_those_that_are_there(tmp_path):
    assert "no image of the split dev (found: restval, test, train, val)" in refusal(write_coco(tmp_path), "dev")


def test_a_split_without_captions_is_refused(tmp_path):
    content = document()
    content["images"][4]["sentences"] = []
    assert "the images of the split val have no captions" in refusal(write_coco(tmp_path, content), "val")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "{}", '{"images": []}', '{"images": {"imgid": 1}}', "[" * 100_000]
)
def test_what_is_not_of_the_format_is_refused(tmp_path, text):
    assert "dataset_coco.json: not " in refusal(write_coco(tmp_path, text or " "))


def set_image(row, field, value):
    return lambda images: images[row].update({field: value}) if value is not ... else images[row].pop(field)


def set_sentence(row, k, field, value):
    return lambda images: (
        images[row]["sentences"][k].update({field: value})
        if value is not ...
        else images[row]["sentences"][k].pop(field)
    )


BROKEN = {
    "an imgid comes twice": (set_image(1, "imgid", 4), ["images[1]", "imgid 4 comes twice"]),
    "a cocoid comes twice": (set_image(1, "cocoid", 40), ["images[1]", "cocoid 40 comes twice"]),
    "a sentid comes twice": (set_sentence(1, 0, "sentid", 9), ["images[1].sentences[0]", "sentid 9 comes twice"]),
    "a text for an imgid": (set_image(0, "imgid", "4"), ["images[0]", "'imgid'", '"4"', "whole number"]),
    "a fraction for a cocoid": (set_image(0, "cocoid", 40.0), ["images[0] (imgid 4)", "'cocoid'", "40.0"]),
    "true for a sentid": (set_sentence(0, 1, "sentid", True), ["images[0].sentences[1]", "'sentid'", "true"]),
    "no cocoid": (set_image(0, "cocoid", ...), ["images[0] (imgid 4)", "'cocoid'", "null"]),
    "no split": (set_image(2, "split", ...), ["images[2] (imgid 3)", "'split'"]),
    "no file name": (set_image(2, "filename", ...), ["images[2] (imgid 3)", "'filename'"]),
    "no folder": (set_image(2, "filepath", ...), ["images[2] (imgid 3)", "'filepath'"]),
    "an unknown folder": (
        set_image(2, "filepath", ".."),
        ["images[2] (imgid 3)", "'filepath' is '..'", "train2014 or val2014"],
    ),
    "a blank caption": (set_sentence(0, 1, "raw", " \n"), ["images[0].sentences[1] (sentid 2)", "'raw'", "not blank"]),
    "null for a caption": (set_sentence(0, 1, "raw", None), ["images[0].sentences[1] (sentid 2)", "'raw'", "null"]),
    "no caption": (set_sentence(0, 1, "raw", ...), ["images[0].sentences[1] (sentid 2)", "'raw'"]),
    "another image's caption": (
        set_sentence(0, 0, "imgid", 1),
        ["images[0].sentences[0] (sentid 9)", "imgid 1", "imgid 4"],
    ),
    "no captions": (set_image(0, "sentences", ...), ["images[0] (imgid 4)", "'sentences'"]),
    "an object for captions": (set_image(0, "sentences", {}), ["images[0] (imgid 4)", "'sentences'"]),
    "a text for a caption's object": (
        lambda images: images[0]["sentences"].insert(1, "a star"),
        ["images[0].sentences[1]", "no", "object"],
    ),
    "null for an image": (lambda images: images.insert(1, None), ["images[1]", "not an object"]),
    "the folder above": (
        set_image(0, "filename", "../../secret.png"),
        ["images[0]", "'../../secret.png' lies outside"],
    ),
    "the other folder": (
        set_image(0, "filename", "../train2014/10.png"),
        ["images[0]", "'../train2014/10.png' lies outside"],
    ),
    "an absolute name": (set_image(0, "filename", "/etc/hostname"), ["images[0]", "'/etc/hostname' lies outside"]),
    "a null character": (set_image(0, "filename", "a\0.png"), ["images[0]", "a\\x00.png"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_entry_is_named(tmp_path, case):
    change, expected = BROKEN[case]
    content = document()
    change(content["images"])
    message = refusal(write_coco(tmp_path, content))
    for part in ["dataset_coco.json", *expected]:
        assert part in message


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "val2014" / "40.png").replace(tmp_path / "secret.png")
    (tmp_path / "val2014" / "40.png").symlink_to(tmp_path / "secret.png")
    assert "images[0]: the image file '40.png' lies outside" in refusal(tmp_path)


def test_a_linked_folder_is_followed(tmp_path):
    write_coco(tmp_path / "a")
    (tmp_path / "a" / "val2014").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "val2014").symlink_to(tmp_path / "elsewhere")
    assert load(tmp_path / "a").image_files[0].is_file()


# Through the scripts.


def pictures(files):
    """What the built-in CLIP makes of some pictures, one at a time."""
    clip = load_clip("datasets/shapes/clip.json", "datasets/shapes/clip.safetensors")
    with torch.no_grad():
        return torch.cat(
            [clip.model.encode_image(clip.transform(Image.open(file).convert("RGB"))[None]) for file in files]
        )


def check_rows(cache, file_of_caption):
    """Every caption's row is the embedding of its own picture. file_of_caption: M (text, file), in the order of the rows."""
    assert cache.captions == [text for text, _ in file_of_caption]
    own = pictures([file for _, file in file_of_caption])
    torch.testing.assert_close(cache.image[cache.image_of_caption].float(), own, atol=2e-2, rtol=2e-3)
    distinct = pictures(sorted({file for _, file in file_of_caption}))
    assert torch.cdist(distinct, distinct).fill_diagonal_(9).min() > 0.5  # so that no row fits another picture


@pytest.mark.parametrize("dataset", ["coco-karpathy", "flickr30k"])
def test_small_files_go_through_all_scripts(script, workdir, dataset):
    root = (write_coco if dataset == "coco-karpathy" else write_flickr)(workdir / "data" / dataset)
    assert script(cache_embeddings.main, "--dataset", dataset, "--split", "train", "val", "test", *SHAPES_CLIP)[0] == 0
    for split, parts in (
        ("train", ("train", "restval") if dataset == "coco-karpathy" else ("train",)),
        ("val", ("val",)),
        ("test", ("test",)),
    ):
        cache = EmbeddingCache(dataset, split)
        plain = sorted(
            (sentid, raw, root / (folder if dataset == "coco-karpathy" else "flickr30k-images") / f"{cocoid}.png")
            for _, cocoid, folder, part, sentences in ENTRIES
            if part in parts
            for sentid, raw in sentences
        )
        assert cache.meta["caption_ids"] == [sentid for sentid, _, _ in plain]
        check_rows(cache, [(raw, file) for _, raw, file in plain])
    assert load_texts(dataset, "ladder", cache.embed_dim)[0] == list(DATASETS["coco"].ladder)
    assert script(train_script.main, "--dataset", dataset, "--epochs", 1)[0] == 0
    assert (
        script(
            eval_script.main,
            "--dataset",
            dataset,
            "--split",
            "test",
            "--uncer_levels",
            1,
            "--no-plots",
            "--resamples",
            5,
        )[0]
        == 0
    )


def test_a_missing_test_split_names_the_command_that_makes_it(script, workdir):
    write_coco(workdir / "data" / "coco-karpathy")
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


def coco_sample(coco_root, count=20):
    """Some COCO pictures with their captions by plain json: [(id, file, [(annotation id, caption)])]."""
    plain = json.loads((coco_root / "annotations" / "captions_val2017.json").read_text(encoding="utf-8"))
    captions = {}
    for annotation in plain["annotations"]:
        captions.setdefault(annotation["image_id"], []).append((annotation["id"], annotation["caption"]))
    images = plain["images"][:: len(plain["images"]) // count][:count]
    return [(image["id"], coco_root / "val2017" / image["file_name"], captions[image["id"]]) for image in images]


def test_each_coco_caption_has_the_embedding_of_its_own_picture(coco_root, script, workdir):
    sample = coco_sample(coco_root)
    imgids = np.random.default_rng(0).permutation(len(sample)).tolist()
    images = []
    for row, (image_id, file, captions) in enumerate(sample):
        folder = ("train2014", "val2014")[row % 2]
        (workdir / "mine" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, workdir / "mine" / folder / file.name)
        sentences = [{"raw": text, "sentid": sentid, "imgid": imgids[row]} for sentid, text in captions[::-1]]
        entry = {
            "filename": file.name,
            "filepath": folder,
            "cocoid": image_id,
            "imgid": imgids[row],
            "sentences": sentences,
        }
        images.append(entry | {"split": ("train", "restval", "val", "test")[row % 4]})
    (workdir / "mine" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    call = (
        "--dataset",
        "coco-karpathy",
        "--data-root",
        "mine",
        "--split",
        "train",
        "val",
        "test",
        "--name",
        "mine",
        *SHAPES_CLIP,
    )
    assert script(cache_embeddings.main, *call)[0] == 0
    for split, rows in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        cache = EmbeddingCache("mine", split)
        members = [part for row, part in enumerate(sample) if row % 4 in rows]
        assert len(cache.image) == len(members) == 5 * len(rows)
        check_rows(
            cache,
            [
                (text, file)
                for _, text, file in sorted((i, text, file) for _, file, texts in members for i, text in texts)
            ],
        )


# ECCV Caption. The stand-in has the interface of eccv_caption 0.1.0: Metrics().coco_gts["t2i"] and .eccv_gts["t2i"], {caption id: [image ids]}.


def stand_in(monkeypatch, original, right):
    package = types.ModuleType("eccv_caption")
    package.Metrics = type("Metrics", (), {"coco_gts": {"t2i": original}, "eccv_gts": {"t2i": right}})
    monkeypatch.setitem(sys.modules, "eccv_caption", package)


def test_eccv_captions_judgements_become_relevance(tmp_path, monkeypatch):
    stand_in(monkeypatch, {2: [40], 9: [40], 11: [70]}, {2: [70, 40, 60, 999], 9: [40]})
    data = load(write_coco(tmp_path))
    assert data.caption_ids == [2, 9, 11]
    assert data.relevance == [[0, 1, 2], [2], [0]]  # 999 is not in the gallery
    assert data.annotated == [0, 1]
    assert load(tmp_path, "train").relevance is None
    assert load(write_flickr(tmp_path), "test", karpathy.FLICKR30K).relevance is None


def test_captions_that_nobody_looked_into_give_no_relevance(tmp_path, monkeypatch):
    stand_in(monkeypatch, {2: [40]}, {1000: [40]})
    data = load(write_coco(tmp_path))
    assert (data.relevance, data.annotated) == (None, None)


def test_a_caption_of_another_image_than_eccv_caption_has_it_is_refused(tmp_path, monkeypatch):
    stand_in(monkeypatch, {2: [40], 9: [40], 11: [71]}, {2: [70, 40]})
    assert (
        "dataset_coco.json: sentid 11 belongs to cocoid 70 here and to cocoid 71 in the package eccv_caption"
        in refusal(write_coco(tmp_path))
    )


def test_another_version_of_eccv_caption_is_refused(tmp_path, monkeypatch):
    package = types.ModuleType("eccv_caption")
    package.Metrics = type("Metrics", (), {})
    monkeypatch.setitem(sys.modules, "eccv_caption", package)
    assert "eccv_caption is not as version 0.1.0 has it" in refusal(write_coco(tmp_path))


def test_figures_about_relevance_are_those_of_the_annotated_captions(script, workdir, monkeypatch):
    stand_in(monkeypatch, {2: [40], 9: [40], 11: [70]}, {2: [70, 40, 60], 9: [40]})
    write_coco(workdir / "data" / "coco-karpathy")
    assert (
        script(cache_embeddings.main, "--dataset", "coco-karpathy", "--split", "train", "val", "test", *SHAPES_CLIP)[0]
        == 0
    )
    cache = EmbeddingCache("coco-karpathy", "test")
    assert (cache.relevance, cache.annotated) == ([[0, 1, 2], [2], [0]], [0, 1])
    assert "annotated" not in EmbeddingCache("coco-karpathy", "val").meta
    assert script(train_script.main, "--dataset", "coco-karpathy", "--epochs", 1)[0] == 0
    assert (
        script(
            eval_script.main,
            "--dataset",
            "coco-karpathy",
            "--split",
            "test",
            "--uncer_levels",
            1,
            "--no-plots",
            "--resamples",
            5,
        )[0]
        == 0
    )
    result, queries = load_result("coco-karpathy", 0, "asymvlm-psd")
    hits = [queries["t2i_top1"][caption] in cache.relevance[caption] for caption in (0, 1)]
    assert result["metrics"]["ambiguity"]["R@1_described"] == np.mean(hits)
    sign = 1.0 if queries["t2i_uncertainty"][0] > queries["t2i_uncertainty"][1] else -1.0
    assert result["metrics"]["ambiguity"]["spearman"] == pytest.approx(sign)  # of two captions


def test_captions_that_are_not_annotated_do_not_enter_the_figures():
    answers = {
        "uncertainty": [3.0, 2.0, 9.0, 1.0],
        "relevant": [3, 2, 1, 1],
        "relevant_rank": [1, 1, 9, 2],
        "words": [2, 3, 5, 4],
    }
    answers = {key: np.array(values) for key, values in answers.items()}
    figures = ambiguity_metrics(only_annotated(answers | {"annotated": np.array([True, True, False, True])}))
    assert figures["spearman"] == pytest.approx(1.0)
    assert figures["R@1_described"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("annotated", [[], [3], [-1], ["0"], [True], 0, {"0": 1}])
def test_a_cache_with_broken_rows_of_annotated_captions_is_refused(script, workdir, annotated):
    write_coco(workdir / "data" / "coco-karpathy")
    assert script(cache_embeddings.main, "--dataset", "coco-karpathy", "--split", "test", *SHAPES_CLIP)[0] == 0
    meta = workdir / "embeddings" / "coco-karpathy" / "test" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"annotated": annotated}))
    with pytest.raises(UserError, match=r"meta\.json: 'annotated' is not a list of caption rows from 0 to 2"):
        EmbeddingCache("coco-karpathy", "test")


def test_the_real_package_names_cocos_captions_by_annotation_id(coco_root, tmp_path, monkeypatch):
    """With COCO's annotation ids as sentids, as dataset_coco.json has them, every caption that the package knows joins to its own image."""
    monkeypatch.delitem(sys.modules, "eccv_caption")
    metrics = pytest.importorskip("eccv_caption").Metrics()
    (tmp_path / "val2014").mkdir()
    images = [
        {
            "filename": file.name,
            "filepath": "val2014",
            "split": "test",
            "imgid": imgid,
            "cocoid": image_id,
            "sentences": [{"raw": text, "sentid": sentid} for sentid, text in captions],
        }
        for imgid, (image_id, file, captions) in enumerate(coco_sample(coco_root, 300))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    data = load(tmp_path)
    known = [caption_id for caption_id in data.caption_ids if caption_id in metrics.coco_gts["t2i"]]
    assert known
    assert [data.caption_ids[caption] for caption in data.annotated] == [
        i for i in data.caption_ids if i in metrics.eccv_gts["t2i"]
    ]
    for caption in data.annotated:
        rows = [
            data.image_ids.index(i) for i in metrics.eccv_gts["t2i"][data.caption_ids[caption]] if i in data.image_ids
        ]
        assert data.relevance[caption] == sorted(rows)
