"""Metrics against slow loops and closed forms, and the worked examples of their docstrings."""

import doctest

import numpy as np
import pytest
import torch
from scipy import stats

from utils.evaluation import metrics, ranking
from utils.evaluation.metrics import aurc, level_statistics, partial_spearman, recall_by_level, spearman
from utils.evaluation.ranking import rank_queries
from utils.evaluation.results import Results


@pytest.mark.parametrize(("module", "least"), [(metrics, 11), (ranking, 6)])
def test_docstring_examples_hold(module, least):
    result = doctest.testmod(module)
    assert result.attempted >= least
    assert result.failed == 0


def slow_answers(similarity, image_of_caption):
    """By sorting every row and column, ties to the lower row. Returns: (t2i rank, t2i top1, i2t rank, i2t top1)."""
    images, captions = similarity.shape
    t2i_rank, t2i_top, i2t_rank, i2t_top = [], [], [], []
    for j in range(captions):
        order = sorted(range(images), key=lambda i: (-similarity[i, j], i))
        t2i_top.append(order[0])
        t2i_rank.append(order.index(image_of_caption[j]) + 1)
    for i in range(images):
        order = sorted(range(captions), key=lambda j: (-similarity[i, j], j))
        right = [rank for rank, j in enumerate(order, 1) if image_of_caption[j] == i]
        if right:
            i2t_top.append(order[0])
            i2t_rank.append(right[0])
    return t2i_rank, t2i_top, i2t_rank, i2t_top


@pytest.mark.parametrize("tile", [1, 3, 7, 512])
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_equal_those_of_a_full_sort(tile, ties, monkeypatch):
    monkeypatch.setattr(ranking, "TILE", tile)
    rng = np.random.default_rng(tile)
    image_of_caption = rng.integers(0, 20, size=61)
    image_of_caption[image_of_caption == 4] = 5  # an image without captions stays in the gallery
    similarity = (
        rng.integers(0, 4, size=(20, 61)).astype(np.float32) if ties else rng.normal(size=(20, 61)).astype(np.float32)
    )
    answers = rank_queries(lambda i, j: torch.from_numpy(similarity)[i][:, j], image_of_caption, 20)
    t2i_rank, t2i_top, i2t_rank, i2t_top = slow_answers(similarity, image_of_caption)
    assert answers["t2i"]["rank"].tolist() == t2i_rank
    assert answers["t2i"]["top1"].tolist() == t2i_top
    assert answers["i2t"]["rank"].tolist() == i2t_rank
    assert answers["i2t"]["top1"].tolist() == i2t_top
    assert 4 not in answers["i2t"]["query"]
    for direction in answers.values():  # the first answer is right exactly where its rank is 1
        right = image_of_caption[direction["query"]] if direction is answers["t2i"] else direction["query"]
        top = direction["top1"] if direction is answers["t2i"] else image_of_caption[direction["top1"]]
        assert ((top == right) == (direction["rank"] == 1)).all()


def test_permuting_captions_permutes_their_answers():
    rng = np.random.default_rng(0)
    image_of_caption, similarity, uncertainty = (
        rng.permutation(np.repeat(np.arange(10), 3)),
        rng.normal(size=(10, 30)),
        rng.random(30),
    )
    order = rng.permutation(30)
    one = rank_queries(lambda i, j: torch.from_numpy(similarity)[i][:, j], image_of_caption, 10)
    two = rank_queries(lambda i, j: torch.from_numpy(similarity[:, order])[i][:, j], image_of_caption[order], 10)
    for answers, known in ((one, uncertainty), (two, uncertainty[order])):
        answers["t2i"]["uncertainty"], answers["i2t"]["uncertainty"] = known, known[answers["i2t"]["top1"]]
    assert (one["t2i"]["rank"][order] == two["t2i"]["rank"]).all()
    assert (one["i2t"]["top1"] == order[two["i2t"]["top1"]]).all()
    first, second = (Results.of(answers, 5).content for answers in (one, two))
    assert first["t2i"] == pytest.approx(second["t2i"])
    assert first["metrics"]["t2i"] == pytest.approx(second["metrics"]["t2i"])


def test_similarity_that_is_not_a_number_is_refused():
    similarity = np.full((3, 3), np.nan)
    with pytest.raises(ValueError, match="not a number"):
        rank_queries(lambda i, j: torch.from_numpy(similarity)[i][:, j], np.arange(3), 3)


@pytest.mark.parametrize("queries", [10, 11, 19, 100])
def test_levels_drop_no_query_and_differ_by_at_most_one(queries):
    rng = np.random.default_rng(queries)
    correct, uncertainty = rng.random(queries) < 0.5, rng.random(queries)
    order = sorted(range(queries), key=lambda q: (uncertainty[q], q))
    sizes = [queries // 10 + (k < queries % 10) for k in range(10)]
    expected, start = [], 0
    for size in sizes:
        expected.append(sum(bool(correct[q]) for q in order[start : start + size]) / size)
        start += size
    assert recall_by_level(correct, uncertainty, 10) == pytest.approx(expected)


def test_level_statistics_agree_with_scipy():
    recall = [0.9, 0.8, 0.85, 0.5, 0.3]
    found = level_statistics(recall)
    assert found["S"] == pytest.approx(stats.spearmanr(range(5), recall).statistic)
    assert found["R2"] == pytest.approx(np.corrcoef(range(5), recall)[0, 1] ** 2)
    assert found["-S*R2"] == pytest.approx(-found["S"] * found["R2"])


def test_constant_recall_or_uncertainty_is_undefined_and_not_nan():
    assert level_statistics([0.5, 0.5, 0.5]) == {"S": None, "R2": None, "-S*R2": None}
    assert spearman(np.ones(5), np.arange(5)) is None
    assert partial_spearman(np.arange(5), np.arange(5), np.ones(5)) is None


def test_aurc_of_ties_is_the_mean_over_their_orders():
    rng = np.random.default_rng(1)
    correct, uncertainty = rng.random(30) < 0.6, rng.integers(0, 4, size=30)
    areas = []
    for _ in range(4000):
        order = np.lexsort((rng.random(30), uncertainty))
        error = 1.0 - correct[order]
        areas.append(np.mean([error[: n + 1].mean() for n in range(30)]))
    assert aurc(correct, uncertainty)["AURC"] == pytest.approx(np.mean(areas), abs=4 * np.std(areas) / np.sqrt(4000))


def test_perfect_order_has_no_excess_area():
    correct = np.array([True] * 7 + [False] * 3)
    assert aurc(correct, np.arange(10))["E-AURC"] == 0
    assert aurc(correct, -np.arange(10))["E-AURC"] > 0.3


def test_partial_correlation_equals_that_of_rank_residuals():
    rng = np.random.default_rng(2)
    given = rng.normal(size=200)
    x, y = given + rng.normal(size=200), given + rng.normal(size=200)
    ranks = [stats.rankdata(v) for v in (x, y, given)]
    residuals = [r - np.polyval(np.polyfit(ranks[2], r, 1), ranks[2]) for r in ranks[:2]]
    assert partial_spearman(x, y, given) == pytest.approx(np.corrcoef(*residuals)[0, 1], abs=1e-9)
