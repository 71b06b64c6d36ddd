"""The bootstrap: metrics of resampled queries in, intervals and p-values out.

A resample draws as many images as there are, with replacement. Each drawn image brings all its
queries, since captions of one image are not independent. The draws depend only on the number of
images, so the differences of two methods that answered the same queries are paired.

A resample is a weight: how often each query counts (metrics.py).

Source: Efron & Tibshirani, "An introduction to the bootstrap", 1993; for clusters Field & Welsh,
"Bootstrapping clustered data", J. R. Stat. Soc. B 69, 2007.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
MIN_RESAMPLES = 100  # of a comparison; a p-value is at least 2 / (resamples + 1)
CONFIDENCE = 0.95  # of intervals
LOG_SMALLEST_P = np.log(1e-12)
THREADS = min(4, os.cpu_count() or 1)  # more wait for the memory
BATCH = 32  # resamples that are computed together; their weights of 25,000 queries take 3 MB


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

    with ThreadPoolExecutor(THREADS) as threads:
        batches = list(threads.map(measure_batch, range(0, resamples, BATCH)))
    resampled = {}
    for name in batches[0]:
        resampled[name] = np.concatenate([batch[name] for batch in batches])
    return resampled


@functools.lru_cache(maxsize=4)
def _draw(image_count, resamples):
    """How often each image is drawn in each resample, (resamples, image_count).

    A row sums to image_count.
    """
    generator = np.random.default_rng(0)
    counts = np.empty((resamples, image_count), dtype=np.uint16)
    for row in counts:
        drawn = generator.integers(image_count, size=image_count)
        row[:] = np.bincount(drawn, minlength=image_count)
    return counts


@dataclass(frozen=True)
class Estimate:
    """A metric's mean over seeds, or the difference of two such means, and how far to trust it.

    Both the images and the seeds are samples. With one seed, the interval is the bootstrap's over
    images. With S seeds, it is mean +- h,

        h^2 = z^2 v + t^2 s^2 / S,

    with v the variance of the mean over resamples of the images, s^2 the variance over seeds, and
    z and t quantiles of the normal distribution and of Student's t with S - 1 degrees of freedom.
    In a difference of two rows, v is that of the paired difference, both s^2 / S are added, and so
    are their degrees of freedom.

    Why not resample the seeds too? Three resampled seeds have only two thirds of their variance:
    the interval would be too narrow.

    Attributes:
        mean: over the seeds.
        draws: the mean over the seeds in each resample of the images, (R,).
        seed_variance: s^2 / S, or the sum of two; 0 if there is one seed.
        degrees_of_freedom: of seed_variance; 0 if there is one seed.
    """

    mean: float
    draws: np.ndarray
    seed_variance: float = 0.0
    degrees_of_freedom: int = 0

    @classmethod
    def over_seeds(cls, values, draws):
        """The Estimate of a metric of S seeds.

        Args:
            values: (S,).
            draws: their resamples, (S, R).
        """
        mean = float(np.mean(values))
        mean_draws = np.mean(draws, axis=0)
        seeds = len(values)
        if seeds == 1:
            return cls(mean, mean_draws)
        return cls(mean, mean_draws, float(np.var(values, ddof=1)) / seeds, seeds - 1)

    def __sub__(self, other):
        """The Estimate of the difference of two rows that answered the same queries."""
        return Estimate(
            self.mean - other.mean,
            self.draws - other.draws,
            self.seed_variance + other.seed_variance,
            self.degrees_of_freedom + other.degrees_of_freedom,
        )

    def interval(self):
        """The 95 % interval (low, high), or None if it is undefined."""
        if self.degrees_of_freedom == 0:
            return percentile_interval(self.draws)
        if np.isnan(self.draws).any():
            return None
        half_width = np.sqrt(self._squared_half_width(1 - CONFIDENCE))
        return float(self.mean - half_width), float(self.mean + half_width)

    def p_value(self):
        """The two-sided p-value of "the true mean is 0"; None if it is undefined.

        It is the level of the interval at whose edge 0 lies.
        With one seed, it is the bootstrap's (`bootstrap_p_value`).
        """
        from scipy.optimize import brentq

        if self.degrees_of_freedom == 0:
            return bootstrap_p_value(self.draws)
        if np.isnan(self.draws).any():
            return None

        def excess(log_level):
            return self._squared_half_width(np.exp(log_level)) - self.mean**2

        if excess(LOG_SMALLEST_P) <= 0:  # 0 is far outside, or the two rows are the same
            return float(np.exp(LOG_SMALLEST_P)) if self.mean else 1.0
        return float(np.exp(brentq(excess, LOG_SMALLEST_P, 0.0)))

    def _squared_half_width(self, level):
        """h^2 of the interval that misses the truth in this share of cases."""
        from scipy.special import ndtri, stdtrit

        z = ndtri(1 - level / 2)
        t = stdtrit(self.degrees_of_freedom, 1 - level / 2)
        return z**2 * np.var(self.draws, ddof=1) + t**2 * self.seed_variance


def percentile_interval(values):
    """The 95 % percentile interval of a metric's resamples (R,): (low, high).

    A resample is noisier than the sample, and noise can only disturb an even fall of recall.
    Therefore the intervals of the metrics S, R2 and -S*R2 lie towards the worse side, and may not
    contain the metric itself.

    Returns: None if there are no resamples, or if the metric is undefined (NaN) in one of them.
    """
    if not len(values) or np.isnan(values).any():
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_p_value(differences):
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
