"""The bootstrap: metrics of resampled queries in, intervals and p-values out.

A resample draws as many images as there are, with replacement. Each drawn image brings all its
queries, since captions of one image are not independent. The draws depend only on the number of
images, so the differences of two methods that answered the same queries are paired.

A resample is a weight: how often each query counts (metrics.py).

Source: Efron & Tibshirani, "An introduction to the bootstrap", 1993; for clusters Field & Welsh,
"Bootstrapping clustered data", J. R. Stat. Soc. B 69, 2007.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

RESAMPLES = 1000
MIN_RESAMPLES = 100  # With fewer resamples a p-value says nothing.
CONFIDENCE = 0.95  # of intervals
BATCH = 32  # resamples that are computed together; their weights of 25,000 queries take 6 MB


def resample(measure, images, resamples):
    """Compute metrics of all resamples of some queries.

    Args:
        measure: function of a weight (r, Q) that returns {metric name: (r,) array}.
        images: the image that each query belongs to, (Q,).
        resamples: R.
    Returns: {metric name: (R,) array}.
    """
    _, image_of_query = np.unique(images, return_inverse=True)
    draws = _draw(int(image_of_query.max()) + 1, resamples)  # (R, N)

    def measure_batch(first):
        weight = draws[first : first + BATCH, image_of_query]  # (r, Q)
        return measure(weight.astype(np.int32))

    with ThreadPoolExecutor() as threads:
        batches = list(threads.map(measure_batch, range(0, resamples, BATCH)))
    resampled = {}
    for name in batches[0]:
        resampled[name] = np.concatenate([batch[name] for batch in batches])
    return resampled


@functools.lru_cache(maxsize=4)
def _draw(images, resamples):
    """How often each image is drawn in each resample: (resamples, images); a row sums to images."""
    generator = np.random.default_rng(0)
    counts = np.empty((resamples, images), dtype=np.uint16)
    for row in counts:
        drawn = generator.integers(images, size=images)
        row[:] = np.bincount(drawn, minlength=images)
    return counts


def over_seeds(draws, side=0):
    """The mean of a metric over seeds in every resample, with the seeds resampled as well.

    Args:
        draws: (S, R), the resamples of S seeds.
        side: 0 or 1, for the two methods of a comparison, which draw their seeds independently.
    Returns: (R,) array.
    """
    draws = np.asarray(draws).T  # (R, S)
    drawn_seeds = np.random.default_rng([1, side]).integers(draws.shape[1], size=draws.shape)
    return np.take_along_axis(draws, drawn_seeds, axis=1).mean(axis=1)


def interval(values):
    """The 95 % percentile interval of a metric's resamples (R,): (low, high).

    A resample is noisier than the sample, and noise can only disturb an even fall of recall.
    Therefore the intervals of S, R2 and -S*R2 lie towards the worse side, and may not contain the
    metric itself.

    Returns: None if there are no resamples, or if the metric is undefined (NaN) in one of them.
    """
    if not len(values) or np.isnan(values).any():
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def p_value(differences):
    """The two-sided p-value of a difference from its resamples (R,): 2 (c + 1) / (R + 1).

    c counts the resamples whose difference has the rarer sign; zeros count for both signs.

    Returns: None if a difference is undefined (NaN).
    Source: Davison & Hinkley, "Bootstrap methods and their application", 1997, eq. 4.11.
    """
    if np.isnan(differences).any():
        return None
    not_positive = np.sum(differences <= 0)
    not_negative = np.sum(differences >= 0)
    rarer = min(not_positive, not_negative)
    return float(min(1.0, 2 * (rarer + 1) / (len(differences) + 1)))
