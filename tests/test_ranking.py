"""Ranks and right answers by tiles, against sorts of the full matrix."""

import numpy as np
import pytest
import torch

from utils.evaluation import ranking
from utils.evaluation.ranking import rank_queries, rank_relevant
from utils.evaluation.results import Results


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
        rng.integers(0, 4, size=(20, 61)).astype(np.float32)
        if ties
        else rng.normal(size=(20, 61)).astype(np.float32)
    )
    answers = rank_queries(lambda i, j: torch.from_numpy(similarity)[i][:, j], image_of_caption, 20)
    t2i_rank, t2i_top, i2t_rank, i2t_top = slow_answers(similarity, image_of_caption)
    assert answers["t2i"]["rank"].tolist() == t2i_rank
    assert answers["t2i"]["top1"].tolist() == t2i_top
    assert answers["i2t"]["rank"].tolist() == i2t_rank
    assert answers["i2t"]["top1"].tolist() == i2t_top
    assert 4 not in answers["i2t"]["query"]
    for direction in answers.values():  # the first answer is right exactly where its rank is 1
        right = (
            image_of_caption[direction["query"]]
            if direction is answers["t2i"]
            else direction["query"]
        )
        top = (
            direction["top1"]
            if direction is answers["t2i"]
            else image_of_caption[direction["top1"]]
        )
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
    two = rank_queries(
        lambda i, j: torch.from_numpy(similarity[:, order])[i][:, j], image_of_caption[order], 10
    )
    for answers, known in ((one, uncertainty), (two, uncertainty[order])):
        answers["t2i"]["uncertainty"], answers["i2t"]["uncertainty"] = (
            known,
            known[answers["i2t"]["top1"]],
        )
    assert (one["t2i"]["rank"][order] == two["t2i"]["rank"]).all()
    assert (one["i2t"]["top1"] == order[two["i2t"]["top1"]]).all()
    first, second = (Results.of(answers, 5).content for answers in (one, two))
    assert first["t2i"] == pytest.approx(second["t2i"])
    assert first["metrics"]["t2i"] == pytest.approx(second["metrics"]["t2i"])


def test_similarity_that_is_not_a_number_is_refused():
    similarity = np.full((3, 3), np.nan)
    with pytest.raises(ValueError, match="not a number"):
        rank_queries(lambda i, j: torch.from_numpy(similarity)[i][:, j], np.arange(3), 3)


def slow_relevant(similarity, relevance):
    """First right rank and AP@R of every query, by sorting and counting."""
    ranks, precisions = [], []
    for values, right in zip(similarity, relevance, strict=True):
        order = sorted(range(len(values)), key=lambda a: (-values[a], a))
        hits = [answer in right for answer in order]
        ranks.append(hits.index(True) + 1)
        top = hits[: len(right)]
        precisions.append(
            sum(sum(top[: k + 1]) / (k + 1) for k in range(len(top)) if top[k]) / len(right)
        )
    return ranks, precisions


@pytest.mark.parametrize("tile", [1, 7, 128])
@pytest.mark.parametrize("ties", [False, True])
def test_right_answers_equal_a_plain_loop(tile, ties, monkeypatch):
    monkeypatch.setattr(ranking, "TILE", tile)
    rng = np.random.default_rng(tile)
    similarity = (
        rng.integers(0, 5, (23, 17)).astype(np.float32)
        if ties
        else rng.normal(size=(23, 17)).astype(np.float32)
    )
    relevance = [
        sorted(rng.choice(17, size=rng.integers(1, 17), replace=False).tolist()) for _ in range(23)
    ]
    found = rank_relevant(lambda q, a: torch.from_numpy(similarity)[q][:, a], relevance, 17)
    ranks, precisions = slow_relevant(similarity, relevance)
    assert found["relevant"].tolist() == [len(rows) for rows in relevance]
    assert found["relevant_rank"].tolist() == ranks
    np.testing.assert_allclose(found["ap_at_r"], precisions, rtol=1e-12)
