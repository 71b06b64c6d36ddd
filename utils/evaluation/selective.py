"""Selective retrieval: which answers to keep, and how probable it is that an answer is right.

An answer is kept if its uncertainty is at most a threshold. The threshold is chosen on calibration
queries, such that few of the kept answers are wrong.

Captions of one image are not independent. Therefore we calibrate on one caption, drawn with a
fixed seed, of each image of one half, and measure on all queries of the other half. There, every
image has the same weight, so that the measured queries are distributed like the calibration ones.
"""

import functools

import numpy as np
from numpy.typing import ArrayLike

from utils.cli import need
from utils.files import load_json

RISKS = [0.1, 0.2, 0.3]  # default of --risk
CONFIDENCE = 0.95  # default of --confidence
RANKS = [1, 5]  # default of --risk-at
STARTS = (30, 60, 100, 150, 200)  # calibration queries kept at the first threshold that is tested
BINS = 15  # of the expected calibration error
KEEP = "keep"
ABSTAIN = "ask back"


def split_queries(image):
    """Two sets of queries that share no image: one to calibrate on, one to measure on.

    The halves depend on the images alone. The larger half is for calibration.

    Args:
        image: the image that each query belongs to, (Q,).
    Returns:
        calibration (C,): rows of queries, ascending, one per image of its half.
        others (T,): rows of all queries of the other half.
        weight (T,): of these; they sum to 1, and every image has the same.
    """
    return _split_queries(np.asarray(image, dtype=np.int64).tobytes())


@functools.lru_cache(maxsize=4)  # it is the same for every risk
def _split_queries(image_bytes):
    image = np.frombuffer(image_bytes, dtype=np.int64)
    generator = np.random.default_rng(0)
    images = np.unique(image)
    half = (len(images) + 1) // 2
    calibration_images = images[generator.permutation(len(images))[:half]]
    shuffled = generator.permutation(len(image))
    _, first = np.unique(image[shuffled], return_index=True)
    one_per_image = shuffled[first]
    is_calibration = np.isin(image, calibration_images)
    calibration = np.sort(one_per_image[is_calibration[one_per_image]])
    others = np.flatnonzero(~is_calibration)
    _, group, count = np.unique(image[others], return_inverse=True, return_counts=True)
    weight = 1 / (count[group] * max(1, len(count)))
    return calibration, others, weight


def choose_threshold(uncertainty, is_wrong, risk, confidence):
    """The largest threshold at which the risk is guaranteed, or None if there is none.

    At threshold l, n_l queries have uncertainty <= l, and k_l of them are wrong. The
    Clopper-Pearson bound r+ solves BinomCDF(k_l; n_l, r+) = delta. A sequence of tests starts at
    the threshold that keeps n queries, and goes on to less certain ones while r+ <= risk. Its order
    is fixed beforehand, so that it needs no correction for the number of its tests.

    A single sequence ends at once if a few of the surest answers are wrong. So there are several,
    which start at n = 30, 60, 100, 150 and 200, and each has its share of the error:
    delta = (1 - confidence) / (number of sequences). The largest threshold that any of them reached
    is valid (union bound). If queries are independent, the error among the kept answers exceeds the
    risk for at most a share 1 - confidence of calibration sets.

    Args:
        uncertainty: of the calibration queries, (C,).
        is_wrong: (C,) bool.
        risk: the share of wrong answers that is allowed, in (0, 1).
        confidence: in (0, 1).
    Source: Angelopoulos et al., "Learn then Test", arXiv 2110.01052; Clopper & Pearson,
        Biometrika 26, 1934.

    >>> choose_threshold(np.arange(100), np.arange(100) >= 60, 0.1, 0.95)
    60
    """
    from scipy.special import bdtr

    starts = [start for start in STARTS if start <= len(uncertainty)]
    if not starts:
        return None
    order = np.argsort(uncertainty, kind="stable")
    thresholds = np.asarray(uncertainty)[order]  # in ascending order, with ties
    is_last_of_ties = np.append(thresholds[1:] != thresholds[:-1], True)
    thresholds = thresholds[is_last_of_ties]
    queries = np.arange(1, len(order) + 1)[is_last_of_ties]
    errors = np.cumsum(np.asarray(is_wrong)[order])[is_last_of_ties]
    delta = (1 - confidence) / len(starts)
    passes = bdtr(errors.astype(float), queries, risk) <= delta  # the same as r+ <= risk
    reached = []
    for start in starts:
        first = np.searchsorted(queries, start)
        fails = np.append(~passes[first:], True)
        passed = np.argmax(fails)  # tests before the first failure
        if passed:
            reached.append(thresholds[first + passed - 1].item())
    return max(reached, default=None)


def threshold(rank, uncertainty, image, risk, confidence, k):
    """The threshold that `choose_threshold` finds on the calibration half, or None.

    Args:
        rank: of the first right answer, (Q,); 1 is the best.
        uncertainty: (Q,).
        image: the image that each query belongs to, (Q,).
        risk: the share of wrong answers that is allowed.
        confidence: with which it is not exceeded.
        k: an answer is right if a right one is among the first k.
    """
    calibration, _, _ = split_queries(image)
    is_wrong = rank[calibration] > k
    return choose_threshold(uncertainty[calibration], is_wrong, risk, confidence)


def coverage(rank, uncertainty, image, risk, confidence, k):
    """The share of answers of the other half that are kept, in [0, 1]. Args: as `threshold`."""
    return min(1.0, float(_weight_of_kept(rank, uncertainty, image, risk, confidence, k).sum()))


def error(rank, uncertainty, image, risk, confidence, k):
    """The share of wrong answers among the kept ones of the other half; None if none is kept.

    Args: as `threshold`.
    """
    weight = _weight_of_kept(rank, uncertainty, image, risk, confidence, k)
    kept = float(weight.sum())
    if not kept:
        return None
    _, others, _ = split_queries(image)
    return float(weight[rank[others] > k].sum() / kept)


def _weight_of_kept(rank, uncertainty, image, risk, confidence, k):
    """The weight of each query of the other half, (T,); 0 where its answer is not kept."""
    _, others, weight = split_queries(image)
    chosen = threshold(rank, uncertainty, image, risk, confidence, k)
    return weight * is_kept(uncertainty[others], chosen)


def is_kept(uncertainty, threshold):
    """Which answers are kept, (Q,) bool; without a threshold (None), none is."""
    uncertainty = np.asarray(uncertainty, dtype=np.float64)
    return uncertainty <= (-np.inf if threshold is None else threshold)


def decide(uncertainty: ArrayLike, threshold: float | None) -> str | list[str]:
    """Keep an answer, or abstain and ask back.

    Args:
        uncertainty: of one text, or of T texts, (T,).
        threshold: as `load_threshold` returns it.
    Returns: "keep" or "ask back", or a list of them.

    >>> decide([0.1, 0.3], 0.2)
    ['keep', 'ask back']
    """
    return np.where(is_kept(uncertainty, threshold), KEEP, ABSTAIN).tolist()


def load_threshold(path, risk=None, k=1, confidence=None):
    """The threshold in a .threshold.json file of eval.py; None if no threshold has the guarantee.

    Args:
        risk: the share of wrong answers that is allowed; None: the first in the file.
        k: an answer is right if a right one is among the first k.
        confidence: with which the risk is not exceeded; None: that of the file.
    Raises: UserError if the file has no such threshold, or is damaged; FileNotFoundError.
    """
    content = load_json(path)
    guarantees = content.get("guarantees") if isinstance(content, dict) else None
    is_list = isinstance(guarantees, list)
    need(is_list, f"{path}: this is not a file of thresholds; evaluate again")
    saved = content.get("confidence")
    is_same = confidence in (None, saved)
    cure = "evaluate again with it"
    need(is_same, f"{path}: it is for --confidence {saved}, not {confidence}; {cure}")
    for guarantee in guarantees:
        if not isinstance(guarantee, dict) or guarantee.get("k") != k:
            continue
        if risk in (None, guarantee.get("risk")):
            chosen = guarantee.get("threshold", np.nan)
            is_number = type(chosen) in (int, float) and np.isfinite(chosen)
            problem = f"a threshold is {chosen!r}, which is no number"
            need(chosen is None or is_number, f"{path}: {problem}; evaluate again")
            return chosen
    need(False, f"{path}: it has no threshold for --risk {risk} --risk-at {k}; evaluate with them")


def calibrate(uncertainty, is_right):
    """Fit the probability that an answer is right, which falls with its uncertainty.

    Isotonic regression; linear between the values that were seen, constant beyond them.

    Args:
        uncertainty: (C,).
        is_right: (C,) bool.
    Returns: a function of uncertainty (T,) that returns probabilities (T,) in [0, 1].
    Source: Zadrozny & Elkan, "Transforming classifier scores into accurate multiclass probability
        estimates", 2002.

    >>> calibrate([0.1, 0.2, 0.3], [1, 0, 1])(np.array([0.0, 0.15, 0.9])).tolist()
    [1.0, 0.75, 0.5]
    """
    from scipy.optimize import isotonic_regression

    values, group, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    share_right = np.bincount(group, weights=np.asarray(is_right, dtype=np.float64)) / count
    fitted = isotonic_regression(share_right, weights=count, increasing=False).x

    def probability_of_right(uncertainty):
        return np.interp(uncertainty, values, fitted)

    return probability_of_right


def predict_right(correct, uncertainty, image):
    """Calibrate on one half and predict the other.

    Args: as `brier`.
    Returns: the probability that each answer is right, whether it is, and its weight; (T,) each.
    """
    calibration, others, weight = split_queries(image)
    probability_of_right = calibrate(uncertainty[calibration], correct[calibration])
    is_right = np.asarray(correct, dtype=np.float64)[others]
    return probability_of_right(uncertainty[others]), is_right, weight


def brier(correct, uncertainty, image):
    """The Brier score of the probability that an answer is right: mean (p - y)^2, y = 1 if it is.

    The probability follows from the uncertainty alone (`calibrate`).

    Args:
        correct: (Q,) bool.
        uncertainty: (Q,).
        image: the image that each query belongs to, (Q,).
    Returns: float in [0, 1], less is better; None if there is only one image.
    """
    probability, is_right, weight = predict_right(correct, uncertainty, image)
    if not len(weight):
        return None
    return float(np.sum(weight * (probability - is_right) ** 2))


def expected_calibration_error(correct, uncertainty, image):
    """ECE of the probability that an answer is right, over 15 bins of p of equal width.

    sum over bins of (share of queries in the bin) * |mean p - mean y|, y = 1 if it is right.

    Args and Returns: as `brier`.
    Source: Guo et al., "On calibration of modern neural networks", arXiv 1706.04599.
    """
    probability, is_right, weight = predict_right(correct, uncertainty, image)
    if not len(weight):
        return None
    bin_of_query = np.minimum((probability * BINS).astype(int), BINS - 1)
    gap = np.bincount(bin_of_query, weights=weight * (probability - is_right))
    return float(np.abs(gap).sum())
