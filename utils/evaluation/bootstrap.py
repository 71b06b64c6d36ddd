"""Figures of resampled queries in, intervals and p-values out; and some metrics of all resamples at once.

A resample draws as many images as there are, with replacement, each with all its queries: captions of one image are
not independent. Which ones depends on the number of images alone, so that the differences of methods that answered the
same queries are paired. Over several seeds, it also draws as many seeds as there are (`over_seeds`).
A function of `counts` (resamples, Q), how often every query is drawn, gives (resamples,) arrays: what its namesake in
metrics.py gives for the drawn queries, nan for None.
Source: Efron & Tibshirani, "An introduction to the bootstrap", 1993; for clusters Field & Welsh, "Bootstrapping
clustered data", J. R. Stat. Soc. B 69, 2007.
"""

import functools

import numpy as np
from scipy import stats

RESAMPLES = 1000
LEAST = 100  # resamples, under which a p-value tells nothing
LEVEL = 0.95


def resample(images, resamples):
    """How often every query is drawn: (resamples, Q), the same at every call.

    Args: images (Q,): the image that each query belongs to.
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
    """The mean over seeds of a figure in every resample, (resamples,), for which the seeds are drawn again as well.

    Args: draws (S, resamples): of S seeds. side: the methods of a comparison draw their seeds independently.
    """
    draws = np.asarray(draws)
    drawn = np.random.default_rng([1, side]).integers(len(draws), size=draws.T.shape)  # (resamples, S)
    return np.take_along_axis(draws.T, drawn, axis=1).mean(axis=1)


def mean(counts, values):
    """The mean of values (Q,)."""
    return np.array([np.average(values, weights=count) for count in counts])


def by_level(counts, correct, uncertainty, levels):
    """`metrics.level_statistics` of `metrics.recall_by_level`."""
    order = np.argsort(uncertainty, kind="stable")  # a resample is in order too: nothing is sorted again
    recall = np.empty((len(counts), levels))
    for row, count in zip(recall, counts, strict=True):
        error = np.repeat(1.0 - correct[order], count[order])
        size, larger = divmod(len(error), levels)  # as np.array_split has it
        sizes = np.full(levels, size) + (np.arange(levels) < larger)
        row[:] = 1 - np.add.reduceat(error, np.cumsum(sizes) - sizes) / sizes
    s, r = _correlation_with_level(stats.rankdata(recall, axis=1)), _correlation_with_level(recall)
    return {"S": s, "R2": r**2, "-S*R2": -s * r**2}


def _correlation_with_level(values):
    """Pearson correlation of every row (resamples, K) with 0..K-1."""
    level = np.arange(values.shape[1]) - (values.shape[1] - 1) / 2
    centred = values - values.mean(axis=1, keepdims=True)
    spread = np.where(np.ptp(values, axis=1) == 0, np.nan, np.sqrt((centred**2).sum(axis=1) * (level**2).sum()))
    return centred @ level / spread


def aurc(counts, correct, uncertainty):
    """`metrics.aurc`."""
    order = np.argsort(uncertainty, kind="stable")
    error = 1.0 - correct[order]
    _, group = np.unique(uncertainty[order], return_inverse=True)
    found = []
    for count in counts[:, order]:
        wrong, queries = np.bincount(group, weights=count * error), np.bincount(group, weights=count)
        expected = np.repeat(wrong / np.maximum(queries, 1), queries.astype(int))
        position, errors = np.arange(1, len(expected) + 1), int(wrong.sum())
        area = np.mean(np.cumsum(expected) / position)
        best = np.sum(np.arange(1, errors + 1) / position[len(expected) - errors :]) / len(expected)
        found.append((area, max(0.0, area - best)))
    return dict(zip(("AURC", "E-AURC"), np.array(found).T, strict=True))


def spearman(counts, x, y):
    """`metrics.spearman`."""
    x, y = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    return np.array([_correlation(_midranks(x, count), _midranks(y, count), count) for count in counts])


def partial_spearman(counts, x, y, given):
    """`metrics.partial_spearman`."""
    xy, xg, yg = spearman(counts, x, y), spearman(counts, x, given), spearman(counts, y, given)
    rest = (1 - xg**2) * (1 - yg**2)
    return (xy - xg * yg) / np.sqrt(np.where(rest > 1e-12, rest, np.nan))


def _midranks(group, count):
    """The ranks in a resample, of equal values the mean one. Args: group (Q,): which value, ascending."""
    size = np.bincount(group, weights=count)
    return (np.cumsum(size) - (size - 1) / 2)[group]


def _correlation(x, y, weight):
    """Pearson correlation under weights; nan where one of them is constant."""
    dx, dy = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    spread = np.sqrt((weight * dx**2).sum() * (weight * dy**2).sum())
    return (weight * dx * dy).sum() / spread if spread > 0 else np.nan


def interval(values):
    """The 95 % percentile interval of a figure's values over resamples: (low, high), or None if one is undefined.

    A resample is noisier than the sample, which can only disturb an even fall of recall: the intervals of S, R2 and
    -S*R2 lie towards the worse side and may leave out the figure itself.
    """
    if not len(values) or np.isnan(values).any():
        return None
    return tuple(float(x) for x in np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))


def p_value(differences):
    """Two-sided: twice (c + 1) / (R + 1), c of R differences having the rarer sign, zeros both; None if undefined.

    Source: Davison & Hinkley, "Bootstrap methods and their application", 1997, eq. 4.11.
    """
    if np.isnan(differences).any():
        return None
    rarer = min(np.sum(differences <= 0), np.sum(differences >= 0))
    return float(min(1.0, 2 * (rarer + 1) / (len(differences) + 1)))
