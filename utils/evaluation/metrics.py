"""Retrieval and its uncertainty in numbers: arrays in, plain floats out. None stands for "undefined".

Uncertainty is one number a query, larger = less certain. A query is answered correctly if its first answer is right.
"""

import numpy as np

from utils.lazy import Lazy

stats = Lazy("scipy.stats")  # half a second to import, for caption chains alone


def recall_at(rank, k):
    """Share of queries whose first right answer, of rank (Q,), is among the best k; in [0, 1].

    >>> recall_at(np.array([1, 2, 7, 1]), 5)
    0.75
    """
    return float(np.mean(np.asarray(rank) <= k))


def recall_by_level(correct, uncertainty, levels):
    """R@1 of equally many queries a level, least uncertain level first.

    Queries are sorted (ties stay in query order) and split; a remainder makes the first levels one query larger.
    Args: correct (Q,) bool, uncertainty (Q,), levels: K.
    Returns: list of K floats.
    Raises: ValueError if K > Q or K < 1.
    Source: the protocol of ProbVLM (arXiv 2307.00398, sec. 4.1).
    >>> recall_by_level(np.array([True, False, True, True]), np.array([0.3, 0.9, 0.1, 0.5]), 2)
    [1.0, 0.5]
    """
    if not 1 <= levels <= len(correct):
        raise ValueError(f"{levels} levels for {len(correct)} queries")
    order = np.argsort(uncertainty, kind="stable")
    return [float(part.mean()) for part in np.array_split(np.asarray(correct, dtype=np.float64)[order], levels)]


def level_statistics(recall):
    """How steadily recall falls with the uncertainty level.

    S is the Spearman correlation of level and recall, -1 is best; R2 is r^2 of the straight line; of -S*R2, 1 is best.
    Args: recall: K floats, least uncertain first.
    Returns: dict of three floats, None where undefined: fewer than two levels, or the same recall in all.
    Source: ProbVLM, sec. 4.1.
    >>> level_statistics([0.9, 0.6, 0.3])
    {'S': -1.0, 'R2': 1.0, '-S*R2': 1.0}
    """
    if len(recall) < 2 or np.ptp(recall) == 0:
        return {"S": None, "R2": None, "-S*R2": None}
    level = np.arange(len(recall))
    s, r2 = spearman(level, recall), float(np.corrcoef(level, recall)[0, 1] ** 2)
    return {"S": s, "R2": r2, "-S*R2": -s * r2}


def by_level(correct, uncertainty, levels):
    """`level_statistics` of `recall_by_level`."""
    return level_statistics(recall_by_level(correct, uncertainty, levels))


def by_order(correct, uncertainty, levels):
    """What depends on the order of uncertainty: `aurc` and `by_level` in one dict."""
    return aurc(correct, uncertainty) | by_level(correct, uncertainty, levels)


def aurc(correct, uncertainty):
    """Area under the risk-coverage curve, its mean over n, and its excess over the best possible order's area.

    Args: correct (Q,) bool, uncertainty (Q,).
    Returns: dict of two floats in [0, 1], less is better.
    Source: Geifman et al., "Bias-reduced uncertainty estimation", arXiv 1805.08206.
    >>> aurc(np.array([True, False]), np.array([0.1, 0.2]))
    {'AURC': 0.25, 'E-AURC': 0.0}
    >>> aurc(np.array([True, False]), np.array([0.5, 0.5]))
    {'AURC': 0.5, 'E-AURC': 0.25}
    """
    area = float(np.mean(risk_coverage(correct, uncertainty)))
    best = float(np.mean(risk_coverage(correct, ~np.asarray(correct, dtype=bool))))
    return {"AURC": area, "E-AURC": max(0.0, area - best)}


def risk_coverage(correct, uncertainty):
    """The risk-coverage curve: the error rate among the n most certain queries, n = 1..Q.

    Of queries with the same uncertainty every order is equally likely, and the expectation is returned.
    Args: correct (Q,) bool, uncertainty (Q,).
    Returns: (Q,) array in [0, 1]; entry n - 1 is at coverage n / Q.
    >>> risk_coverage(np.array([True, False]), np.array([0.1, 0.2])).tolist()
    [0.0, 0.5]
    """
    error = 1.0 - np.asarray(correct, dtype=np.float64)
    _, group = np.unique(uncertainty, return_inverse=True)
    expected = (np.bincount(group, weights=error) / np.bincount(group))[np.sort(group)]
    return np.cumsum(expected) / np.arange(1, len(error) + 1)


def auroc(correct, uncertainty):
    """The probability that a wrong answer is less certain than a right one, ties counting half.

    Args: correct (Q,) bool, uncertainty (Q,).
    Returns: float in [0, 1], 0.5 = no information; None where all are right or all wrong.
    >>> auroc(np.array([True, False, True]), np.array([0.1, 0.2, 0.3]))
    0.5
    """
    correct = np.asarray(correct, dtype=bool)
    right, wrong = int(correct.sum()), int((~correct).sum())
    if not right or not wrong:
        return None
    ranks = rank_values(uncertainty)
    return float((ranks[~correct].sum() - wrong * (wrong + 1) / 2) / (right * wrong))


def share_falling(uncertainty, chains):
    """The share of the steps along chains of texts, from general to specific, at which uncertainty falls.

    Args: uncertainty (T,), chains: lists of rows, general first; those of one text are left out.
    Returns: float in [0, 1], or None without a step.
    >>> share_falling(np.array([0.9, 0.5, 0.7]), [[0, 1, 2]])
    0.5
    """
    steps = [np.diff(np.asarray(uncertainty)[chain]) < 0 for chain in chains if len(chain) > 1]
    return float(np.concatenate(steps).mean()) if steps else None


def mean_tau(uncertainty, chains):
    """Kendall's tau-b of depth and certainty, averaged over chains; a chain of constant uncertainty counts 0.

    Args: as for `share_falling`.
    Returns: float in [-1, 1], 1 = always falls; None without a chain.
    >>> mean_tau(np.array([0.9, 0.5, 0.7]), [[0, 1, 2]])
    0.33333333333333337
    """
    values = [np.asarray(uncertainty)[chain] for chain in chains if len(chain) > 1]
    taus = [0.0 if np.ptp(u) == 0 else float(stats.kendalltau(np.arange(len(u)), -u).statistic) for u in values]
    return float(np.mean(taus)) if taus else None


def uncertainty_by_depth(uncertainty, chains):
    """How uncertainty falls with depth, in ranks, so that methods can be compared.

    Args: as for `share_falling`.
    Returns: a float a depth, general first: the mean percentile, in [0, 100], of its texts among all T.
    >>> uncertainty_by_depth(np.array([0.9, 0.5, 0.7]), [[0, 1], [0, 2]])
    [100.0, 50.0]
    """
    percentile = 100 * rank_values(uncertainty) / len(uncertainty)
    depths = range(max(map(len, chains), default=0))
    return [float(np.mean([percentile[chain[depth]] for chain in chains if len(chain) > depth])) for depth in depths]


def share_of_ties(uncertainty):
    """The share of queries whose uncertainty another query has too, in [0, 1].

    >>> share_of_ties(np.array([0.1, 0.1, 0.2, 0.3]))
    0.5
    """
    _, group, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    return float((count[group] > 1).mean())


def rank_values(values):
    """The rank of each of some values (Q,), 1 = least; equal ones have the mean of their ranks.

    >>> rank_values([0.3, 0.1, 0.3]).tolist()
    [2.5, 1.0, 2.5]
    """
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[group]


def spearman(x, y):
    """Spearman rank correlation of x and y (Q,), in [-1, 1], or None if one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(rank_values(x), rank_values(y))[0, 1])


def partial_spearman(x, y, given):
    """Spearman correlation of x and y (Q,) that a third quantity does not explain, in [-1, 1], or None where undefined.

    (r_xy - r_xg r_yg) / sqrt((1 - r_xg^2)(1 - r_yg^2))
    """
    xy, xg, yg = spearman(x, y), spearman(x, given), spearman(y, given)
    if None in (xy, xg, yg) or (1 - xg**2) * (1 - yg**2) <= 1e-12:
        return None
    return float((xy - xg * yg) / np.sqrt((1 - xg**2) * (1 - yg**2)))
