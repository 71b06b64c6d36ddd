"""ECCV Caption's judgements, from a stand-in package, as the relevance of COCO's Karpathy test split."""

import json
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets import eccv, karpathy
from datasets.embedding import EmbeddingCache
from datasets.karpathy import KarpathyCaptions
from tests.conftest import (
    SHAPES_CLIP,
    coco_sample,
    load_result,
    make_cache,
    write_flickr30k,
    write_karpathy_coco,
)
from utils.cli import UserError
from utils.evaluation.figures import measure
from utils.evaluation.scorers import answer, rank

pytestmark = pytest.mark.usefixtures("without_eccv_caption")


def load(root, split="test", layout=karpathy.COCO):
    return KarpathyCaptions(root, split, layout)


def stand_in(monkeypatch, original, captions, images, cxc=({}, {})):
    """A package with the interface of eccv_caption 0.1.0.

    Args: original, captions: {caption id: [image ids]}. images: {image id: [caption ids]}. cxc: such two.
    """
    package = types.ModuleType("eccv_caption")
    sets = {"coco_gts": {"t2i": original}, "eccv_gts": {"t2i": captions, "i2t": images}}
    package.Metrics = type("Metrics", (), sets | {"cxc_gts": {"t2i": cxc[0], "i2t": cxc[1]}})
    monkeypatch.setitem(sys.modules, "eccv_caption", package)


ORIGINAL = {
    2: [40],
    9: [40],
    11: [70],
}  # of the stand-in: image rows are 0 (cocoid 70), 1 (60) and 2 (40)


def test_judgements_of_both_directions_are_read_and_neither_is_the_inverse_of_the_other(
    tmp_path, monkeypatch
):
    stand_in(
        monkeypatch,
        ORIGINAL,
        {2: [70, 40, 60, 999], 9: [40]},
        {40: [2, 11, 888]},
        ({9: [60]}, {70: [9], 40: [2]}),
    )
    data = load(write_karpathy_coco(tmp_path))
    assert (data.caption_ids, data.image_ids) == ([2, 9, 11], [70, 60, 40])
    assert data.relevance == {  # 999 and 888 are not in the gallery
        "eccv": {"t2i": [[0, 1, 2], [2], []], "i2t": [[], [], [0, 2]]},
        "cxc": {"t2i": [[], [1], []], "i2t": [[1], [], [0]]},
    }
    assert load(tmp_path, "train").relevance is None
    assert load(write_flickr30k(tmp_path), "test", karpathy.FLICKR30K).relevance is None


def test_captions_that_nobody_looked_into_give_no_relevance(tmp_path, monkeypatch):
    stand_in(monkeypatch, {2: [40]}, {1000: [40]}, {40: [2]})
    assert load(write_karpathy_coco(tmp_path)).relevance is None


def test_a_caption_of_another_image_than_eccv_caption_has_it_is_refused(tmp_path, monkeypatch):
    stand_in(monkeypatch, ORIGINAL | {11: [71]}, {2: [70, 40]}, {40: [2]})
    message = "sentid 11 belongs to cocoid 70 here and to cocoid 71 in the package eccv_caption"
    with pytest.raises(UserError, match=rf"dataset_coco\.json: {message}"):
        load(write_karpathy_coco(tmp_path))


def test_another_version_of_eccv_caption_is_refused(tmp_path, monkeypatch):
    package = types.ModuleType("eccv_caption")
    package.Metrics = type("Metrics", (), {})
    monkeypatch.setitem(sys.modules, "eccv_caption", package)
    with pytest.raises(UserError, match=r"eccv_caption is not as version 0\.1\.0 has it"):
        load(write_karpathy_coco(tmp_path))


def test_figures_about_relevance_are_those_of_the_judged_queries(script, workdir, monkeypatch):
    stand_in(
        monkeypatch, ORIGINAL, {2: [70, 40, 60], 9: [40]}, {70: [9, 11]}, ({11: [40]}, {40: [2, 9]})
    )
    write_karpathy_coco(workdir / "data" / "coco-karpathy")
    caching = "--dataset coco-karpathy --split train val test".split()
    assert script(cache_embeddings.main, *caching, *SHAPES_CLIP)[0] == 0
    judgements = EmbeddingCache("coco-karpathy", "test").judgements
    assert judgements["eccv"] == {"t2i": [[0, 1, 2], [2], []], "i2t": [[1, 2], [], []]}
    assert EmbeddingCache("coco-karpathy", "val").judgements == {}
    assert script(train_script.main, "--dataset", "coco-karpathy", "--epochs", 1)[0] == 0
    evaluation = (
        "--dataset coco-karpathy --split test --uncer_levels 1 --no-plots --resamples 5".split()
    )
    assert script(eval_script.main, *evaluation)[0] == 0
    result, queries = load_result("coco-karpathy", 0, "asymvlm-psd")
    metrics, right = result["metrics"], judgements["eccv"]["t2i"]
    hits = [queries["t2i_top1"][caption] in right[caption] for caption in (0, 1)]
    assert metrics["ambiguity"]["R@1_described"] == metrics["relevance_t2i"]["R@1"] == np.mean(hits)
    sign = 1.0 if queries["t2i_uncertainty"][0] > queries["t2i_uncertainty"][1] else -1.0
    assert metrics["ambiguity"]["spearman"] == pytest.approx(sign)  # of two captions
    assert metrics["relevance_i2t"]["R@1"] == (queries["i2t_top1"][0] in (1, 2))
    assert metrics["cxc_t2i"]["R@1"] == (queries["t2i_top1"][2] == 2)
    assert queries["t2i_relevant"].tolist() == [3, 1, 0]
    assert queries["i2t_cxc_relevant"].tolist() == [0, 2]  # of the two images that have a caption


def test_a_cache_from_before_both_directions_is_read_as_it_was(workdir):
    relevance = [[0, 1], [1], [2]]
    meta = {"model": "none", "pretrained": "none", "annotated": [0, 2]}
    make_cache(
        "old",
        images=3,
        captions_per_image=1,
        relevance=relevance,
        image_of_caption=[0, 1, 2],
        meta=meta,
    )
    right = EmbeddingCache("old", "val").judgements["relevance"]
    assert right == {
        "t2i": [[0, 1], [], [2]],
        "i2t": [[0], [], [2]],
    }  # by the captions that were looked into


def test_captions_that_are_not_annotated_do_not_enter_the_figures():  # of results from before
    answers = {
        "uncertainty": [3.0, 2.0, 9.0, 1.0],
        "relevant": [3, 2, 1, 1],
        "relevant_rank": [1, 1, 9, 2],
    }
    answers |= {"words": [2, 3, 5, 4], "rank": [1, 1, 9, 2], "query": [0, 1, 2, 3]}
    answers = {key: np.array(values) for key, values in answers.items()}
    figures = measure({"t2i": answers | {"annotated": np.array([True, True, False, True])}}, 1)[
        "ambiguity"
    ]
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
    for name, gts in (("eccv", metrics.eccv_gts), ("cxc", metrics.cxc_gts)):
        for direction, queries, answers in (
            ("t2i", data.caption_ids, data.image_ids),
            ("i2t", data.image_ids, data.caption_ids),
        ):
            row_of, right = {answer: row for row, answer in enumerate(answers)}, gts[direction]
            expected = [
                sorted(row_of[a] for a in right.get(query, ()) if a in row_of) for query in queries
            ]
            assert data.relevance[name][direction] == expected


@pytest.fixture(scope="module")
def judged():
    """Metrics of the real package on a part of its gallery, and a cache that has just that part."""
    saved = sys.modules.pop("eccv_caption", None)
    metrics = pytest.importorskip("eccv_caption").Metrics()
    if saved is None:
        sys.modules.pop("eccv_caption", None)
    image_ids = list(metrics.eccv_gts["i2t"])[:150] + list(metrics.coco_gts["i2t"])[:150]
    image_ids = list(dict.fromkeys(image_ids))
    captions = [(c, image) for image in image_ids for c in metrics.coco_gts["i2t"][image]]
    gallery = {"t2i": set(image_ids), "i2t": {c for c, _ in captions}}
    asked = {"t2i": gallery["i2t"], "i2t": gallery["t2i"]}
    for name in ("eccv_gts", "cxc_gts"):
        part = {
            d: {
                q: [a for a in right if a in gallery[d]] for q, right in of.items() if q in asked[d]
            }
            for d, of in getattr(metrics, name).items()
        }
        setattr(
            metrics,
            name,
            {d: {q: right for q, right in of.items() if right} for d, of in part.items()},
        )
    return metrics, image_ids, captions


@pytest.mark.parametrize("seed", range(20))
def test_figures_are_those_of_the_package_on_random_rankings(judged, seed, monkeypatch):
    metrics, image_ids, captions = judged
    package = types.ModuleType("eccv_caption")
    package.Metrics = lambda: metrics
    monkeypatch.setitem(sys.modules, "eccv_caption", package)
    caption_ids, row_of = (
        [c for c, _ in captions],
        {image: row for row, image in enumerate(image_ids)},
    )
    image_of_caption = [row_of[image] for _, image in captions]
    similarity = torch.rand(
        len(image_ids), len(captions), generator=torch.Generator().manual_seed(seed)
    )
    found = eccv.judgements(image_ids, caption_ids, image_of_caption, "a file")
    cache = SimpleNamespace(
        image=image_ids,
        text=caption_ids,
        captions=[str(c) for c in caption_ids],
        image_of_caption=torch.tensor(image_of_caption),
        judgements=found,
    )
    scorer = SimpleNamespace(
        ranking=rank(lambda images, captions: similarity[images][:, captions], cache),
        caption_uncertainty=lambda: np.arange(len(caption_ids), dtype=float),
        image_uncertainty=lambda: None,
    )
    ours = measure(answer(scorer, cache), 2)
    ranked = {
        "i2t": {
            i: [caption_ids[c] for c in similarity[row].argsort(descending=True)]
            for row, i in enumerate(image_ids)
        },
        "t2i": {
            c: [image_ids[i] for i in similarity[:, row].argsort(descending=True)]
            for row, c in enumerate(caption_ids)
        },
    }
    wanted = ("eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_recalls")
    theirs = metrics.compute_all_metrics(
        ranked["i2t"], ranked["t2i"], target_metrics=wanted, verbose=False
    )
    for d in ("t2i", "i2t"):
        relevance = ours[f"relevance_{d}"]
        assert relevance["R@1"] == pytest.approx(theirs["eccv_r1"][d], abs=1e-9)
        assert relevance["mAP@R"] == pytest.approx(theirs["eccv_map_at_r"][d], abs=1e-9)
        assert relevance["R-Precision"] == pytest.approx(theirs["eccv_rprecision"][d], abs=1e-9)
        for k in (1, 5, 10):
            assert ours[f"cxc_{d}"][f"R@{k}"] == pytest.approx(theirs[f"cxc_r{k}"][d], abs=1e-9)
