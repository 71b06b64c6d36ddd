"""From pictures to tables: on the built-in data set with its own CLIP, and on COCO files with a small random one."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from datasets.registry import DATASETS
from datasets.shapes import world
from datasets.shapes.pretrain import FOLDER, recall
from tests.conftest import load_result, write_tiny_clip
from utils.preprocess import load_clip


def test_the_built_in_clip_matches_pictures_and_their_full_descriptions():
    source = DATASETS["shapes"]
    clip = load_clip(source.model, source.pretrained)
    t2i, i2t = recall(clip.model, clip.transform, clip.tokenizer, images=1000)
    assert min(t2i, i2t) >= 0.75


def test_the_built_in_clip_is_small_enough_to_ship():
    content = (FOLDER / "clip.safetensors").read_bytes()
    assert len(content) <= 16 * 2**20
    assert len(zlib.compress(content, 6)) <= 4 * 2**20


def test_shapes_go_from_drawing_to_tables(script):
    world.make("small", train=600, val=100)
    assert (
        script(
            cache_embeddings.main, "--dataset", "shapes", "--data-root", "small", "--workers", 0
        )[0]
        == 0
    )
    training = "--dataset shapes --recipe small --epochs 15 --batch-size 512".split()
    assert script(train_script.main, *training)[0] == 0
    status, printed, _ = script(eval_script.main, "--dataset", "shapes")
    assert status == 0
    result, queries = load_result("shapes", 0, "asymvlm-psd")
    relevance = json.loads(Path("small/annotations/relevance_val.json").read_text())
    assert len(queries["t2i_rank"]) == 500
    assert result["metrics"]["ambiguity"]["spearman"] > 0.6
    assert result["t2i"][0] > result["t2i"][-1]
    ladder = [rung["uncertainty"] for rung in result["ladder"]]
    assert ladder[0] > ladder[-1]
    assert all(rung["prompt"] in printed for rung in result["ladder"])
    rows = EmbeddingCache("shapes", "val").relevance
    assert [len(images) for images in rows] == [
        len(relevance[key]) for key in sorted(relevance, key=int)
    ]


def test_real_coco_goes_from_pictures_to_tables(coco_root, script, tmp_path):
    config, weights, _ = write_tiny_clip(tmp_path)
    clip = ("--model", config, "--pretrained", weights, "--workers", 2)
    assert (
        script(cache_embeddings.main, "--dataset", "coco", "--data-root", coco_root, *clip)[0] == 0
    )
    for split, images, captions in (("train", 700, 3502), ("val", 300, 1501)):
        cache = EmbeddingCache("coco", split)
        assert (len(cache.image), len(cache.text)) == (images, captions)
        document = json.loads(
            (coco_root / "annotations" / f"captions_{split}2017.json").read_text()
        )
        file_of = {image["id"]: image["file_name"] for image in document["images"]}
        annotations = sorted(document["annotations"], key=lambda annotation: annotation["id"])
        for row, annotation in enumerate(annotations):
            assert cache.captions[row] == annotation["caption"]
            assert cache.images[cache.image_of_caption[row]] == file_of[annotation["image_id"]]
    assert script(train_script.main, "--recipe", "small", "--epochs", 2)[0] == 0
    status, printed, _ = script(eval_script.main, "--uncer_levels", 10)
    assert status == 0
    assert "300 images, 1501 captions" in printed
    result, _ = load_result("coco", 0, "asymvlm-psd")
    assert len(result["t2i"]) == len(result["i2t"]) == 10
    assert np.isfinite([rung["uncertainty"] for rung in result["ladder"]]).all()
    assert torch.load("embeddings/coco/val/image.pt", weights_only=True).dtype == torch.float16
