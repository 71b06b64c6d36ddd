"""Zero-shot classification with uncertain prompts, on a cache of --dataset imagefolder.

C classes have P prompts each. t_cp is the unit mean of prompt p of class c, u_cp its uncertainty,
v_cp its variance per dimension (of Gaussians), x the unit mean of an image. The weights pi_cp of
the prompts of a class sum to 1, and w_c = sum_p pi_cp t_cp. The class of an image is the c with the
largest score:

- plain: x . w_c, and its softmax at the CLIP's logit scale
- unit: the same with w_c / ||w_c||, as CLIP does it
- variance: 100 x . w_c - 50 sum_d sum_p pi_cp^2 v_cpd for Gaussians; sum_p pi_cp log p(x | text_cp)
  for AsymVLM
- probit: the softmax of BayesVLM, which is flatter where embeddings are uncertain

Sources: PCME++ (arXiv 2305.18171, appendix), ProLIP (arXiv 2410.18857, sec. 4, and its script),
BayesVLM (arXiv 2412.06014) for the probit softmax.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.layers import unit
from utils.cli import need
from utils.evaluation import bootstrap, metrics
from utils.evaluation.training_free import logit_scale

BINS = 20  # of the expected calibration error
THRESHOLD = 0.0  # prompts are kept up to the mean uncertainty plus this many standard deviations
VARIANCE_SCALE = 100.0  # of the cosine in the variance-aware score
# Of BPRW with the images nearest to a class: prior, images, samples of each, added variance.
BPRW_PRIOR = 5.0
BPRW_IMAGES = 10
BPRW_SAMPLES = 10
BPRW_EPS = 0.02
BPRW_STEPS = 1000
BPRW_TOLERANCE = 1e-12


@dataclass
class Prompts:
    """The prompts of all classes and the images of a split, as one scorer sees them; float64.

    Attributes:
        text: unit means of the prompts, (C, P, D).
        image: unit means of the images, (N, D).
        uncertainty: of the prompts, (C, P), or None.
        text_variance, image_variance: of unit means, (C, P, D) and (N, D), or None.
        log_likelihood: log p(image | prompt), (N, C, P), or None.
        scale: logit scale of the CLIP.
    """

    text: Tensor
    image: Tensor
    uncertainty: Tensor | None = None
    text_variance: Tensor | None = None
    image_variance: Tensor | None = None
    log_likelihood: Tensor | None = None
    scale: float = 100.0


def classes_of(cache):
    """The classes of a cache, [folder, name] each, and how many prompts each has.

    Raises: UserError if the cache has no classes.
    """
    classes = cache.meta.get("classes")
    prompts = cache.meta.get("prompts_per_class")
    problem = "it has no classes"
    cure = "make a cache with --dataset imagefolder"
    need(classes and prompts, f"--zero-shot: {cache.folder}: {problem}; {cure}")
    return classes, prompts


def frozen_prompts(cache):
    """The Prompts of the frozen CLIP, which has no uncertainty."""
    text, image = _embeddings(cache)
    return Prompts(_by_class(unit(text), cache), unit(image), scale=logit_scale(cache))


@torch.inference_mode()
def prompts_of(adaptor, cache):
    """The Prompts of an adaptor."""
    text, image = (z.float().to(cache.device) for z in _embeddings(cache))
    encoded_text = adaptor.encode_text(text)
    encoded_image = adaptor.encode_image(image)
    text_mean, uncertainty = adaptor.describe_text(*encoded_text)
    image_mean, _ = adaptor.describe_image(*encoded_image)
    prompts = Prompts(
        _by_class(unit(_float64(text_mean)), cache),
        unit(_float64(image_mean)),
        scale=logit_scale(cache),
    )
    if uncertainty is not None:
        prompts.uncertainty = _by_class(_float64(uncertainty), cache)
    text_variance = adaptor.variance_of(*encoded_text)
    image_variance = adaptor.variance_of(*encoded_image)
    if text_variance is not None and image_variance is not None:
        squared_norm = _float64(text_mean).square().sum(dim=1, keepdim=True)
        prompts.text_variance = _by_class(_float64(text_variance) / squared_norm, cache)
        squared_norm = _float64(image_mean).square().sum(dim=1, keepdim=True)
        prompts.image_variance = _float64(image_variance) / squared_norm
    if hasattr(adaptor, "log_likelihood"):
        scores = _float64(adaptor.score(encoded_image, encoded_text))  # (N, C P)
        prompts.log_likelihood = scores.unflatten(1, prompts.text.shape[:2])
    return prompts


def _embeddings(cache):
    return cache.text.read().cpu().double(), cache.image.read().cpu().double()


def _float64(values):
    return values.cpu().double()


def _by_class(values, cache):
    """Values of all captions, (C P, ...), by class: (C, P, ...)."""
    _, prompts = classes_of(cache)
    return values.unflatten(0, (-1, prompts))


# The weights of the prompts of each class, (C, P); a row sums to 1.


def uniform_weights(prompts):
    """1 / P for every prompt."""
    return torch.full(prompts.text.shape[:2], 1 / prompts.text.shape[1], dtype=torch.float64)


def top_weights(prompts, count):
    """1 / K for the K least uncertain prompts of each class, 0 for the others."""
    order = prompts.uncertainty.argsort(dim=1, stable=True)
    weights = torch.zeros_like(prompts.uncertainty)
    return weights.scatter(1, order[:, :count], 1 / count)


def threshold_weights(prompts):
    """Equal weights for the prompts that are no more uncertain than the mean of their class."""
    u = prompts.uncertainty
    limit = u.mean(dim=1, keepdim=True) + THRESHOLD * u.std(dim=1, keepdim=True, correction=0)
    least = u.amin(dim=1, keepdim=True)
    kept = ((u <= limit) | (u == least)).to(u.dtype)
    return kept / kept.sum(dim=1, keepdim=True)


def inverse_weights(prompts):
    """Proportional to 1 / u; for AsymVLM that is kappa."""
    inverse = 1 / prompts.uncertainty
    return inverse / inverse.sum(dim=1, keepdim=True)


def bprw_weights(prompts):
    """Bayesian prompt re-weighting: how well each prompt explains the images nearest to its class.

    For each class, K samples are drawn of the Gaussian of each of the NN images that are nearest to
    the mean prompt. The prompts, with eps added to their variances, are a mixture whose weights are
    fitted to the samples by EM, under a Dirichlet prior a; negative ones become 0.
    Source: ProLIP, sec. 4.
    """
    generator = torch.Generator().manual_seed(0)
    weights = []
    for text, variance in zip(prompts.text, prompts.text_variance, strict=True):
        nearest = (prompts.image @ unit(text.mean(dim=0))).argsort(descending=True, stable=True)
        rows = nearest[:BPRW_IMAGES]
        mean = prompts.image[rows, None]
        deviation = prompts.image_variance[rows, None].sqrt()
        shape = (len(rows), BPRW_SAMPLES, text.shape[1])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        samples = (mean + deviation * noise).flatten(0, 1)
        weights.append(fit_mixture(samples, text, variance + BPRW_EPS, 1 / variance.mean(dim=1)))
    return torch.stack(weights)


def fit_mixture(samples, mean, variance, start, prior=BPRW_PRIOR):
    """The weights of a mixture of P fixed diagonal Gaussians, fitted to n samples by EM, (P,).

    r_np is proportional to pi_p N(o_n; mean_p, variance_p), and
    pi_p = (sum_n r_np + a - 1) / (n + P (a - 1)).

    Args:
        samples: (n, D).
        mean, variance: (P, D).
        start: (P,), what the first weights are proportional to.
        prior: a.
    """
    difference = samples[:, None] - mean  # (n, P, D)
    log_density = -(difference.square() / variance + variance.log()).sum(dim=2) / 2  # (n, P)
    weights = start / start.sum()
    for _ in range(BPRW_STEPS):
        responsibility = (weights.log() + log_density).softmax(dim=1)
        total = responsibility.sum(dim=0) + prior - 1
        new_weights = (total / (len(samples) + len(mean) * (prior - 1))).clamp(min=0)
        new_weights = new_weights / new_weights.sum()
        change = (new_weights - weights).abs().max()
        weights = new_weights
        if change < BPRW_TOLERANCE:
            break
    return weights


def weightings_of(prompts):
    """The weights by name, {name: (C, P)}."""
    weightings = {"uniform": uniform_weights(prompts)}
    if prompts.uncertainty is not None:
        for count in range(1, prompts.text.shape[1] + 1):
            weightings[f"top {count}"] = top_weights(prompts, count)
        weightings["threshold"] = threshold_weights(prompts)
        weightings["inverse"] = inverse_weights(prompts)
    if prompts.text_variance is not None:
        weightings["BPRW"] = bprw_weights(prompts)
    return weightings


# The logits of all classes, (N, C).


def plain_logits(prompts, weights):
    """s x . w_c."""
    return prompts.scale * prompts.image @ class_vectors(prompts, weights).T


def unit_logits(prompts, weights):
    """s x . w_c / ||w_c||."""
    return prompts.scale * prompts.image @ unit(class_vectors(prompts, weights)).T


def variance_logits(prompts, weights):
    """The variance-aware score; None if the method has neither variances nor a likelihood."""
    if prompts.log_likelihood is not None:
        return (prompts.log_likelihood * weights).sum(dim=2)
    if prompts.text_variance is None:
        return None
    cosine = prompts.image @ class_vectors(prompts, weights).T
    variance = (weights.square()[..., None] * prompts.text_variance).sum(dim=(1, 2))  # (C,)
    return VARIANCE_SCALE * cosine - VARIANCE_SCALE / 2 * variance


def probit_logits(prompts, weights):
    """s E / sqrt(1 + pi s^2 V / 8), with E and V the mean and variance of an uncertain cosine.

    n = sum_d (z^2 + a), E = z_i . z_t / sqrt(n_i n_t),
    V = sum_d [(z_i^2 + a_i) a_t + a_i z_t^2] / (n_i n_t), where a is a variance per dimension.

    Returns: None if the method has no variances.
    """
    if prompts.text_variance is None:
        return None
    z_text = class_vectors(prompts, weights)  # (C, D)
    a_text = (weights.square()[..., None] * prompts.text_variance).sum(dim=1)
    z_image = prompts.image
    a_image = prompts.image_variance
    n_text = (z_text.square() + a_text).sum(dim=1)
    n_image = (z_image.square() + a_image).sum(dim=1)[:, None]
    expected = z_image @ z_text.T / (n_image * n_text).sqrt()
    spread = (z_image.square() + a_image) @ a_text.T + a_image @ z_text.square().T
    variance = spread / (n_image * n_text)
    s = prompts.scale
    return s * expected / (1 + math.pi * s**2 * variance / 8).sqrt()


SCORES = {
    "plain": plain_logits,
    "unit": unit_logits,
    "variance": variance_logits,
    "probit": probit_logits,
}


def class_vectors(prompts, weights):
    """w_c = sum_p pi_cp t_cp, (C, D)."""
    return (weights[..., None] * prompts.text).sum(dim=1)


# Metrics.


@dataclass
class Answers:
    """How every image was classified: arrays (N,).

    Attributes:
        rank: of the right class, 1 = best.
        log_p: log probability of the right class.
        confidence: probability of the class that was chosen.
        uncertainty: of the class that was chosen, or None.
    """

    rank: np.ndarray
    log_p: np.ndarray
    confidence: np.ndarray
    uncertainty: np.ndarray | None

    @classmethod
    def of(cls, logits, label, uncertainty=None):
        """The Answers that follow from logits (N, C).

        Args:
            label: the right class of each image, (N,) ints.
            uncertainty: of the classes, a tensor (C,), or None.
        """
        log_p = logits.log_softmax(dim=1).numpy()
        own = np.take_along_axis(log_p, label[:, None], axis=1)
        chosen = log_p.argmax(axis=1)
        return cls(
            rank=1 + (log_p > own).sum(axis=1),
            log_p=own[:, 0],
            confidence=np.exp(log_p.max(axis=1)),
            uncertainty=None if uncertainty is None else uncertainty.numpy()[chosen],
        )

    def measure(self, weight=None):
        """The metrics: {name: float}; with a weight (R, N), those that take one: {name: (R,)}."""
        correct = self.rank == 1
        measured = {
            "top-1": metrics.mean(correct, weight),
            "top-5": metrics.mean(self.rank <= 5, weight),
            "NLL": metrics.mean(-self.log_p, weight),
            "AURC by p": metrics.aurc(correct, -self.confidence, weight),
        }
        if self.uncertainty is not None:
            measured["AURC by class"] = metrics.aurc(correct, self.uncertainty, weight)
        if weight is not None:
            return measured
        measured["ECE"] = calibration_error(self.confidence, correct)
        measured["AUROC by p"] = metrics.auroc(correct, -self.confidence)
        if self.uncertainty is not None:
            measured["AUROC by class"] = metrics.auroc(correct, self.uncertainty)
        return measured


def calibration_error(confidence, correct):
    """ECE over 20 bins of equal width: sum_b (n_b / N) |accuracy_b - mean confidence_b|."""
    bin_of_image = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(bin_of_image, weights=confidence - correct)
    return float(np.abs(gap).sum() / len(correct))


@torch.inference_mode()
def classify(prompts, label, resamples):
    """All weightings and scores of one scorer.

    Args:
        label: the right class of each image, (N,) ints.
    Returns: {(weighting, score): (metrics, their resamples)}.
    """
    results = {}
    for weighting, weights in weightings_of(prompts).items():
        uncertainty = None
        if prompts.uncertainty is not None:
            uncertainty = (weights * prompts.uncertainty).sum(dim=1)
        for score, function in SCORES.items():
            logits = function(prompts, weights)
            if logits is None:
                continue
            answers = Answers.of(logits, label, uncertainty)
            draws = {}
            if resamples:
                draws = bootstrap.resample(answers.measure, np.arange(len(label)), resamples)
            results[weighting, score] = answers.measure(), draws
    return results


def labels_of(cache):
    """The class of every image of a cache, (N,) ints, by the folder in its name.

    Raises: UserError if an image is of no class.
    """
    classes, _ = classes_of(cache)
    number_of = {folder: number for number, (folder, _) in enumerate(classes)}
    labels = []
    for image in cache.images:
        folder = image.partition("/")[0]
        need(folder in number_of, f"{cache.folder}: {image} is of no class; make the cache anew")
        labels.append(number_of[folder])
    return np.array(labels)


def answer(cache, adaptors, resamples):
    """What `classify` finds: {(method, seed): ...}, the frozen CLIP first, whose seed is None."""
    label = labels_of(cache)
    results = {("frozen CLIP", None): classify(frozen_prompts(cache), label, resamples)}
    for (method, seed), adaptor in adaptors.items():
        results[method, seed] = classify(prompts_of(adaptor, cache), label, resamples)
    return results
