"""Selective retrieval: which answers to keep, and how probable it is that an answer is right.

An answer is kept if its uncertainty is at most a threshold. The threshold is chosen on calibration
queries, such that few of the kept answers are wrong.

The images are split into two halves. We calibrate on one caption of each image of the first half,
drawn with a fixed seed, since captions of one image are not independent. We measure on all
queries of the second half. There, every image has the same weight, so that the measured queries
are distributed like the calibration queries.
"""

import functools

import numpy as np
from numpy.typing import ArrayLike

from utils.cli import UserError, need
from utils.evaluation.metrics import calibration_error
from utils.files import load_json

RISKS = [0.1, 0.2, 0.3]  # default of --risk
CONFIDENCE = 0.95  # default of --confidence
RANKS = [1, 5]  # default of --risk-at
STARTS = (30, 60, 100, 150, 200)  # queries kept at the first threshold of each sequence of tests
BINS = 15  # of the expected calibration error
KEEP = "keep"
ABSTAIN = "ask back"


def split_queries(image):
    """Choose the queries to calibrate on, and those to measure on. They share no image.

    The choice depends on the images alone. If their number is odd, the calibration half is larger.

    Args:
        image: the image that each query belongs to, (Q,).
    Returns:
        calibration (C,): rows of the calibration queries, ascending, one per image of their half.
        measured (T,): rows of all queries of the other half, ascending.
        weight (T,): weights of the measured queries. They sum to 1, and every image has the same.
    """
    return _split_queries(np.asarray(image, dtype=np.int64).tobytes())


@functools.lru_cache(maxsize=4)  # every risk and metric asks for the same split
def _split_queries(image_bytes):
    image = np.frombuffer(image_bytes, dtype=np.int64)
    generator = np.random.default_rng(0)
    images = np.unique(image)
    shuffled_images = images[generator.permutation(len(images))]
    half = (len(images) + 1) // 2
    is_calibration = np.isin(image, shuffled_images[:half])  # (Q,)
    # A random query of every image: the first one in a random order.
    shuffled_queries = generator.permutation(len(image))
    _, first = np.unique(image[shuffled_queries], return_index=True)
    one_per_image = shuffled_queries[first]
    calibration = np.sort(one_per_image[is_calibration[one_per_image]])
    measured = np.flatnonzero(~is_calibration)
    _, image_number, queries_of_image = np.unique(
        image[measured], return_inverse=True, return_counts=True
    )
    images_measured = max(1, len(queries_of_image))
    weight = 1 / (queries_of_image[image_number] * images_measured)
    return calibration, measured, weight


def choose_threshold(uncertainty, is_wrong, risk, confidence):
    """The largest threshold at which the risk is guaranteed, or None if there is none.

    At threshold l, n_l queries have uncertainty <= l, and k_l of them are wrong. The
    Clopper-Pearson bound r+ solves BinomCDF(k_l; n_l, r+) = delta. A sequence of tests starts at
    the first threshold that keeps at least n queries, and goes on to larger thresholds while
    r+ <= risk. Its order is fixed beforehand, so that it needs no correction for the number of its
    tests.

    A single sequence would end at once if a few of the most certain answers were wrong. So there
    are several, which start at n = 30, 60, 100, 150 and 200. Each uses
    delta = (1 - confidence) / (number of sequences), so that the largest threshold that any of them
    reaches is valid (union bound). If queries are independent, the error among the kept answers
    exceeds the risk for at most a share 1 - confidence of calibration sets.

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
    sorted_uncertainty = np.asarray(uncertainty)[order]
    errors_so_far = np.cumsum(np.asarray(is_wrong)[order])
    # Every distinct uncertainty is a threshold. It keeps all queries that have it.
    is_last_of_ties = np.append(sorted_uncertainty[1:] != sorted_uncertainty[:-1], True)
    thresholds = sorted_uncertainty[is_last_of_ties]
    kept = np.flatnonzero(is_last_of_ties) + 1  # n_l
    errors = errors_so_far[is_last_of_ties]  # k_l
    delta = (1 - confidence) / len(starts)
    passes = bdtr(errors.astype(float), kept, risk) <= delta  # the same as r+ <= risk
    reached = []
    for start in starts:
        first = np.searchsorted(kept, start)
        fails = np.append(~passes[first:], True)
        tests_passed = np.argmax(fails)  # before the first one that fails
        if tests_passed:
            reached.append(thresholds[first + tests_passed - 1].item())
    return max(reached, default=None)


def calibrated_threshold(rank, uncertainty, image, risk, confidence, k):
    """The threshold that `choose_threshold` finds on the calibration queries, or None.

    Args:
        rank: the rank of the first right answer of each query, (Q,); 1 is the best.
        uncertainty: (Q,).
        image: the image that each query belongs to, (Q,).
        risk: the share of wrong answers that is allowed, in (0, 1).
        confidence: how certain it is that the risk is not exceeded, in (0, 1).
        k: a query counts as answered correctly if a right answer is among the first k.
    """
    calibration, _, _ = split_queries(image)
    is_wrong = rank[calibration] > k
    return choose_threshold(uncertainty[calibration], is_wrong, risk, confidence)


def coverage(rank, uncertainty, image, risk, confidence, k):
    """The share of the measured answers that are kept, in [0, 1].

    Args: as for `calibrated_threshold`.
    """
    weight, _ = _kept_answers(rank, uncertainty, image, risk, confidence, k)
    return min(1.0, float(weight.sum()))


def error(rank, uncertainty, image, risk, confidence, k):
    """The share of wrong answers among the measured answers that are kept; None if none is kept.

    Args: as for `calibrated_threshold`.
    """
    weight, is_wrong = _kept_answers(rank, uncertainty, image, risk, confidence, k)
    kept = float(weight.sum())
    if kept == 0:
        return None
    return float(weight[is_wrong].sum() / kept)


def _kept_answers(rank, uncertainty, image, risk, confidence, k):
    """Apply the threshold to the measured queries.

    Returns:
        weight (T,): of each answer, 0 if it is not kept.
        is_wrong (T,): bool.
    """
    _, measured, weight = split_queries(image)
    threshold = calibrated_threshold(rank, uncertainty, image, risk, confidence, k)
    weight = weight * is_kept(uncertainty[measured], threshold)
    is_wrong = rank[measured] > k
    return weight, is_wrong


def is_kept(uncertainty, threshold):
    """Whether each answer is kept, (Q,) bool. Without a threshold (None), none is."""
    if threshold is None:
        threshold = -np.inf
    return np.asarray(uncertainty, dtype=np.float64) <= threshold


def decide(uncertainty: ArrayLike, threshold: float | None) -> str | list[str]:
    """Decide whether to keep an answer, or to abstain and ask back.

    Args:
        uncertainty: of one text, a float, or of T texts, (T,).
        threshold: as `load_threshold` returns it.
    Returns: "keep" or "ask back", or a list of T of them.

    >>> decide([0.1, 0.3], 0.2)
    ['keep', 'ask back']
    """
    return np.where(is_kept(uncertainty, threshold), KEEP, ABSTAIN).tolist()


def load_threshold(path, risk=None, k=1, confidence=None):
    """Read the threshold in a .threshold.json file of eval.py.

    Args:
        risk: the share of wrong answers that is allowed. None: the first risk in the file.
        k: an answer is right if a right one is among the first k.
        confidence: how certain it is that the risk is not exceeded. None: that of the file.
    Returns: float, or None if no threshold guarantees the risk.
    Raises: UserError if the file is damaged, or was made for another risk, k or confidence;
        FileNotFoundError.
    """
    content = load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("guarantees"), list):
        raise UserError(f"{path}: this is not a file of thresholds; evaluate again")
    saved = content.get("confidence")
    if confidence not in (None, saved):
        problem = f"it is for --confidence {saved}, not {confidence}"
        raise UserError(f"{path}: {problem}; evaluate again with it")
    for guarantee in content["guarantees"]:
        if not isinstance(guarantee, dict):
            continue
        has_k = guarantee.get("k") == k
        has_risk = risk is None or guarantee.get("risk") == risk
        if has_k and has_risk:
            return _check_threshold(guarantee.get("threshold", np.nan), path)
    wanted = f"--risk-at {k}" if risk is None else f"--risk {risk} --risk-at {k}"
    problem = f"it has no threshold for {wanted}"
    raise UserError(f"{path}: {problem}; evaluate again with it")


def _check_threshold(threshold, path):
    """Return a threshold from a file if it is None or a finite number, else raise a UserError."""
    if threshold is None:
        return None
    is_number = type(threshold) in (int, float) and np.isfinite(threshold)
    problem = f"a threshold is {threshold!r}, which is not a number"
    need(is_number, f"{path}: {problem}; evaluate again")
    return threshold


def calibrate(uncertainty, is_right):
    """Fit the probability that an answer is right, as a falling function of its uncertainty.

    The fit is isotonic regression. It is interpolated linearly between the uncertainties of the
    calibration queries, and constant beyond them.

    Args:
        uncertainty: of the calibration queries, (C,).
        is_right: (C,) bool.
    Returns: a function of uncertainty (T,) that returns probabilities (T,) in [0, 1].
    Source: Zadrozny & Elkan, "Transforming classifier scores into accurate multiclass probability
        estimates", 2002.

    >>> calibrate([0.1, 0.2, 0.3], [1, 0, 1])(np.array([0.0, 0.15, 0.9])).tolist()
    [1.0, 0.75, 0.5]
    """
    from scipy.optimize import isotonic_regression

    is_right = np.asarray(is_right, dtype=np.float64)
    distinct, group, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    share_right = np.bincount(group, weights=is_right) / count
    probability = isotonic_regression(share_right, weights=count, increasing=False).x

    def probability_of_right(uncertainty):
        return np.interp(uncertainty, distinct, probability)

    return probability_of_right


def predict_right(correct, uncertainty, image):
    """Predict whether the measured answers are right, after calibration on the other half.

    Args: as for `brier`.
    Returns: three arrays (T,): the probability that each answer is right; whether it is, 1.0 or
        0.0; its weight.
    """
    calibration, measured, weight = split_queries(image)
    probability_of_right = calibrate(uncertainty[calibration], correct[calibration])
    probability = probability_of_right(uncertainty[measured])
    is_right = np.asarray(correct, dtype=np.float64)[measured]
    return probability, is_right, weight


def brier(correct, uncertainty, image):
    """The Brier score of the probability that an answer is right.

    It is the weighted mean of (p - y)^2, where y is 1 if the answer is right, else 0. The
    probability p follows from the uncertainty alone (`calibrate`).

    Args:
        correct: (Q,) bool.
        uncertainty: (Q,).
        image: the image that each query belongs to, (Q,).
    Returns: float in [0, 1], lower is better; None if there is only one image.
    """
    probability, is_right, weight = predict_right(correct, uncertainty, image)
    if len(weight) == 0:
        return None
    return float(np.sum(weight * (probability - is_right) ** 2))


def expected_calibration_error(correct, uncertainty, image):
    """ECE of the probability that an answer is right, over 15 bins (`metrics.calibration_error`).

    Args and Returns: as for `brier`.
    """
    probability, is_right, weight = predict_right(correct, uncertainty, image)
    if len(weight) == 0:
        return None
    return calibration_error(probability, is_right, weight, BINS)
