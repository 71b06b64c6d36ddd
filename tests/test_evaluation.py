"""What eval.py answers beyond the tables: comparisons, plots, hierarchies, folds, prompts, captions."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_script
from datasets.embedding import EmbeddingCache
from datasets.shapes import world
from tests.conftest import load_result, make_cache
from utils.checkpoint import load_adaptor
from utils.evaluation.figures import hierarchy
from utils.evaluation.results import Results
from utils.files import sha256
from utils.preprocess import ClipId

PLAIN = ("--no-plots", "--resamples", 100)
EVAL = ("--dataset", "tiny", *PLAIN)


def test_intervals_hold_the_figures_of_the_run(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    result, _ = load_result("tiny", 1, "pfe")
    for section, figure in (
        ("t2i", "R@1"),
        ("i2t", "AURC"),
        ("ambiguity", "R@1_described"),
        ("relevance_i2t", "mAP@R"),
    ):
        low, high = result["intervals"][section][figure]
        assert low <= high
        assert low - 0.1 <= result["metrics"][section][figure] <= high + 0.1


def test_all_figures_follow_from_the_file_of_queries(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    result, arrays = load_result("tiny", 0, "pfe")
    answers = {
        d: {
            key.removeprefix(f"{d}_"): values for key, values in arrays.items() if key.startswith(d)
        }
        for d in ("t2i", "i2t")
    }
    again = Results.of(answers, 10).content
    assert again["t2i"] == result["t2i"]
    assert all(result["metrics"][key] == values for key, values in again["metrics"].items())


def test_right_answers_of_both_directions_equal_a_sort_of_the_full_matrix(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    _, arrays = load_result("tiny", 0, "pfe")
    cache = EmbeddingCache("tiny", "val")
    with torch.no_grad():
        similarity = load_adaptor("checkpoints/tiny/0/pfe.pt").similarity(
            cache.image.read(), cache.text.read()
        )
    right = torch.zeros(40, 120, dtype=torch.bool)
    for caption, (rows, own) in enumerate(
        zip(cache.relevance, cache.image_of_caption.tolist(), strict=True)
    ):
        right[[*rows, own], caption] = True
    for direction, scores, hits in (("t2i", similarity.T, right.T), ("i2t", similarity, right)):
        ranks = [
            int(torch.nonzero(h[s.argsort(descending=True)])[0]) + 1
            for s, h in zip(scores, hits, strict=True)
        ]
        assert arrays[f"{direction}_relevant_rank"].tolist() == ranks
        assert arrays[f"{direction}_relevant"].tolist() == hits.sum(dim=1).tolist()


def test_uncertainty_of_images_is_that_of_the_query_and_of_the_image_retrieved(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    result, arrays = load_result("tiny", 0, "pfe")
    with torch.no_grad():
        images = EmbeddingCache("tiny", "val").image.read()
        uncertainty = load_adaptor("checkpoints/tiny/0/pfe.pt").adapt_image(images)[1].numpy()
    np.testing.assert_allclose(
        arrays["i2t_image_uncertainty"], uncertainty[arrays["i2t_query"]], rtol=1e-6
    )
    np.testing.assert_allclose(
        arrays["t2i_image_uncertainty"], uncertainty[arrays["t2i_top1"]], rtol=1e-6
    )
    assert len(result["by_image"]["i2t"]) == 10
    assert "by_image" in result and load_result("tiny", 0, "asymvlm-psd")[0]["by_image"] == {}


def test_hierarchies_are_measured_for_every_row_of_the_table(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    result, _ = load_result("tiny", 0, "asymvlm-psd")
    texts, chains = [
        torch.load("embeddings/tiny/texts/steps.pt", weights_only=True),
        json.loads(Path("embeddings/tiny/texts/steps.json").read_text()),
    ]
    with torch.no_grad():
        uncertainty = (
            load_adaptor("checkpoints/tiny/0/asymvlm-psd.pt").adapt_text(texts)[1].double().numpy()
        )
    assert result["metrics"]["hierarchy steps"] == hierarchy("steps").measure(
        {"uncertainty": uncertainty, "chains": chains["chains"]}
    )
    assert len(result["depth"]["steps"]) == 4
    details = Path("results/tiny/details.md").read_text()
    table = details[details.index("hierarchy steps") :].split("\n\n")[0]
    assert all(
        f"| {row} |" in table for row in ("softmax-entropy", "caption-length", "asymvlm-psd", "pfe")
    )


def test_folds_average_the_recall_within_parts_of_the_gallery(script, trained):
    assert script(eval_script.main, *EVAL, *trained, "--folds", 4)[0] == 0
    found = load_result("tiny", 0, "asymvlm-psd")[0]["metrics"]["recall_folds"]
    cache = EmbeddingCache("tiny", "val")
    with torch.no_grad():
        similarity = load_adaptor("checkpoints/tiny/0/asymvlm-psd.pt").similarity(
            cache.image.read(), cache.text.read()
        )
    hits = []
    for start in range(0, 40, 10):
        captions = [
            j for j, own in enumerate(cache.image_of_caption.tolist()) if start <= own < start + 10
        ]
        best = similarity[start : start + 10][:, captions].argmax(dim=0) + start
        hits.append((best == cache.image_of_caption[captions]).float().mean().item())
    assert found["t2i R@1"] == pytest.approx(np.mean(hits))
    assert "mean over the folds" in Path("results/tiny/details.md").read_text()


def test_two_methods_are_compared_over_the_same_queries(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    status, printed, _ = script(
        eval_script.main, *EVAL, "--seed", 0, 1, "--compare", "asymvlm-psd", "softmax-entropy"
    )
    assert status == 0
    runs = [
        load_result("tiny", seed, "asymvlm-psd")[0]["metrics"]["t2i"]["AURC"] for seed in (0, 1)
    ]
    other = json.loads(Path("results/tiny/baselines/softmax-entropy.json").read_text())["metrics"][
        "t2i"
    ]["AURC"]
    line = next(line for line in printed.splitlines() if line.startswith("AURC"))
    assert line.split()[1:4] == [
        f"{np.mean(runs):.3f}",
        f"{other:.3f}",
        f"{np.mean(runs) - other:+.3f}",
    ]
    assert (
        Path("results/tiny/asymvlm-psd-against-softmax-entropy.txt").read_text().strip()
        == printed.strip()
    )


def table_of(printed, section):
    """The lines of a section of what --compare prints, its header first."""
    return next(part.splitlines() for part in printed.split("\n\n") if part.startswith(section))


def test_a_p_value_of_one_seed_says_so(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    compare = (*EVAL, "--compare", "asymvlm-psd", "softmax-entropy")
    header, _, *rows = table_of(script(eval_script.main, *compare)[1], "text-to-image")
    assert header.endswith("p over images, this seed")
    assert 0 < float(rows[1].split()[-1]) <= 1
    header, _, *rows = table_of(
        script(eval_script.main, *compare, "--seed", 0, 1)[1], "text-to-image"
    )
    assert header.split()[-2:] == ["interval", "p"]
    assert 0 < float(rows[1].split()[-1]) <= 1
    assert script(eval_script.main, *compare, "--resamples", 99)[2].count(
        "a comparison needs at least 100"
    )


def test_results_of_different_caches_are_not_paired(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    make_cache("tiny", seed=1)
    assert script(eval_script.main, *EVAL, "--method", "pfe", "--seed", 0)[0] == 0
    status, _, line = script(eval_script.main, *EVAL, "--compare", "pfe", "asymvlm-psd")
    assert status == 2
    assert "results are of different caches" in line
    assert load_result("tiny", 0, "pfe")[0]["config"]["checkpoint"] == sha256(
        Path("checkpoints/tiny/0/pfe.pt")
    )


def test_a_head_on_the_cache_of_another_clip_is_refused_unless_insisted(script, trained):
    for meta, status in (
        ({"model": "elsewhere/none", "pretrained": "none"}, 0),  # a file's folder does not matter
        ({"model": "none", "pretrained": "other"}, 2),
        ({}, 0),
    ):
        make_cache("tiny", meta=meta)
        assert script(eval_script.main, *EVAL, "--method", "pfe")[0] == status
    make_cache("tiny", meta={"model": "none", "pretrained": "other"})
    line = script(eval_script.main, *EVAL, "--method", "pfe")[2]
    assert (
        "'pretrained': 'none'" in line
        and "'pretrained': 'other'" in line
        and "--other-clip" in line
    )
    assert script(eval_script.main, *EVAL, "--method", "pfe", "--other-clip")[0] == 0


def test_sums_tell_clips_of_one_name_apart_where_both_are_known():
    one, other = (ClipId("m.json", "w.pt", "a", sum_) for sum_ in ("b", "c"))
    unknown = ClipId("x/m.json", "y/w.pt")
    assert one.contradicts(other) and not one.contradicts(one)
    assert not one.contradicts(unknown) and not unknown.contradicts(one)
    assert not one.contradicts(ClipId("renamed.json", "w.pt", "a", "b"))
    assert unknown.contradicts(ClipId("m.json", "v.pt"))
    nothing = ClipId(None, None)
    assert not nothing.contradicts(one) and not one.contradicts(nothing)


@pytest.mark.parametrize(
    ("arrays", "document"),
    [
        ({"t2i_rank": np.array([{"a": 1}], dtype=object)}, None),
        ({"t2i_rank": np.ones(3)}, None),
        (
            {
                f"{d}_{key}": np.ones(4 + (key == "rank"))
                for d in ("t2i", "i2t")
                for key in ("query", "top1", "rank", "uncertainty")
            },
            None,
        ),
        (
            {
                f"{d}_{key}": np.float64(1)
                for d in ("t2i", "i2t")
                for key in ("query", "top1", "rank", "uncertainty")
            },
            None,
        ),
        (None, []),
        (None, {"config": 3}),
    ],
)
def test_results_that_were_tampered_with_are_refused(script, trained, arrays, document):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    if arrays is not None:
        np.savez("results/tiny/0/pfe.npz", **arrays)
    if document is not None:
        Path("results/tiny/0/pfe.json").write_text(json.dumps(document))
    status, _, error = script(eval_script.main, *EVAL, "--compare", "pfe", "asymvlm-psd")
    assert status == 2
    assert "results/tiny/0/pfe" in error


def test_every_step_of_a_chain_is_true_and_says_more():
    scenes = [world.draw_scene(random.Random(f"gallery/{i}")) for i in range(400)]
    for i in range(60):
        rng = random.Random(i)
        scene = world.draw_scene(rng)
        chain = world.write_chain(scene, rng)
        assert len(chain) == 6
        assert all(world.describes(caption, scene) for caption in chain)
        described = [
            {k for k, other in enumerate(scenes) if world.describes(caption, other)}
            for caption in chain
        ]
        assert all(narrow <= wide for wide, narrow in itertools.pairwise(described))
        assert len({caption.text for caption in chain}) == 6
    assert world.write_chains(count=3) == world.write_chains(count=5)[:3]
