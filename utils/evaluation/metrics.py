"""Metrics of retrieval and of its uncertainty: arrays in, numbers out.

Q is the number of queries. A query is answered correctly if its first answer is right. It has one
number for its uncertainty; larger means less certain.

Most metrics take an optional `weight` of integers, which says how often each query counts:

- With no weight, or with one of shape (Q,), they return a float, or None if undefined.
- With a weight of shape (R, Q), they return an array (R,), which is NaN where undefined.

A bootstrap resample draws queries with replacement; its weight says how often each was drawn. So
one call with R such weights computes a metric of R resamples (bootstrap.py).
"""

import numpy as np
from numpy.typing import ArrayLike

ROUNDING = 1e-12  # what is smaller is 0 but for rounding
Metric = float | np.ndarray | None  # one number, one per resample (R,), or undefined


def mean(values: ArrayLike, weight: ArrayLike | None = None) -> Metric:
    """The weighted mean of values (Q,).

    >>> mean([1, 2, 6])
    3.0
    """
    values = np.asarray(values, dtype=np.float64)
    weight = _weight_of_queries(weight, len(values))
    total = _sum(weight, values)
    return _result(total / weight.sum(axis=-1))


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
    uncertainty = np.asarray(uncertainty)
    if by == SPACING:
        recall = _recall_by_spacing(correct, uncertainty, levels, weight)
    else:
        recall = _recall_by_count(correct, uncertainty, levels, weight)
    if recall.ndim == 1:
        return recall.tolist()
    return recall


def _recall_by_count(correct, uncertainty, levels, weight):
    order = np.argsort(uncertainty, kind="stable")
    weight = weight[..., order]
    queries_so_far = _cumulative_from_zero(weight)  # (..., Q + 1)
    hits_so_far = _cumulative_from_zero(weight * correct[order])
    bounds = _level_bounds(queries_so_far[..., -1], levels)  # (..., K + 1)
    # A query of weight w counts as w queries. If a bound falls among them, two levels share it.
    hits_at_bounds = _interpolate_rows(bounds, queries_so_far, hits_so_far)
    hits = np.diff(hits_at_bounds)  # (..., K)
    count = np.diff(bounds)
    return hits / count


def _recall_by_spacing(correct, uncertainty, levels, weight):
    bounds = np.linspace(uncertainty.min(), uncertainty.max(), levels + 1)
    level_of_query = np.searchsorted(bounds[1:-1], uncertainty, side="right")
    is_in_level = level_of_query[:, None] == np.arange(levels)  # (Q, K)
    is_hit = is_in_level & correct[:, None]
    count = weight @ is_in_level  # (..., K)
    hits = weight @ is_hit
    return np.where(count > 0, hits / np.maximum(count, 1), np.nan)


def _level_bounds(total, levels):
    """After how many queries the levels begin and end: totals (...) -> (..., levels + 1).

    The first total % levels levels have one query more than the others.
    """
    total = np.asarray(total)[..., None]
    size = total // levels
    remainder = total % levels
    level = np.arange(levels + 1)
    return level * size + np.minimum(level, remainder)


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
    # How many levels have a smaller recall, minus how many have a larger one. Up to scale and
    # offset, to which the correlation is invariant, this is the rank with ties shared.
    sign = np.sign(recall[..., :, None] - recall[..., None, :])  # (..., K, K)
    rank = np.nansum(sign, axis=-1)
    rank_of_level = np.cumsum(is_known, axis=-1)
    return _result(_correlation(rank, rank_of_level, is_known))


def level_r2(recall: ArrayLike) -> Metric:
    """R2: r^2 of the straight line through recall by level, in [0, 1]; 1 is best.

    Args and source as for `level_spearman`.

    >>> level_r2([0.9, 0.6, 0.3])
    1.0
    """
    recall = np.asarray(recall, dtype=np.float64)
    level = np.arange(recall.shape[-1])
    is_known = ~np.isnan(recall)
    correlation = _correlation(np.nan_to_num(recall), level, is_known)
    return _result(correlation**2)


def level_score(recall: ArrayLike) -> Metric:
    """-S*R2, in [-1, 1]; 1 is best. Args and source as for `level_spearman`.

    >>> level_score([0.9, 0.6, 0.3])
    1.0
    """
    spearman_of_levels = level_spearman(recall)
    if spearman_of_levels is None:
        return None
    return -spearman_of_levels * level_r2(recall)


def _correlation(x, y, weight):
    """Pearson correlation of x and y, (..., K) or (K,): (...). It is NaN where one is constant.

    Args: weight: how often each pair counts, (..., K).
    """
    x = _centred(x, weight)
    y = _centred(y, weight)
    spread = np.sqrt(_sum(weight, x**2) * _sum(weight, y**2))
    spread = np.where(spread > ROUNDING, spread, np.nan)
    return np.clip(_sum(weight, x * y) / spread, -1, 1)  # rounding may lead out of the range


def _centred(values, weight):
    """Values minus their weighted mean."""
    mean = _sum(weight, values) / weight.sum(axis=-1)
    return values - mean[..., None]


# Selective prediction: the most certain queries are answered first.


def risk_coverage(correct: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """The risk-coverage curve: the error rate among the n most certain queries, n = 1..Q.

    If several queries have the same uncertainty, every order of them is equally likely; the curve
    is the expectation over these orders.

    Args:
        correct: (Q,) bool.
        uncertainty: (Q,).
    Returns: (Q,) array in [0, 1], most certain first; entry n - 1 is at coverage n / Q.

    >>> risk_coverage(np.array([True, False]), np.array([0.1, 0.2])).tolist()
    [0.0, 0.5]
    """
    risk, _ = _risk_and_weight(correct, uncertainty, None)
    return risk


def aurc(correct: np.ndarray, uncertainty: np.ndarray, weight: ArrayLike | None = None) -> Metric:
    """AURC: the area under the risk-coverage curve, its mean over n, in [0, 1]; lower is better.

    A query of weight w is w queries that all have the risk after the last of them. For large Q this
    is nearly the same as if they came one by one.

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
    """E-AURC: AURC minus that of the best possible order, in [0, 1]; lower is better.

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
    total = weight.sum(axis=-1)  # Q
    right = _sum(weight, np.asarray(correct, dtype=np.float64))  # Q - E
    wrong = total - right  # E
    harmonic_difference = digamma(total + 1) - digamma(right + 1)  # H(Q) - H(Q - E)
    best_area = (wrong - right * harmonic_difference) / total
    return _result(np.maximum(0.0, area - best_area))


def _risk_and_weight(correct, uncertainty, weight):
    """The risk-coverage curve and the weights, both (..., Q), most certain query first."""
    order = np.argsort(uncertainty, kind="stable")
    weight = _weight_of_queries(weight, len(order))
    weight = weight[..., order]
    is_wrong = ~np.asarray(correct, dtype=bool)[order]
    count = _cumulative_from_zero(weight)  # (..., Q + 1)
    errors = _cumulative_from_zero(weight * is_wrong)
    # Queries of weight 0 may come first; the risk is 0 there.
    risk = errors[..., 1:] / np.maximum(count[..., 1:], 1)
    uncertainty = np.asarray(uncertainty)[order]
    first, end = _ties_of(uncertainty, uncertainty)
    tied = np.flatnonzero(end - first > 1)
    risk[..., tied] = _risk_among_ties(errors, count, tied, first[tied], end[tied])
    return risk, weight


def _risk_among_ties(errors, count, query, first, end):
    """The expected risk at queries that have ties, if every order of these is equally likely.

    The errors of a group of tied queries are then spread evenly over it.

    Args:
        errors, count: how many errors and queries come before each query, (..., Q + 1).
        query: T of the queries, (T,).
        first, end: the group of ties of each is `first` to `end` - 1, (T,).
    Returns: (..., T).
    """
    count_before = count[..., first]
    errors_before = errors[..., first]
    errors_of_group = errors[..., end] - errors_before
    error_rate = errors_of_group / np.maximum(count[..., end] - count_before, 1)
    count_so_far = count[..., query + 1]
    expected_errors = errors_before + error_rate * (count_so_far - count_before)
    return expected_errors / np.maximum(count_so_far, 1)


def _ties_of(values, sorted_values):
    """The places that equal values have among sorted ones: `first` to `end` - 1, (Q,) each."""
    first = np.searchsorted(sorted_values, values, side="left")
    end = np.searchsorted(sorted_values, values, side="right")
    return first, end


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
    rank = rank_values(uncertainty)
    smallest_rank_sum = wrong * (wrong + 1) / 2
    pairs_in_order = rank[~correct].sum() - smallest_rank_sum  # Mann-Whitney U
    return float(pairs_in_order / (right * wrong))


def calibration_error(
    probability: np.ndarray, correct: np.ndarray, share: ArrayLike, bins: int
) -> float:
    """ECE: how far the probability p of being right is from the share y of right answers.

    The sum over bins of p of equal width of (share of queries in the bin) * |mean p - mean y|.

    Args:
        probability: that each answer is right, (Q,), in [0, 1].
        correct: (Q,) bool, or 1.0 and 0.0.
        share: of each query in the whole, (Q,), which sums to 1; or a number, for all the same.
    Returns: float in [0, 1], lower is better.
    Source: Guo et al., "On calibration of modern neural networks", arXiv 1706.04599.

    >>> calibration_error(np.array([0.5, 0.5]), np.array([True, True]), 1 / 2, bins=10)
    0.5
    """
    bin_of_query = (probability * bins).astype(int)
    bin_of_query = np.minimum(bin_of_query, bins - 1)  # p = 1 belongs to the last bin
    # The mean difference of a bin times its share is the sum of share * difference.
    difference_of_bin = np.bincount(bin_of_query, weights=share * (probability - correct))
    return float(np.abs(difference_of_bin).sum())


def share_of_ties(uncertainty: ArrayLike) -> float:
    """The share of queries that have the same uncertainty as another query, in [0, 1].

    >>> share_of_ties(np.array([0.1, 0.1, 0.2, 0.3]))
    0.5
    """
    _, group, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    is_tied = count[group] > 1
    return float(is_tied.mean())


# Rank correlations.


def rank_values(values: ArrayLike, weight: ArrayLike | None = None) -> np.ndarray:
    """The rank of each of some values (Q,), 1 = smallest; equal values get their mean rank.

    Args:
        weight: (..., Q): how often each value counts, integers.
    Returns: (..., Q).

    >>> rank_values([0.3, 0.1, 0.3]).tolist()
    [2.5, 1.0, 2.5]
    """
    values = np.asarray(values)
    order = np.argsort(values, kind="stable")
    weight = _weight_of_queries(weight, len(order))
    count = _cumulative_from_zero(weight[..., order])  # (..., Q + 1)
    first, end = _ties_of(values, values[order])
    lowest_rank = count[..., first] + 1
    highest_rank = count[..., end]
    return (lowest_rank + highest_rank) / 2


def spearman(x: ArrayLike, y: ArrayLike, weight: ArrayLike | None = None) -> Metric:
    """Spearman rank correlation of x and y (Q,), in [-1, 1]; undefined if one is constant."""
    weight = _weight_of_queries(weight, len(x))
    return _result(_correlation(rank_values(x, weight), rank_values(y, weight), weight))


def partial_spearman(
    x: ArrayLike, y: ArrayLike, given: ArrayLike, weight: ArrayLike | None = None
) -> Metric:
    """Spearman correlation of x and y (Q,) that a third quantity does not explain, in [-1, 1].

    (r_xy - r_xg r_yg) / sqrt((1 - r_xg^2)(1 - r_yg^2)), where r are the Spearman correlations and
    g is the third quantity, `given` (Q,). Undefined if one of the three is constant, or if g
    determines x or y.
    """
    xy = spearman(x, y, weight)
    xg = spearman(x, given, weight)
    yg = spearman(y, given, weight)
    if xy is None or xg is None or yg is None:
        return None
    unexplained = (1 - xg**2) * (1 - yg**2)
    unexplained = np.where(unexplained > ROUNDING, unexplained, np.nan)  # g determines x or y
    return _result((xy - xg * yg) / np.sqrt(unexplained))


# Chains of texts from general to specific.


def share_falling(uncertainty: ArrayLike, chains: list[list[int]]) -> float | None:
    """The share of the steps along caption chains at which the uncertainty falls.

    Args:
        uncertainty: of T texts, (T,).
        chains: lists of texts, as rows of `uncertainty`, general first. Chains of one text are
            left out.
    Returns: float in [0, 1], or None if there is no step.

    >>> share_falling(np.array([0.9, 0.5, 0.7]), [[0, 1, 2]])
    0.5
    """
    uncertainty = np.asarray(uncertainty)
    steps = [np.diff(uncertainty[chain]) for chain in chains if len(chain) > 1]
    if not steps:
        return None
    falls = np.concatenate(steps) < 0
    return float(falls.mean())


def mean_tau(uncertainty: ArrayLike, chains: list[list[int]]) -> float | None:
    """Kendall's tau-b of depth in the chain and certainty, averaged over chains.

    A chain of constant uncertainty counts as 0.

    Args: as for `share_falling`.
    Returns: float in [-1, 1], 1 = uncertainty always falls; None if there is no chain.

    >>> mean_tau(np.array([0.9, 0.5, 0.7]), [[0, 1, 2]])
    0.33333333333333337
    """
    from scipy.stats import kendalltau

    uncertainty = np.asarray(uncertainty)
    taus = []
    for chain in chains:
        if len(chain) < 2:
            continue
        certainty = -uncertainty[chain]
        if np.ptp(certainty) == 0:
            taus.append(0.0)
        else:
            depth = np.arange(len(chain))
            taus.append(float(kendalltau(depth, certainty).statistic))
    if not taus:
        return None
    return float(np.mean(taus))


def uncertainty_by_depth(uncertainty: ArrayLike, chains: list[list[int]]) -> list[float]:
    """The mean percentile of the uncertainty at each depth of the chains.

    A text's percentile is its rank among all T texts. It can be compared between methods, unlike
    the uncertainty itself.

    Args: as for `share_falling`, but chains of one text count here.
    Returns: one float in [0, 100] per depth, general first.

    >>> uncertainty_by_depth(np.array([0.9, 0.5, 0.7]), [[0, 1], [0, 2]])
    [100.0, 50.0]
    """
    percentile = 100 * rank_values(uncertainty) / len(uncertainty)
    longest = max(map(len, chains), default=0)
    means = []
    for depth in range(longest):
        rows = [chain[depth] for chain in chains if len(chain) > depth]
        means.append(float(percentile[rows].mean()))
    return means


# Weighted sums.


def _weight_of_queries(weight, queries):
    """The weight as an array (..., Q) of integers. Without one, every query counts once.

    Cumulative sums of int32 take a tenth of the time of those of float64.
    """
    if weight is None:
        return np.ones(queries, dtype=np.int32)
    return np.asarray(weight, dtype=np.int32)


def _sum(weight, values):
    """The weighted sum of values (Q,) or (..., Q): (...)."""
    return np.einsum("...q,...q->...", weight, values)


def _cumulative_from_zero(values):
    """Cumulative sums along the last axis, with a 0 before them: (..., Q) -> (..., Q + 1)."""
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1), values.dtype)
    np.cumsum(values, axis=-1, dtype=values.dtype, out=sums[..., 1:])
    return sums


def _interpolate_rows(x, known_x, known_y):
    """np.interp for every row of arrays (..., K), (..., Q) and (..., Q): (..., K)."""
    if x.ndim == 1:
        return np.interp(x, known_x, known_y)
    rows = []
    for row in range(len(x)):
        rows.append(np.interp(x[row], known_x[row], known_y[row]))
    return np.stack(rows)


def _result(value):
    """A single number as a float, or None if it is NaN. An array stays as it is."""
    if np.ndim(value) > 0:
        return value
    if np.isnan(value):
        return None
    return float(value)
