"""Metrics of retrieval and of its uncertainty: arrays in, numbers out.

Q queries were asked. A query is answered correctly if its first answer is right. The uncertainty
is one number per query; larger means less certain.

Most metrics take an optional `weight` of integers, which says how often each query counts:

- With no weight, or with one of shape (Q,), they return a float, or None if undefined.
- With a weight of shape (R, Q), they return an array (R,), which is NaN where undefined.

A bootstrap resample of the queries is such a weight. So the same function computes a metric and
its resamples (bootstrap.py).
"""

import numpy as np
from numpy.typing import ArrayLike

Metric = float | np.ndarray | None


def mean(values: ArrayLike, weight: ArrayLike | None = None) -> Metric:
    """The weighted mean of values (Q,).

    >>> mean([1, 2, 6])
    3.0
    """
    values = np.asarray(values, dtype=np.float64)
    weight = _weight_of_queries(weight, len(values))
    return _result(_sum(weight, values) / weight.sum(axis=-1))


def recall_at(rank: ArrayLike, k: int, weight: ArrayLike | None = None) -> Metric:
    """Recall@k: the share of queries with a right answer among the first k, in [0, 1].

    Args:
        rank: rank of the first right answer of each query, (Q,); 1 is the best.

    >>> recall_at([1, 2, 7, 1], 5)
    0.75
    """
    return mean(np.asarray(rank) <= k, weight)


def rsum(*ranks: np.ndarray) -> float:
    """RSUM: R@1, R@5 and R@10 in percent, summed over several arrays of ranks (Q,)."""
    total = 0.0
    for rank in ranks:
        for k in (1, 5, 10):
            total += 100 * recall_at(rank, k)
    return total


# Recall by uncertainty level.


COUNT = "count"
SPACING = "spacing"


def recall_by_level(
    correct: np.ndarray,
    uncertainty: np.ndarray,
    levels: int,
    weight: ArrayLike | None = None,
    by: str = COUNT,
) -> list[float] | np.ndarray:
    """R@1 in each uncertainty level, least uncertain first.

    By COUNT, queries are sorted by uncertainty (ties keep the order of the queries) and cut into
    levels of equal size. No query is dropped: a remainder makes the first levels larger by one.
    (The paper's code drops the remainder.) With a weight, a query that counts several times may be
    shared by two levels.

    By SPACING, levels are intervals of uncertainty of equal width, from the smallest to the
    largest. A level without a query is NaN.

    Args:
        correct: (Q,) bool.
        uncertainty: (Q,).
        levels: K.
    Returns: a list of K floats in [0, 1]; with a weight (R, Q), an array (R, K).
    Raises: ValueError if K > Q or K < 1.
    Source: the protocol of ProbVLM (arXiv 2307.00398, sec. 4.1). The paper's repository cuts by
        count, the code of ProbVLM by spacing.

    >>> recall_by_level(np.array([True, False, True, True]), np.array([0.3, 0.9, 0.1, 0.5]), 2)
    [1.0, 0.5]
    """
    queries = len(correct)
    if not 1 <= levels <= queries:
        raise ValueError(f"{levels} levels for {queries} queries")
    correct = np.asarray(correct, dtype=bool)
    weight = _weight_of_queries(weight, queries)
    cut = _recall_by_spacing if by == SPACING else _recall_by_count
    recall = cut(correct, np.asarray(uncertainty), levels, weight)
    return recall.tolist() if recall.ndim == 1 else recall


def _recall_by_count(correct, uncertainty, levels, weight):
    order = np.argsort(uncertainty, kind="stable")
    weight_in_order = weight[..., order]
    count = _cumulative_from_zero(weight_in_order)  # (..., Q + 1): queries so far
    hits = _cumulative_from_zero(weight_in_order * correct[order])
    bounds = _level_bounds(count[..., -1], levels)  # (..., K + 1)
    hits_at_bounds = _interpolate_rows(bounds, count, hits)
    return np.diff(hits_at_bounds) / np.diff(bounds)


def _recall_by_spacing(correct, uncertainty, levels, weight):
    inner_bounds = np.linspace(uncertainty.min(), uncertainty.max(), levels + 1)[1:-1]
    level_of_query = np.searchsorted(inner_bounds, uncertainty, side="right")
    is_in_level = level_of_query[:, None] == np.arange(levels)  # (Q, K)
    count = weight @ is_in_level  # (..., K)
    hits = weight @ (is_in_level & correct[:, None])
    return np.where(count > 0, hits / np.maximum(count, 1), np.nan)


def _level_bounds(total, levels):
    """After how many queries the levels begin and end: totals (...) -> (..., levels + 1)."""
    level = np.arange(levels + 1)
    total = np.asarray(total)[..., None]
    return level * (total // levels) + np.minimum(level, total % levels)


def level_spearman(recall: ArrayLike) -> Metric:
    """S: the Spearman correlation of level and recall, in [-1, 1]; -1 is best.

    Args:
        recall: (..., K), least uncertain level first, as `recall_by_level` returns it. Levels
            without a query (NaN) are left out.
    Returns: undefined if there is one level, or if recall is the same in all levels.
    Source: ProbVLM, sec. 4.1.

    >>> level_spearman([0.9, 0.6, 0.3])
    -1.0
    """
    recall = np.asarray(recall, dtype=np.float64)
    is_known = ~np.isnan(recall)
    # The rank of a value, up to a constant: how many are smaller minus how many are larger.
    is_larger = np.sign(recall[..., :, None] - recall[..., None, :])
    rank = np.nansum(is_larger, axis=-1)
    rank_of_level = np.cumsum(is_known, axis=-1)
    return _result(_correlation(np.where(is_known, rank, np.nan), rank_of_level))


def level_r2(recall: ArrayLike) -> Metric:
    """R2: r^2 of the straight line through recall by level, in [0, 1]; 1 is best.

    Args and source as for `level_spearman`.

    >>> level_r2([0.9, 0.6, 0.3])
    1.0
    """
    recall = np.asarray(recall, dtype=np.float64)
    return _result(_correlation(recall, np.arange(recall.shape[-1])) ** 2)


def level_score(recall: ArrayLike) -> Metric:
    """-S*R2, in [-1, 1]; 1 is best. Args and source as for `level_spearman`.

    >>> level_score([0.9, 0.6, 0.3])
    1.0
    """
    spearman_of_levels = level_spearman(recall)
    if spearman_of_levels is None:
        return None
    return -spearman_of_levels * level_r2(recall)


def _correlation(values, position):
    """Pearson correlation of values (..., K) with positions (..., K) or (K,): (...).

    Values that are NaN are left out. The result is NaN where the others are constant.
    """
    is_known = ~np.isnan(values)
    is_constant = np.nanmax(values, axis=-1) == np.nanmin(values, axis=-1)
    centred = _centred(values, is_known)
    centred_position = _centred(position, is_known)
    spread = np.sqrt((centred**2).sum(axis=-1) * (centred_position**2).sum(axis=-1))
    correlation = (centred * centred_position).sum(axis=-1) / np.where(is_constant, np.nan, spread)
    return np.clip(correlation, -1, 1)  # rounding


def _centred(values, is_known):
    """Values minus the mean of those that are known; 0 where they are not."""
    values = np.where(is_known, values, 0.0)
    mean_of_known = values.sum(axis=-1, keepdims=True) / is_known.sum(axis=-1, keepdims=True)
    return np.where(is_known, values - mean_of_known, 0.0)


# Selective prediction: the most certain queries are answered first.


def risk_coverage(
    correct: np.ndarray, uncertainty: np.ndarray, weight: ArrayLike | None = None
) -> np.ndarray:
    """The risk-coverage curve: the error rate among the n most certain queries, n = 1..Q.

    If several queries have the same uncertainty, every order of them is equally likely; the curve
    is the expectation over these orders.

    Args:
        correct: (Q,) bool.
        uncertainty: (Q,).
    Returns: (Q,) array in [0, 1], most certain first; entry n - 1 is at coverage n / Q. With a
        weight (R, Q), an array (R, Q), in the same order of the queries.

    >>> risk_coverage(np.array([True, False]), np.array([0.1, 0.2])).tolist()
    [0.0, 0.5]
    """
    risk, _ = _risk_and_weight(correct, uncertainty, weight)
    return risk


def aurc(correct: np.ndarray, uncertainty: np.ndarray, weight: ArrayLike | None = None) -> Metric:
    """AURC: the area under the risk-coverage curve, its mean over n, in [0, 1]; less is better.

    Args:
        correct: (Q,) bool.
        uncertainty: (Q,).
    Source: Geifman et al., "Bias-reduced uncertainty estimation", arXiv 1805.08206.

    >>> aurc(np.array([True, False]), np.array([0.1, 0.2]))
    0.25
    >>> aurc(np.array([True, False]), np.array([0.5, 0.5]))
    0.5
    """
    risk, weight = _risk_and_weight(correct, uncertainty, weight)
    area = _sum(weight, risk) / weight.sum(axis=-1)
    return _result(area)


def excess_aurc(area: Metric, correct: np.ndarray, weight: ArrayLike | None = None) -> Metric:
    """E-AURC: AURC minus that of the best possible order, in [0, 1]; less is better.

    The best order puts all E wrong answers last. Its AURC is
    (1 / Q) sum_{k=1..E} k / (Q - E + k) = (E - (Q - E) (H(Q) - H(Q - E))) / Q,
    where H(n) = 1 + 1/2 + ... + 1/n = digamma(n + 1) + constant.

    Args:
        area: AURC of the same queries and weight.
        correct: (Q,) bool.
    Source: as for `aurc`.

    >>> excess_aurc(0.5, np.array([True, False]))
    0.25
    """
    from scipy.special import digamma

    weight = _weight_of_queries(weight, len(correct))
    total = weight.sum(axis=-1)
    right = _sum(weight, np.asarray(correct, dtype=np.float64))
    wrong = total - right
    best = (wrong - right * (digamma(total + 1) - digamma(right + 1))) / total
    return _result(np.maximum(0.0, area - best))


def _risk_and_weight(correct, uncertainty, weight):
    """The risk-coverage curve and the weights, both (..., Q), most certain query first."""
    order = np.argsort(uncertainty, kind="stable")
    weight = _weight_of_queries(weight, len(order))[..., order]
    is_wrong = ~np.asarray(correct, dtype=bool)[order]
    wrong = weight * is_wrong
    sorted_uncertainty = np.asarray(uncertainty)[order]
    is_last = np.append(sorted_uncertainty[1:] != sorted_uncertainty[:-1], True)  # of its value
    if not is_last.all():
        wrong = _share_among_ties(wrong, weight, is_last)
    count = _cumulative(weight)
    risk = _cumulative(wrong) / np.maximum(count, 1)  # 0 before the first that counts
    return risk, weight


def _share_among_ties(wrong, weight, is_last):
    """Spread the errors (..., Q) of each group of tied queries evenly over the group."""
    group = np.append(0, np.cumsum(is_last)[:-1])
    first = np.flatnonzero(np.append(True, is_last[:-1]))  # of each group
    wrong_in_group = np.add.reduceat(wrong, first, axis=-1)
    weight_of_group = np.add.reduceat(weight, first, axis=-1)
    error_rate = wrong_in_group / np.maximum(weight_of_group, 1)
    return weight * error_rate[..., group]


def auroc(correct: np.ndarray, uncertainty: np.ndarray) -> float | None:
    """The probability that a wrong answer is less certain than a right one; ties count half.

    Args:
        correct: (Q,) bool.
        uncertainty: (Q,).
    Returns: float in [0, 1], 0.5 = no information; None if all are right or all are wrong.

    >>> auroc(np.array([True, False, True]), np.array([0.1, 0.2, 0.3]))
    0.5
    """
    correct = np.asarray(correct, dtype=bool)
    right = int(correct.sum())
    wrong = len(correct) - right
    if right == 0 or wrong == 0:
        return None
    rank_sum = rank_values(uncertainty)[~correct].sum()
    pairs_in_order = rank_sum - wrong * (wrong + 1) / 2  # Mann-Whitney U
    return float(pairs_in_order / (right * wrong))


def share_of_ties(uncertainty: ArrayLike) -> float:
    """The share of queries whose uncertainty another query has too, in [0, 1].

    >>> share_of_ties(np.array([0.1, 0.1, 0.2, 0.3]))
    0.5
    """
    _, group, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    return float((count[group] > 1).mean())


# Rank correlations.


def rank_values(values: ArrayLike, weight: ArrayLike | None = None) -> np.ndarray:
    """The rank of each of some values (Q,), 1 = smallest; equal values get their mean rank.

    Args:
        weight: (..., Q): how often each value counts, integers.
    Returns: (..., Q).

    >>> rank_values([0.3, 0.1, 0.3]).tolist()
    [2.5, 1.0, 2.5]
    """
    order = np.argsort(values, kind="stable")
    sorted_values = np.asarray(values)[order]
    is_first = np.append(True, sorted_values[1:] != sorted_values[:-1])
    weight_in_order = _weight_of_queries(weight, len(order))[..., order]
    first_of_value = np.flatnonzero(is_first)
    count = np.add.reduceat(weight_in_order, first_of_value, axis=-1)  # per distinct value
    rank_of_value = _cumulative(count) - (count - 1) / 2
    group = np.empty(len(order), dtype=np.int64)
    group[order] = np.cumsum(is_first) - 1
    return rank_of_value[..., group]


def spearman(x: ArrayLike, y: ArrayLike, weight: ArrayLike | None = None) -> Metric:
    """Spearman rank correlation of x and y (Q,), in [-1, 1]; undefined if one is constant."""
    weight = _weight_of_queries(weight, len(x))
    total = weight.sum(axis=-1)
    mean_rank = (total + 1)[..., None] / 2
    x_rank = rank_values(x, weight) - mean_rank
    y_rank = rank_values(y, weight) - mean_rank
    covariance = (weight * x_rank * y_rank).sum(axis=-1)
    x_variance = (weight * x_rank**2).sum(axis=-1)
    y_variance = (weight * y_rank**2).sum(axis=-1)
    spread = np.sqrt(x_variance * y_variance)
    return _result(covariance / np.where(spread > 0, spread, np.nan))


def partial_spearman(
    x: ArrayLike, y: ArrayLike, given: ArrayLike, weight: ArrayLike | None = None
) -> Metric:
    """Spearman correlation of x and y (Q,) that a third quantity does not explain, in [-1, 1].

    (r_xy - r_xg r_yg) / sqrt((1 - r_xg^2)(1 - r_yg^2)), with r the Spearman correlations and g the
    given quantity (Q,). Undefined if one of the three is constant, or if g determines x or y.
    """
    xy = spearman(x, y, weight)
    xg = spearman(x, given, weight)
    yg = spearman(y, given, weight)
    if xy is None or xg is None or yg is None:
        return None
    unexplained = np.asarray((1 - xg**2) * (1 - yg**2))
    unexplained = np.where(unexplained > 1e-12, unexplained, np.nan)
    return _result((xy - xg * yg) / np.sqrt(unexplained))


# Chains of texts from general to specific.


def share_falling(uncertainty: ArrayLike, chains: list[list[int]]) -> float | None:
    """The share of the steps along caption chains at which the uncertainty falls.

    Args:
        uncertainty: (T,).
        chains: lists of rows, general first; chains of one text are left out.
    Returns: float in [0, 1], or None if there is no step.

    >>> share_falling(np.array([0.9, 0.5, 0.7]), [[0, 1, 2]])
    0.5
    """
    uncertainty = np.asarray(uncertainty)
    steps = [np.diff(uncertainty[chain]) for chain in chains if len(chain) > 1]
    if not steps:
        return None
    return float((np.concatenate(steps) < 0).mean())


def mean_tau(uncertainty: ArrayLike, chains: list[list[int]]) -> float | None:
    """Kendall's tau-b of depth and certainty, averaged over chains.

    A chain of constant uncertainty counts 0.

    Args: as for `share_falling`.
    Returns: float in [-1, 1], 1 = uncertainty always falls; None if there is no chain.

    >>> mean_tau(np.array([0.9, 0.5, 0.7]), [[0, 1, 2]])
    0.33333333333333337
    """
    from scipy.stats import kendalltau

    taus = []
    for chain in chains:
        values = np.asarray(uncertainty)[chain]
        if len(values) < 2:
            continue
        if np.ptp(values) == 0:
            taus.append(0.0)
        else:
            taus.append(float(kendalltau(np.arange(len(values)), -values).statistic))
    return float(np.mean(taus)) if taus else None


def uncertainty_by_depth(uncertainty: ArrayLike, chains: list[list[int]]) -> list[float]:
    """How the uncertainty falls with depth, as percentiles, so that methods can be compared.

    Args: as for `share_falling`.
    Returns: one float per depth, general first: the mean percentile, in [0, 100], of the texts at
        this depth among all T texts.

    >>> uncertainty_by_depth(np.array([0.9, 0.5, 0.7]), [[0, 1], [0, 2]])
    [100.0, 50.0]
    """
    percentile = 100 * rank_values(uncertainty) / len(uncertainty)
    deepest = max(map(len, chains), default=0)
    means = []
    for depth in range(deepest):
        rows = [chain[depth] for chain in chains if len(chain) > depth]
        means.append(float(percentile[rows].mean()))
    return means


# Weights.


def _weight_of_queries(weight, queries):
    """The weight as an array (..., Q) of integers; without one every query counts once.

    Cumulative sums of int32 take a tenth of the time of those of float64.
    """
    if weight is None:
        return np.ones(queries, dtype=np.int32)
    return np.asarray(weight, dtype=np.int32)


def _sum(weight, values):
    """The weighted sum of values (Q,) or (..., Q): (...). For long rows, `@` is slower."""
    return (weight * values).sum(axis=-1)


def _cumulative(values):
    """Cumulative sums along the last axis, (..., Q). They stay int32, if values are."""
    return np.cumsum(values, axis=-1, dtype=values.dtype)


def _cumulative_from_zero(values):
    """Cumulative sums along the last axis, with a 0 before them: (..., Q) -> (..., Q + 1)."""
    zero = np.zeros((*values.shape[:-1], 1), values.dtype)
    return np.concatenate([zero, _cumulative(values)], axis=-1)


def _interpolate_rows(x, known_x, known_y):
    """np.interp for every row of arrays (..., K), (..., Q) and (..., Q): (..., K)."""
    if x.ndim == 1:
        return np.interp(x, known_x, known_y)
    rows = [np.interp(*row) for row in zip(x, known_x, known_y, strict=True)]
    return np.stack(rows)


def _result(value):
    """A single number as a float, or None for NaN; an array stays an array."""
    if np.ndim(value) > 0:
        return value
    return None if np.isnan(value) else float(value)
