"""Figures of resampled queries in, intervals and p-values out; and some metrics of all resamples at once.

A resample draws as many images as there are, with replacement, each with all its queries: captions of one image are
not independent. Which ones depends on the number of images alone, so that the differences of methods that answered the
same queries are paired. Over several seeds, it also draws as many seeds as there are (`over_seeds`).
Functions of `Resamples` take arrays (Q,), as their namesakes in metrics.py, and give what these give for the drawn
queries, nan for None.
Source: Efron & Tibshirani, "An introduction to the bootstrap", 1993; for clusters Field & Welsh, "Bootstrapping
clustered data", J. R. Stat. Soc. B 69, 2007.
"""

import functools

import numpy as np

RESAMPLES = 1000
LEAST = 100  # resamples, under which a p-value tells nothing
CONFIDENCE = 0.95  # of intervals
AT_ONCE = 8  # resamples, whose counts of 25,000 queries fit into a core's cache


class Resamples:
    """How often every query is drawn in each of R resamples: the same for the same images.

    Args: images (Q,): the image that each query belongs to; resamples: R.
    Attributes: image_of (Q,): the images' numbers, 0..N-1, drawn (R, N): how often each is drawn; a row sums to N.
    """

    def __init__(self, images, resamples):
        _, self.image_of = np.unique(images, return_inverse=True)
        self.drawn = _draw(int(self.image_of.max()) + 1, resamples)

    def __len__(self):
        return len(self.drawn)

    def counts(self, queries=slice(None)):
        """Yield how often some queries are drawn, in their order, a few resamples at a time: (r, q) arrays."""
        for first in range(0, len(self), AT_ONCE):
            yield self.drawn[first : first + AT_ONCE].take(self.image_of[queries], axis=1)

    def __iter__(self):
        """Yield how often every query is drawn, (Q,), resample by resample."""
        return (row for part in self.counts() for row in part)

    def sums(self, values=None):
        """The sum of values (Q,) over the drawn queries in every resample, (R,); without values, their number."""
        return self._drawn_as_floats @ np.bincount(self.image_of, weights=values)

    @functools.cached_property
    def _drawn_as_floats(self):
        return self.drawn.astype(np.float64)


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


def one_by_one(function, resamples, *values):
    """Any function, of the drawn queries of one resample after another: (R,), or a dict of them."""
    drawn = [function(*(np.repeat(v, count) if np.ndim(v) else v for v in values)) for count in resamples]
    if not isinstance(drawn[0], dict):
        return np.array(drawn, dtype=np.float64)
    return {name: np.array([result[name] for result in drawn], dtype=np.float64) for name in drawn[0]}


def mean(resamples, values):
    """The mean of values (Q,) in every resample: (R,)."""
    return resamples.sums(values) / resamples.sums()


def recall_at(resamples, rank, k):
    """`metrics.recall_at` in every resample: (R,)."""
    return mean(resamples, rank <= k)


def by_order(resamples, correct, uncertainty, levels):
    """`metrics.by_order` in every resample, from one pass along the queries in the order of uncertainty: {name: (R,)}.

    After n drawn queries, w of which are wrong, the risk is w / n. Over a run of queries that are all right, all wrong
    or all of one uncertainty, which begins after n0 and w0 and has the error e, its sum is, exactly,
        sum_k (w0 + k e) / (n0 + k) = e (n1 - n0) + (w0 - e n0) (H(n1) - H(n0)),   H(n) = 1 + 1/2 + ... + 1/n.
    """
    order = np.argsort(uncertainty, kind="stable")  # a resample is in order too: nothing is sorted again
    wrong, harmonic = ~correct[order], np.cumsum(np.append(0, 1 / np.arange(1, resamples.sums().max() + 1)))
    ends = np.append(0, _ends_of_runs(wrong, np.asarray(uncertainty)[order]) + 1)  # counts of queries
    both = wrong.astype(np.int64) << 32 | 1  # two counts in one number: of the queries, and of the wrong ones
    level, areas, best, recall = np.arange(levels + 1), [], [], []
    for counts in resamples.counts(order):
        path = np.zeros((len(counts), len(order) + 1), dtype=np.int64)
        np.cumsum(counts * both, axis=1, out=path[:, 1:])
        drawn = path & 0xFFFFFFFF
        bounds = level * (drawn[:, -1:] // levels) + np.minimum(level, drawn[:, -1:] % levels)  # as np.array_split's
        at = np.array([row.searchsorted(bound) for row, bound in zip(drawn, bounds, strict=True)])  # after query at - 1
        beyond = np.take_along_axis(drawn, at, axis=1) - bounds  # so often this query is drawn into the next level
        errors = (np.take_along_axis(path, at, axis=1) >> 32) - wrong[at - 1] * beyond
        recall.append(1 - np.diff(errors) / np.diff(bounds))
        n, w = drawn.take(ends, axis=1), path.take(ends, axis=1) >> 32
        e = np.diff(w) / np.maximum(np.diff(n), 1)  # 0 where nothing of a run is drawn, which adds nothing
        total, errors = n[:, -1], w[:, -1]
        areas.append((errors + ((w[:, :-1] - e * n[:, :-1]) * np.diff(harmonic.take(n))).sum(axis=1)) / total)
        best.append((errors - (total - errors) * (harmonic[total] - harmonic[total - errors])) / total)
    areas, best, recall = map(np.concatenate, (areas, best, recall))
    ranks = (np.sign(recall[:, :, None] - recall[:, None]) / 2).sum(axis=2)  # but for a constant; ties share theirs
    s, r = _correlation_with_level(ranks), _correlation_with_level(recall)
    return {"AURC": areas, "E-AURC": np.maximum(0.0, areas - best), "S": s, "R2": r**2, "-S*R2": -s * r**2}


def _ends_of_runs(wrong, uncertainty):
    """Where runs of queries end, in ascending order: of one uncertainty, or several of them all right or all wrong."""
    ends = np.flatnonzero(np.append(uncertainty[1:] != uncertainty[:-1], True))
    error = np.diff(np.append(0, np.cumsum(wrong)[ends])) / np.diff(np.append(-1, ends))  # of each uncertainty
    goes_on = (error[1:] == error[:-1]) & np.isin(error[1:], (0, 1))
    return ends[np.append(~goes_on, True)]


def _correlation_with_level(values):
    """Pearson correlation of every row (R, K) with 0..K-1."""
    level = np.arange(values.shape[1]) - (values.shape[1] - 1) / 2
    centred = values - values.mean(axis=1, keepdims=True)
    spread = np.where(np.ptp(values, axis=1) == 0, np.nan, np.sqrt((centred**2).sum(axis=1) * (level**2).sum()))
    return centred @ level / spread


def spearman(resamples, x, y):
    """`metrics.spearman` in every resample: (R,)."""
    return _rank_correlations(resamples, x, y)[:, 0, 1]


def partial_spearman(resamples, x, y, given):
    """`metrics.partial_spearman` in every resample: (R,)."""
    xy, xg, yg = _rank_correlations(resamples, x, y, given)[:, [0, 0, 1], [1, 2, 2]].T
    rest = (1 - xg**2) * (1 - yg**2)
    return (xy - xg * yg) / np.sqrt(np.where(rest > 1e-12, rest, np.nan))


def _rank_correlations(resamples, *columns):
    """Spearman correlations of C columns (Q,) with each other: (R, C, C), nan where one is constant."""
    groups = [np.unique(column, return_inverse=True)[1] for column in columns]  # which value, ascending
    correlations = np.empty((len(resamples), len(columns), len(columns)))
    for correlation, count in zip(correlations, resamples, strict=True):
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
