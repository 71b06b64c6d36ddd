"""Answers and their uncertainty in, decisions out: thresholds under which few are wrong, probabilities of being right.

Captions of one image are not independent. What is calibrated is calibrated on one caption, drawn with a fixed seed, of
each image of one half, and measured on all queries of the other half, in which every image weighs the same: figures are
those of a query drawn as the calibrated ones are.
"""

import functools

import numpy as np

from utils.cli import need
from utils.files import load_json
from utils.lazy import Lazy

optimize, special = Lazy("scipy.optimize"), Lazy("scipy.special")
RISKS, CONFIDENCE, RANKS = [0.1, 0.2, 0.3], 0.95, [1, 5]  # where --risk, --confidence, --risk-at say nothing else
LEAST = 30  # calibration queries under the first threshold that is tested
BINS = 15  # of the expected calibration error
KEEP, ASK_BACK = "keep", "ask back"


def split_queries(image):
    """Two sets of queries that share no image: which to calibrate on, and which to measure on.

    Args: image (Q,): the image that each query belongs to.
    Returns: rows (C,), one of each image of the larger half, ascending; the rows (T,) of all others; weights (T,) of
        these, which sum to 1, every image having the same. The halves depend on the images alone.
    """
    return _split(np.asarray(image, dtype=np.int64).tobytes())


@functools.lru_cache(maxsize=4)  # every risk asks for the same
def _split(image):
    image = np.frombuffer(image, dtype=np.int64)
    rng, images = np.random.default_rng(0), np.unique(image)
    half = images[rng.permutation(len(images))[: -(-len(images) // 2)]]
    shuffled = rng.permutation(len(image))
    first = np.unique(image[shuffled], return_index=True)[1]  # of each image
    is_half = np.isin(image, half)
    others = np.flatnonzero(~is_half)
    _, group, count = np.unique(image[others], return_inverse=True, return_counts=True)
    drawn = shuffled[first]
    return np.sort(drawn[is_half[drawn]]), others, 1 / (count[group] * max(1, len(count)))


def choose_threshold(uncertainty, is_wrong, risk, confidence):
    """The largest threshold up to which at most a share `risk` of answers is wrong, or None if none qualifies.

    From the most certain threshold l with n_l >= 30 queries of uncertainty <= l on, while the Clopper-Pearson bound r+
    of k_l errors among them, BinomCDF(k_l; n_l, r+) = 1 - confidence, is at most the risk: a fixed sequence of tests,
    which needs no correction. Of independent queries, the error among those kept exceeds the risk in at most a share
    1 - confidence of calibration sets.
    Args: uncertainty (C,), is_wrong (C,) bool.
    Source: Angelopoulos et al., "Learn then Test", arXiv 2110.01052; Clopper & Pearson, Biometrika 26, 1934.
    >>> choose_threshold(np.arange(100), np.arange(100) >= 60, 0.1, 0.95)
    61
    """
    order = np.argsort(uncertainty, kind="stable")
    sorted_, wrong = np.asarray(uncertainty)[order], np.cumsum(np.asarray(is_wrong)[order])
    last = np.flatnonzero(np.append(sorted_[1:] != sorted_[:-1], True))  # of each value: ties are kept together
    last = last[last + 1 >= LEAST]
    fails = special.bdtr(wrong[last].astype(float), last + 1, risk) > 1 - confidence  # r+ > risk
    passed = last[: np.argmax(np.append(fails, True))]
    return sorted_[passed[-1]].item() if len(passed) else None


def guarantee(rank, uncertainty, image, risk, confidence, k):
    """A threshold, and what it does to the queries of the other half.

    Args:
        rank, uncertainty, image (Q,): of the first right answer, of the query, and the image that it belongs to.
        risk, confidence: as `choose_threshold` has them.
        k: a query is right if a right answer is among the first k.
    Returns: dict: "threshold", None if none qualifies, "coverage", the share of queries kept, and "error", the share of
        wrong answers among these, None if there are none.
    """
    calibration, others, weight = split_queries(image)
    threshold = choose_threshold(uncertainty[calibration], rank[calibration] > k, risk, confidence)
    kept = weight * is_kept(uncertainty[others], threshold)
    coverage = float(kept.sum())
    error = float((kept * (rank[others] > k)).sum() / coverage) if coverage else None
    return {"threshold": threshold, "coverage": min(1.0, coverage), "error": error}


def is_kept(uncertainty, threshold):
    """Whether answers of uncertainty (Q,) are kept: a bool array; none is without a threshold."""
    return np.asarray(uncertainty, dtype=np.float64) <= (-np.inf if threshold is None else threshold)


def decide(uncertainty, threshold):
    """ "keep" an answer, or "ask back".

    Args: uncertainty: of one text, or (T,), threshold: as `load_threshold` gives it.
    Returns: str, or a list of them.
    >>> decide([0.1, 0.3], 0.2)
    ['keep', 'ask back']
    """
    return np.where(is_kept(uncertainty, threshold), KEEP, ASK_BACK).tolist()


def load_threshold(path, risk=None, k=1, confidence=None):
    """The threshold in a .threshold.json of eval.py, up to which answers are kept; None if none qualified.

    Args:
        risk: the share of wrong answers that is allowed; None: the first in the file.
        k: a query is right if a right answer is among the first k.
        confidence: that no more are wrong; None: what the file has.
    Raises: UserError if the file has none of these, or is damaged; FileNotFoundError.
    """
    content = load_json(path)
    known = content.get("guarantees") if isinstance(content, dict) else None
    need(isinstance(known, list), f"{path}: not a file of thresholds; evaluate again")
    sure = content.get("confidence")
    need(confidence in (None, sure), f"{path}: of --confidence {sure}, not {confidence}; evaluate again with it")
    for one in known:
        if isinstance(one, dict) and one.get("k") == k and risk in (None, one.get("risk")):
            threshold = one.get("threshold", np.nan)
            is_number = type(threshold) in (int, float) and np.isfinite(threshold)
            need(threshold is None or is_number, f"{path}: a threshold is {threshold!r}, no number; evaluate again")
            return threshold
    need(False, f"{path}: has no threshold for --risk {risk} --risk-at {k}")


def calibrate(uncertainty, is_right):
    """The probability that an answer is right as a falling function of its uncertainty, by isotonic regression.

    Args: uncertainty (C,), is_right (C,) bool.
    Returns: function of uncertainty (T,) that gives probabilities (T,) in [0, 1]; straight between values that were
        seen, constant beyond them.
    Source: Zadrozny & Elkan, "Transforming classifier scores into accurate multiclass probability estimates", 2002.
    >>> calibrate([0.1, 0.2, 0.3], [1, 0, 1])(np.array([0.0, 0.15, 0.9])).tolist()
    [1.0, 0.75, 0.5]
    """
    values, group, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    share = np.bincount(group, weights=np.asarray(is_right, dtype=np.float64)) / count
    fitted = optimize.isotonic_regression(share, weights=count, increasing=False).x
    return lambda uncertainty: np.interp(uncertainty, values, fitted)


def predict_right(correct, uncertainty, image):
    """What `calibrate` of the one half says of the other: probabilities (T,), what is right (T,), weights (T,)."""
    calibration, others, weight = split_queries(image)
    probability = calibrate(uncertainty[calibration], correct[calibration])(uncertainty[others])
    return probability, np.asarray(correct, dtype=np.float64)[others], weight


def calibration(correct, uncertainty, image):
    """How good the probability of being right is that follows from uncertainty alone, on the other half.

    Brier = mean (p - y)^2, y = 1 where the answer is right; ECE = sum over 15 equally wide bins of p of the share in it
    times |mean p - mean y|.
    Args: correct (Q,) bool, uncertainty (Q,), image (Q,): the image that each query belongs to.
    Returns: dict of two floats in [0, 1], less is better; None where there is only one image.
    Source: Guo et al., "On calibration of modern neural networks", arXiv 1706.04599.
    """
    probability, right, weight = predict_right(correct, uncertainty, image)
    if not len(weight):
        return {"Brier": None, "ECE": None}
    which = np.minimum((probability * BINS).astype(int), BINS - 1)
    gap = np.bincount(which, weights=weight * (probability - right))
    return {"Brier": float(np.sum(weight * (probability - right) ** 2)), "ECE": float(np.abs(gap).sum())}
