"""Figures of resampled queries in, intervals and p-values out; and some metrics of all resamples at once.

A resample draws as many images as there are, with replacement, each with all its queries: captions of one image are
not independent. Which ones depends on the number of images alone, so that the differences of methods that answered the
same queries are paired. Over several seeds, it also draws as many seeds as there are (`over_seeds`).
`counts` (resamples, Q) say how often every query is drawn. Functions of them take arrays (Q,), as their namesakes in
metrics.py, and give what these give for the drawn queries, nan for None.
Source: Efron & Tibshirani, "An introduction to the bootstrap", 1993; for clusters Field & Welsh, "Bootstrapping
clustered data", J. R. Stat. Soc. B 69, 2007.
"""

import functools

import numpy as np
from scipy import stats

RESAMPLES = 1000
LEAST = 100  # resamples, under which a p-value tells nothing
CONFIDENCE = 0.95  # of intervals


def resample(images, resamples):
    """How often every query is drawn: the same at every call.

    Args: images (Q,): the image that each query belongs to.
    Returns: counts (resamples, Q).
    """
    _, group = np.unique(images, return_inverse=True)
    return _draw(int(group.max()) + 1, resamples)[:, group]


@functools.lru_cache(maxsize=4)
def _draw(items, resamples):
    """How often each of some items is drawn: (resamples, items); a row sums to items."""
    rng = np.random.default_rng(0)
    counts = np.empty((resamples, items), dtype=np.uint16)
    for row in counts:
        row[:] = np.bincount(rng.integers(items, size=items), minlength=items)
    return counts


def over_seeds(draws, side=0):
    """The mean over seeds of a figure in every resample, for which the seeds are drawn again as well.

    Args:
        draws (S, resamples): of S seeds.
        side: of a comparison, 0 or 1: its methods draw their seeds independently.
    Returns: (resamples,) array.
    """
    draws = np.asarray(draws)
    drawn = np.random.default_rng([1, side]).integers(len(draws), size=draws.T.shape)  # (resamples, S)
    return np.take_along_axis(draws.T, drawn, axis=1).mean(axis=1)


def one_by_one(function, counts, *values):
    """Any function, of the drawn queries of one resample after another: (resamples,), or a dict of them."""
    drawn = [function(*(np.repeat(v, count) if np.ndim(v) else v for v in values)) for count in counts]
    if not isinstance(drawn[0], dict):
        return np.array(drawn, dtype=np.float64)
    return {name: np.array([result[name] for result in drawn], dtype=np.float64) for name in drawn[0]}


def mean(counts, values):
    """The mean of values (Q,) in every resample: (resamples,)."""
    return np.array([count @ values for count in counts]) / counts.sum(axis=1)


def recall_at(counts, rank, k):
    """`metrics.recall_at` in every resample: (resamples,)."""
    return mean(counts, np.float64(rank <= k))


def by_level(counts, correct, uncertainty, levels):
    """`metrics.level_statistics` of `metrics.recall_by_level` in every resample: {name: (resamples,)}."""
    order = np.argsort(uncertainty, kind="stable")  # a resample is in order too: nothing is sorted again
    recall, error = np.empty((len(counts), levels)), 1.0 - correct[order]
    for row, count in zip(recall, counts[:, order], strict=True):
        errors = np.repeat(error, count)
        size, larger = divmod(len(errors), levels)  # as np.array_split has it
        sizes = np.full(levels, size) + (np.arange(levels) < larger)
        row[:] = 1 - np.add.reduceat(errors, np.cumsum(sizes) - sizes) / sizes
    s, r = _correlation_with_level(stats.rankdata(recall, axis=1)), _correlation_with_level(recall)
    return {"S": s, "R2": r**2, "-S*R2": -s * r**2}


def _correlation_with_level(values):
    """Pearson correlation of every row (resamples, K) with 0..K-1."""
    level = np.arange(values.shape[1]) - (values.shape[1] - 1) / 2
    centred = values - values.mean(axis=1, keepdims=True)
    spread = np.where(np.ptp(values, axis=1) == 0, np.nan, np.sqrt((centred**2).sum(axis=1) * (level**2).sum()))
    return centred @ level / spread


def aurc(counts, correct, uncertainty):
    """`metrics.aurc` in every resample: {name: (resamples,)}."""
    order = np.argsort(uncertainty, kind="stable")
    error, (_, starts) = 1.0 - correct[order], np.unique(uncertainty[order], return_index=True)
    position, draws = np.arange(1, counts.sum(axis=1).max() + 1), np.empty((2, len(counts)))
    for draw, count in zip(draws.T, counts[:, order], strict=True):
        wrong = np.add.reduceat(count * error, starts)  # among the queries of one uncertainty
        queries = np.add.reduceat(count, starts, dtype=np.int64)
        expected = np.repeat(wrong / np.maximum(queries, 1), queries)
        size, errors = len(expected), int(wrong.sum())
        area = np.mean(np.cumsum(expected) / position[:size])
        best = np.sum(position[:errors] / position[size - errors : size]) / size
        draw[:] = area, max(0.0, area - best)
    return {"AURC": draws[0], "E-AURC": draws[1]}


def spearman(counts, x, y):
    """`metrics.spearman` in every resample: (resamples,)."""
    return _rank_correlations(counts, x, y)[:, 0, 1]


def partial_spearman(counts, x, y, given):
    """`metrics.partial_spearman` in every resample: (resamples,)."""
    xy, xg, yg = _rank_correlations(counts, x, y, given)[:, [0, 0, 1], [1, 2, 2]].T
    rest = (1 - xg**2) * (1 - yg**2)
    return (xy - xg * yg) / np.sqrt(np.where(rest > 1e-12, rest, np.nan))


def _rank_correlations(counts, *columns):
    """Spearman correlations of C columns (Q,) with each other: (resamples, C, C), nan where one is constant."""
    groups = [np.unique(column, return_inverse=True)[1] for column in columns]  # which value, ascending
    correlations = np.empty((len(counts), len(columns), len(columns)))
    for correlation, count in zip(correlations, counts, strict=True):
        sizes = [np.bincount(group, weights=count) for group in groups]
        ranks = [(np.cumsum(size) - (size - 1) / 2)[group] for group, size in zip(groups, sizes, strict=True)]
        centred = np.stack(ranks) - (count.sum() + 1) / 2  # of equal values the mean rank
        covariance = (count * centred) @ centred.T
        variance = np.where(np.diag(covariance) > 0, np.diag(covariance), np.nan)
        correlation[:] = covariance / np.sqrt(np.outer(variance, variance))
    return correlations


def interval(values):
    """The 95 % percentile interval of a figure's values over resamples: (low, high), or None if one is undefined.

    A resample is noisier than the sample, which can only disturb an even fall of recall: the intervals of S, R2 and
    -S*R2 lie towards the worse side and may leave out the figure itself.
    """
    if not len(values) or np.isnan(values).any():
        return None
    return tuple(float(x) for x in np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))


def p_value(differences):
    """Two-sided: twice (c + 1) / (R + 1), c of R differences having the rarer sign, zeros both; None if one is nan.

    Source: Davison & Hinkley, "Bootstrap methods and their application", 1997, eq. 4.11.
    """
    if np.isnan(differences).any():
        return None
    rarer = min(np.sum(differences <= 0), np.sum(differences >= 0))
    return float(min(1.0, 2 * (rarer + 1) / (len(differences) + 1)))
