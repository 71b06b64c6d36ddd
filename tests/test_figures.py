"""Metrics of an evaluation, section by section, against plain loops and scipy."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from tests.test_bootstrap import random_answers
from utils.evaluation.figures import RECALL, RELEVANCE, Section, hierarchy, measure
from utils.evaluation.metrics import recall_by_level
from utils.evaluation.ranking import rank_relevant


def test_a_perfect_order_has_an_average_precision_of_one():
    similarity = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    found = rank_relevant(lambda q, a: similarity[q][:, a], [[0, 1], [3]], 4)
    assert Section("", "", None, None, RELEVANCE).measure(found) == dict.fromkeys(
        ("R@1", "R@5", "R@10", "mAP@R", "R-Precision"), 1.0
    )


def test_asymmetry_reports_each_modality_that_has_an_uncertainty():
    text_only = {"rank": np.array([1, 2]), "uncertainty": np.array([0.1, 0.2])}
    both = text_only | {"image_uncertainty": np.array([0.2, 0.1])}
    found = measure({"t2i": text_only, "i2t": both}, 2)["asymmetry"]
    assert found["t2i AUROC by text"] == found["i2t AUROC by text"] == 1.0
    assert found["i2t AUROC by image"] == 0.0
    assert "t2i AUROC by image" not in found


def test_the_sweep_equals_each_number_of_levels_by_itself_and_leaves_out_too_many():
    answers = random_answers(queries=30)
    found = measure({"t2i": answers, "i2t": answers}, 10)["sweep_t2i"]
    assert set(found) == {"S@5", "-S*R2@5", "S@10", "-S*R2@10", "S@20", "-S*R2@20"}
    recall = recall_by_level(answers["rank"] == 1, answers["uncertainty"], 20)
    assert found["S@20"] == pytest.approx(stats.spearmanr(range(20), recall).statistic)


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
    for uncertainty, chain, value in (
        (np.array([0.5, 0.5, 0.5]), [0, 1, 2], 0.0),
        (np.array([0.5]), [0], None),
    ):
        found = hierarchy("steps").measure({"uncertainty": uncertainty, "chains": [chain]})
        assert found == {"falling": value, "tau": value}


def test_rsum_is_the_sum_of_all_recalls_in_per_cent():
    t2i, i2t = np.array([1, 3, 20]), np.array([7, 1])
    expected = 100 * (1 / 3 + 2 / 3 + 2 / 3 + 1 / 2 + 1 / 2 + 1)
    ranks = Section("", "", None, None, RECALL).measure
    assert ranks({"t2i_rank": t2i, "i2t_rank": i2t})["RSUM"] == pytest.approx(expected)
    assert ranks({"t2i_rank": np.array([1, 9]), "i2t_rank": np.array([1])})["RSUM"] == 500.0
