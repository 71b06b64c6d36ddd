"""The answers to queries in, how far every figure would move with other queries out: percentile intervals and paired differences.

Every resample draws as many queries as there are, with replacement. Which ones depends on the number of queries alone, so that two methods that
answered the same queries are resampled alike and their differences are paired. Source: Efron & Tibshirani, "An introduction to the bootstrap", 1993.
"""

import numpy as np
from scipy import stats

RESAMPLES = 1000
LEVEL = 0.95


def resample(queries, resamples):
    """How often every query is drawn. Args: queries: Q. Yields: resamples arrays (Q,) of counts that sum to Q; the same ones at every call."""
    rng = np.random.default_rng(0)
    for _ in range(resamples):
        yield np.bincount(rng.integers(queries, size=queries), minlength=queries)


def bootstrap_retrieval(answers, levels, resamples=RESAMPLES):
    """Every figure of `metrics.retrieval_metrics`, for every resample of the queries.

    Args: answers: "t2i" or "i2t" of `metrics.rank_queries`. levels: K. Returns: {figure: (resamples,) array; nan where undefined}.
    """
    order = np.argsort(answers["uncertainty"], kind="stable")  # a resample is in order too: nothing is sorted again
    rank = answers["rank"][order]
    _, group = np.unique(answers["uncertainty"][order], return_inverse=True)
    position = np.arange(1, len(order) + 1)
    bounds = np.cumsum([0] + [len(part) for part in np.array_split(position, levels)])
    names = ("R@1", "R@5", "R@10", "AURC", "E-AURC")
    found, recall = {name: np.empty(resamples) for name in names}, np.empty((resamples, levels))
    for i, count in enumerate(resample(len(order), resamples)):
        drawn = np.repeat(position - 1, count[order])
        error = (rank[drawn] > 1).astype(np.float64)
        for k in (1, 5, 10):
            found[f"R@{k}"][i] = np.mean(rank[drawn] <= k)
        recall[i] = 1 - np.add.reduceat(error, bounds[:-1]) / np.diff(bounds)
        groups = group[drawn]
        tied = np.maximum(np.bincount(groups), 1)
        area = np.mean(np.cumsum((np.bincount(groups, weights=error) / tied)[groups]) / position)
        wrong = int(error.sum())
        best = np.sum(np.arange(1, wrong + 1) / position[len(position) - wrong :]) / len(position)
        found["AURC"][i], found["E-AURC"][i] = area, max(0.0, area - best)
    found["S"], r = _correlation_with_level(stats.rankdata(recall, axis=1)), _correlation_with_level(recall)
    found["R2"] = r**2
    found["-S*R2"] = -found["S"] * found["R2"]
    return found


def _correlation_with_level(values):
    """Pearson correlation of every row (resamples, K) with 0..K-1; nan where a row is constant."""
    level = np.arange(values.shape[1]) - (values.shape[1] - 1) / 2
    centred = values - values.mean(axis=1, keepdims=True)
    spread = np.where(np.ptp(values, axis=1) == 0, np.nan, np.sqrt((centred**2).sum(axis=1) * (level**2).sum()))
    return centred @ level / spread


def bootstrap_relevance(answers, resamples=RESAMPLES):
    """Every figure of `metrics.relevance_metrics`, for every resample. Args: answers: with what `metrics.rank_relevant` returned.

    Returns: {figure: (resamples,) array}.
    """
    values = {f"R@{k}": answers["relevant_rank"] <= k for k in (1, 5, 10)} | {"mAP@R": answers["ap_at_r"]}
    counts = resample(len(answers["rank"]), resamples)
    rows = [[np.average(value, weights=count) for value in values.values()] for count in counts]
    return dict(zip(values, np.array(rows).reshape(resamples, len(values)).T, strict=True))


def bootstrap_ambiguity(answers, resamples=RESAMPLES):
    """Every figure of `metrics.ambiguity_metrics`, for every resample of the queries.

    Args: answers: "t2i", as for `metrics.ambiguity_metrics`. Returns: {figure: (resamples,) array; nan where undefined}.
    """
    fields = {"u": answers["uncertainty"], "a": answers["relevant"]} | (
        {"w": answers["words"]} if "words" in answers else {}
    )
    group = {name: np.unique(values, return_inverse=True)[1] for name, values in fields.items()}
    names = ("spearman", "partial_spearman_given_length", "R@1_described")
    found = {name: np.empty(resamples) for name in names}
    for i, count in enumerate(resample(len(answers["rank"]), resamples)):
        ranks = {name: _midranks(inverse, count) for name, inverse in group.items()}
        ua = _weighted_correlation(ranks["u"], ranks["a"], count)
        uw, aw = (_weighted_correlation(ranks[x], ranks["w"], count) if "w" in ranks else np.nan for x in ("u", "a"))
        rest = (1 - uw**2) * (1 - aw**2)
        found["spearman"][i] = ua
        found["partial_spearman_given_length"][i] = (ua - uw * aw) / np.sqrt(rest) if rest > 1e-12 else np.nan
        found["R@1_described"][i] = np.average(answers["relevant_rank"] == 1, weights=count)
    return found


def _midranks(group, count):
    """The ranks in a resample: of equal values the mean one. Args: group (Q,): which value, ascending; count (Q,). Returns: (Q,)."""
    size = np.bincount(group, weights=count)
    return (np.cumsum(size) - (size - 1) / 2)[group]


def _weighted_correlation(x, y, weight):
    """Pearson correlation under weights; nan where one of them is constant."""
    dx, dy = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    spread = np.sqrt((weight * dx**2).sum() * (weight * dy**2).sum())
    return (weight * dx * dy).sum() / spread if spread > 0 else np.nan


def interval(values):
    """The percentile interval of a figure over resamples, at 95 %.

    A resample is noisier than the sample, which can only disturb an even fall of recall: the intervals of S, R2 and -S*R2 lie towards the worse
    side and may leave out the figure itself. Args: values (resamples,). Returns: (low, high); None if one is undefined.
    """
    if not len(values) or np.isnan(values).any():
        return None
    return tuple(float(x) for x in np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))


def p_value(differences):
    """Two-sided: twice the share of resamples whose difference has the rarer sign, zeros counting for both. Returns: float in [0, 1], or None."""
    if np.isnan(differences).any():
        return None
    return float(min(1.0, 2 * min(np.mean(differences <= 0), np.mean(differences >= 0))))
