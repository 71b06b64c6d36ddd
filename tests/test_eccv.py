"""ECCV Caption's judgements, from a stand-in package, as the relevance of COCO's Karpathy test split."""

import json
import sys
import types

import numpy as np
import pytest

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets import karpathy
from datasets.embedding import EmbeddingCache
from datasets.karpathy import KarpathyCaptions
from tests.conftest import SHAPES_CLIP, coco_sample, load_result, write_flickr30k, write_karpathy_coco
from utils.cli import UserError
from utils.evaluation.figures import measure

pytestmark = pytest.mark.usefixtures("without_eccv_caption")


def load(root, split="test", layout=karpathy.COCO):
    return KarpathyCaptions(root, split, layout)


def stand_in(monkeypatch, original, right):
    """A package with the interface of eccv_caption 0.1.0: Metrics().coco_gts["t2i"] and .eccv_gts["t2i"].

    Args: original, right: {caption id: [image ids]}.
    """
    package = types.ModuleType("eccv_caption")
    package.Metrics = type("Metrics", (), {"coco_gts": {"t2i": original}, "eccv_gts": {"t2i": right}})
    monkeypatch.setitem(sys.modules, "eccv_caption", package)


def test_eccv_captions_judgements_become_relevance(tmp_path, monkeypatch):
    stand_in(monkeypatch, {2: [40], 9: [40], 11: [70]}, {2: [70, 40, 60, 999], 9: [40]})
    data = load(write_karpathy_coco(tmp_path))
    assert data.caption_ids == [2, 9, 11]
    assert data.relevance == [[0, 1, 2], [2], [0]]  # 999 is not in the gallery
    assert data.annotated == [0, 1]
    assert load(tmp_path, "train").relevance is None
    assert load(write_flickr30k(tmp_path), "test", karpathy.FLICKR30K).relevance is None


def test_captions_that_nobody_looked_into_give_no_relevance(tmp_path, monkeypatch):
    stand_in(monkeypatch, {2: [40]}, {1000: [40]})
    data = load(write_karpathy_coco(tmp_path))
    assert (data.relevance, data.annotated) == (None, None)


def test_a_caption_of_another_image_than_eccv_caption_has_it_is_refused(tmp_path, monkeypatch):
    stand_in(monkeypatch, {2: [40], 9: [40], 11: [71]}, {2: [70, 40]})
    message = "sentid 11 belongs to cocoid 70 here and to cocoid 71 in the package eccv_caption"
    with pytest.raises(UserError, match=rf"dataset_coco\.json: {message}"):
        load(write_karpathy_coco(tmp_path))


def test_another_version_of_eccv_caption_is_refused(tmp_path, monkeypatch):
    package = types.ModuleType("eccv_caption")
    package.Metrics = type("Metrics", (), {})
    monkeypatch.setitem(sys.modules, "eccv_caption", package)
    with pytest.raises(UserError, match=r"eccv_caption is not as version 0\.1\.0 has it"):
        load(write_karpathy_coco(tmp_path))


def test_figures_about_relevance_are_those_of_the_annotated_captions(script, workdir, monkeypatch):
    stand_in(monkeypatch, {2: [40], 9: [40], 11: [70]}, {2: [70, 40, 60], 9: [40]})
    write_karpathy_coco(workdir / "data" / "coco-karpathy")
    caching = "--dataset coco-karpathy --split train val test".split()
    assert script(cache_embeddings.main, *caching, *SHAPES_CLIP)[0] == 0
    cache = EmbeddingCache("coco-karpathy", "test")
    assert (cache.relevance, cache.annotated) == ([[0, 1, 2], [2], [0]], [0, 1])
    assert "annotated" not in EmbeddingCache("coco-karpathy", "val").meta
    assert script(train_script.main, "--dataset", "coco-karpathy", "--epochs", 1)[0] == 0
    evaluation = "--dataset coco-karpathy --split test --uncer_levels 1 --no-plots --resamples 5".split()
    assert script(eval_script.main, *evaluation)[0] == 0
    result, queries = load_result("coco-karpathy", 0, "asymvlm-psd")
    hits = [queries["t2i_top1"][caption] in cache.relevance[caption] for caption in (0, 1)]
    assert result["metrics"]["ambiguity"]["R@1_described"] == np.mean(hits)
    sign = 1.0 if queries["t2i_uncertainty"][0] > queries["t2i_uncertainty"][1] else -1.0
    assert result["metrics"]["ambiguity"]["spearman"] == pytest.approx(sign)  # of two captions


def test_captions_that_are_not_annotated_do_not_enter_the_figures():
    answers = {"uncertainty": [3.0, 2.0, 9.0, 1.0], "relevant": [3, 2, 1, 1], "relevant_rank": [1, 1, 9, 2]}
    answers |= {"words": [2, 3, 5, 4], "rank": [1, 1, 9, 2]}
    answers = {key: np.array(values) for key, values in answers.items()}
    figures = measure({"t2i": answers | {"annotated": np.array([True, True, False, True])}}, 1)["ambiguity"]
    assert figures["spearman"] == pytest.approx(1.0)
    assert figures["R@1_described"] == pytest.approx(2 / 3)


def test_the_real_package_names_cocos_captions_by_annotation_id(coco_root, tmp_path, monkeypatch):
    """With annotation ids as sentids, as dataset_coco.json has them, every caption that it knows joins its image."""
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
    right = metrics.eccv_gts["t2i"]
    assert [data.caption_ids[row] for row in data.annotated] == [i for i in data.caption_ids if i in right]
    for caption in data.annotated:
        rows = [data.image_ids.index(i) for i in right[data.caption_ids[caption]] if i in data.image_ids]
        assert data.relevance[caption] == sorted(rows)
