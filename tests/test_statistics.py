"""Bootstrap, right answers, hierarchies and error prediction, against plain loops, scipy and scikit-learn."""

import doctest
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from utils.evaluation import bootstrap, ranking
from utils.evaluation.bootstrap import Resamples, interval, one_by_one, over_seeds, p_value
from utils.evaluation.figures import (
    RECALL,
    RELEVANCE,
    SECTIONS,
    Section,
    hierarchy,
    measure,
    measure_resamples,
    once_each,
)
from utils.evaluation.metrics import auroc, recall_by_level, share_of_ties, uncertainty_by_depth
from utils.evaluation.ranking import rank_relevant


def random_answers(queries=60, ties=True, seed=0):
    """Answers of one direction with everything that a query may have."""
    rng = np.random.default_rng(seed)
    uncertainty = rng.integers(0, 12, queries) / 10 if ties else rng.random(queries)
    return {
        "rank": rng.integers(1, 12, queries),
        "uncertainty": uncertainty,
        "image_uncertainty": rng.random(queries),
        "words": rng.integers(1, 9, queries).astype(float),
        "relevant": rng.integers(1, 30, queries),
        "relevant_rank": rng.integers(1, 12, queries),
        "r_precision": rng.random(queries),
        "ap_at_r": rng.random(queries),
    }


# All right answers.


def slow_relevant(similarity, relevance):
    """First right rank and AP@R of every query, by sorting and counting."""
    ranks, precisions = [], []
    for values, right in zip(similarity, relevance, strict=True):
        order = sorted(range(len(values)), key=lambda a: (-values[a], a))
        hits = [answer in right for answer in order]
        ranks.append(hits.index(True) + 1)
        top = hits[: len(right)]
        precisions.append(sum(sum(top[: k + 1]) / (k + 1) for k in range(len(top)) if top[k]) / len(right))
    return ranks, precisions


@pytest.mark.parametrize("tile", [1, 7, 128])
@pytest.mark.parametrize("ties", [False, True])
def test_right_answers_equal_a_plain_loop(tile, ties, monkeypatch):
    monkeypatch.setattr(ranking, "TILE", tile)
    rng = np.random.default_rng(tile)
    similarity = (
        rng.integers(0, 5, (23, 17)).astype(np.float32) if ties else rng.normal(size=(23, 17)).astype(np.float32)
    )
    relevance = [sorted(rng.choice(17, size=rng.integers(1, 17), replace=False).tolist()) for _ in range(23)]
    found = rank_relevant(lambda q, a: torch.from_numpy(similarity)[q][:, a], relevance, 17)
    ranks, precisions = slow_relevant(similarity, relevance)
    assert found["relevant"].tolist() == [len(rows) for rows in relevance]
    assert found["relevant_rank"].tolist() == ranks
    np.testing.assert_allclose(found["ap_at_r"], precisions, rtol=1e-12)


def test_a_perfect_order_has_an_average_precision_of_one():
    similarity = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    found = rank_relevant(lambda q, a: similarity[q][:, a], [[0, 1], [3]], 4)
    assert Section("", "", "", RELEVANCE).measure(found) == dict.fromkeys(
        ("R@1", "R@5", "R@10", "mAP@R", "R-Precision"), 1.0
    )


# Errors, levels, hierarchies.


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_equals_scikit_learns(ties):
    answers = random_answers(ties=ties)
    assert auroc(answers["rank"] == 1, answers["uncertainty"]) == pytest.approx(
        roc_auc_score(answers["rank"] > 1, answers["uncertainty"])
    )


def test_auroc_without_errors_is_undefined():
    assert auroc(np.array([True, True]), np.array([0.1, 0.2])) is None


def test_asymmetry_reports_each_modality_that_has_an_uncertainty():
    text_only = {"rank": np.array([1, 2]), "uncertainty": np.array([0.1, 0.2])}
    both = text_only | {"image_uncertainty": np.array([0.2, 0.1])}
    found = measure({"t2i": text_only, "i2t": both}, 2)["asymmetry"]
    assert found["t2i AUROC by text"] == found["i2t AUROC by text"] == 1.0
    assert found["i2t AUROC by image"] == 0.0
    assert "t2i AUROC by image" not in found


def test_the_sweep_equals_each_number_of_levels_by_itself_and_leaves_out_too_many():
    answers = random_answers(queries=30)
    found = measure({"t2i": answers}, 10)["sweep_t2i"]
    assert set(found) == {"S@5", "-S*R2@5", "S@10", "-S*R2@10", "S@20", "-S*R2@20"}
    recall = recall_by_level(answers["rank"] == 1, answers["uncertainty"], 20)
    assert found["S@20"] == pytest.approx(stats.spearmanr(range(20), recall).statistic)


def test_ties_are_the_queries_that_share_their_uncertainty():
    values = [3, 1, 3, 2, 3, 1, 5]
    assert share_of_ties(np.array(values)) == pytest.approx(sum(values.count(v) > 1 for v in values) / len(values))


def test_hierarchy_metrics_equal_counted_pairs():
    rng = np.random.default_rng(0)
    uncertainty = rng.permutation(40).astype(float)
    chains = [list(range(i, i + 4)) for i in range(0, 40, 4)] + [[3], [7, 2]]
    taus, steps = [], []
    for chain in (chain for chain in chains if len(chain) > 1):
        pairs = [
            np.sign(uncertainty[chain[a]] - uncertainty[chain[b]])
            for a, b in itertools.combinations(range(len(chain)), 2)
        ]
        taus.append(np.mean(pairs))
        steps += [uncertainty[b] < uncertainty[a] for a, b in itertools.pairwise(chain)]
    found = hierarchy("steps").measure({"uncertainty": uncertainty, "chains": chains})
    assert found["tau"] == pytest.approx(np.mean(taus))
    assert found["falling"] == pytest.approx(np.mean(steps))


def test_a_chain_of_constant_uncertainty_neither_falls_nor_counts_for_tau():
    for uncertainty, chain, value in ((np.array([0.5, 0.5, 0.5]), [0, 1, 2], 0.0), (np.array([0.5]), [0], None)):
        found = hierarchy("steps").measure({"uncertainty": uncertainty, "chains": [chain]})
        assert found == {"falling": value, "tau": value}


def test_depth_is_averaged_over_the_chains_that_reach_it():
    uncertainty = np.array([0.4, 0.3, 0.2, 0.1])
    assert uncertainty_by_depth(uncertainty, [[0, 1, 3], [1, 2]]) == [87.5, 62.5, 25.0]


def test_rsum_is_the_sum_of_all_recalls_in_per_cent():
    t2i, i2t = np.array([1, 3, 20]), np.array([7, 1])
    expected = 100 * (1 / 3 + 2 / 3 + 2 / 3 + 1 / 2 + 1 / 2 + 1)
    ranks = Section("", "", "", RECALL).measure
    assert ranks({"t2i_rank": t2i, "i2t_rank": i2t})["RSUM"] == pytest.approx(expected)
    assert ranks({"t2i_rank": np.array([1, 9]), "i2t_rank": np.array([1])})["RSUM"] == 500.0


# Bootstrap.


def test_a_resample_has_as_many_images_with_all_their_queries_and_is_the_same_at_every_call():
    images = np.array([7, 3, 3, 9, 7, 7])
    counts = np.array([*Resamples(images, 20)])
    assert (counts[:, [0, 1, 3]].sum(axis=1) == 3).all()  # of images
    assert (counts[:, 1] == counts[:, 2]).all() and (counts[:, [0]] == counts[:, [4, 5]]).all()
    assert (counts == np.array([*Resamples(images, 20)])).all()
    assert (Resamples(images, 20).sums() == counts.sum(axis=1)).all()
    assert len({tuple(count) for count in counts}) > 5
    assert (Resamples(np.arange(50), 20).sums() == 50).all()


def test_captions_of_one_image_that_are_all_alike_tell_no_more_than_one():
    one = random_answers(queries=200)
    five = {field: np.repeat(values, 5) for field, values in one.items()} | {"image": np.repeat(np.arange(200), 5)}
    draws = [measure_resamples({"t2i": answers}, 10, 50)["t2i"]["R@1"] for answers in (one, five)]
    np.testing.assert_allclose(*draws)


def test_an_interval_has_the_seeds_variance_in_it():
    rng = np.random.default_rng(0)
    draws = np.stack([rng.normal(0.7, 0.01, 1000), rng.normal(0.9, 0.01, 1000)])  # one of two seeds has collapsed
    low, high = interval(over_seeds(draws))
    assert (low, high) == (pytest.approx(0.69, abs=0.02), pytest.approx(0.91, abs=0.02))
    assert (over_seeds(draws[:1]) == draws[0]).all()
    assert set(np.round(over_seeds(np.array([[0.0] * 500, [1.0] * 500])), 9)) == {0.0, 0.5, 1.0}
    assert (over_seeds(draws) == over_seeds(draws)).all()
    assert (over_seeds(draws) != over_seeds(draws, side=1)).any()


@pytest.mark.parametrize("ties", [False, True])
def test_every_figure_of_a_resample_is_that_of_the_drawn_queries(ties):
    answers = {d: random_answers(queries=97, ties=ties, seed=seed) for seed, d in enumerate(("t2i", "i2t"))}
    images = {"t2i": np.random.default_rng(5).integers(40, size=97), "i2t": np.arange(97)}  # of one to seven captions
    answers["t2i"]["image"] = images["t2i"]
    draws = measure_resamples(answers, 10, 25)
    assert set(draws) == {"t2i", "i2t", "ambiguity", "relevance_t2i", "relevance_i2t"}
    assert set(draws["i2t"]) == {"R@1", "R@5", "R@10", "AURC", "E-AURC", "S", "R2", "-S*R2"}
    assert set(draws["ambiguity"]) == {"spearman", "partial_spearman_given_length", "R@1_described"}
    assert set(draws["relevance_t2i"]) == {"R@1", "R@5", "R@10", "mAP@R", "R-Precision"}
    counts = {d: np.array([*Resamples(images[d], 25)]) for d in answers}
    for i in range(25):
        drawn = {d: {key: np.repeat(v, counts[d][i]) for key, v in fields.items()} for d, fields in answers.items()}
        expected = measure(drawn, 10)
        for section, figures in draws.items():
            for figure, values in figures.items():
                assert values[i] == pytest.approx(expected[section][figure], abs=1e-12), (section, figure)


@pytest.mark.parametrize("ties", [False, True])
def test_what_a_figure_gives_for_all_resamples_at_once_is_what_its_function_gives_for_each(ties):
    answers, resamples = random_answers(queries=60, ties=ties), Resamples(np.arange(60) // 7, 20)
    view = answers | {"correct": answers["rank"] == 1, "levels": 7}
    fast = {figure for section in SECTIONS for figure in section.figures if figure.resampled and figure.is_known(view)}
    assert len(fast) == 16
    for figure in fast:
        each = figure.of(once_each(view, resamples), partial(one_by_one, figure.function))
        np.testing.assert_allclose(
            figure.of(once_each(view, resamples), figure.resampled), each, atol=1e-12, err_msg=figure.name
        )


def test_what_is_undefined_in_a_resample_has_no_interval():
    answers = random_answers() | {"rank": np.ones(60, dtype=int), "words": np.ones(60)}
    draws = measure_resamples({"t2i": answers}, 10, 10)
    assert interval(draws["t2i"]["S"]) is None
    assert interval(draws["ambiguity"]["partial_spearman_given_length"]) is None
    assert p_value(np.array([0.1, np.nan])) is None
    assert interval(np.array([])) is None


def test_the_interval_of_recall_is_about_the_binomial_one():
    rng = np.random.default_rng(1)
    answers = random_answers(queries=2000) | {"rank": 1 + (rng.random(2000) > 0.3)}
    low, high = interval(measure_resamples({"t2i": answers}, 10, 1000)["t2i"]["R@1"])
    mean = np.mean(answers["rank"] == 1)
    half = 1.96 * np.sqrt(mean * (1 - mean) / 2000)
    assert low == pytest.approx(mean - half, abs=0.15 * half)
    assert high == pytest.approx(mean + half, abs=0.15 * half)


def test_p_values_count_the_rarer_sign_twice():
    assert p_value(np.array([0.1, 0.2, 0.3, -0.1])) == 0.8  # 2 (1 + 1) / (4 + 1)
    assert p_value(np.zeros(4)) == 1.0
    assert p_value(np.ones(999)) == 0.002  # never 0


def test_a_paired_difference_is_tighter_than_two_intervals():
    answers = random_answers(queries=500)
    better = answers | {"rank": np.where(np.arange(500) % 10 == 0, 1, answers["rank"])}
    a, b = (measure_resamples({"t2i": x}, 10, 300)["t2i"]["R@1"] for x in (better, answers))
    low, high = interval(a - b)
    assert low > 0
    assert high - low < np.diff(interval(a))[0]


def test_docstring_examples_hold():
    assert doctest.testmod(bootstrap).failed == 0
