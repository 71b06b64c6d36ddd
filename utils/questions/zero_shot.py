"""Zero-shot classification with uncertain prompts, on a cache of --dataset imagefolder.

Each of C classes has P prompts, such as "a photo of a dog". For prompt p of class c,

- t_cp is its unit mean, u_cp its uncertainty, and v_cpd its variance in dimension d (of Gaussians)
- pi_cp is its weight; the weights of the prompts of a class sum to 1

The vector of a class is w_c = sum_p pi_cp t_cp, and x is the unit mean of an image. The image
belongs to the class with the largest score:

- plain: s x . w_c, where s is the CLIP's logit scale
- unit: s x . w_c / ||w_c||, as CLIP does it
- variance: 100 x . w_c - 50 sum_d sum_p pi_cp^2 v_cpd for Gaussians; sum_p pi_cp log p(x | text_cp)
  for AsymVLM
- probit: the logits of BayesVLM, whose softmax is flatter where embeddings are uncertain

Sources: PCME++ (arXiv 2305.18171, appendix), ProLIP (arXiv 2410.18857, sec. 4, and its script),
BayesVLM (arXiv 2412.06014) for probit.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.layers import unit
from utils.cli import UserError, need
from utils.evaluation import bootstrap, metrics
from utils.evaluation.training_free import logit_scale

BINS = 20  # of the expected calibration error
VARIANCE_SCALE = 100.0  # of the cosine in the variance-aware score
# Bayesian prompt re-weighting.
BPRW_PRIOR = 5.0  # of the Dirichlet distribution
BPRW_IMAGES = 10  # nearest images of a class
BPRW_SAMPLES = 10  # of each image
BPRW_EPS = 0.02  # added to the variances of the prompts
BPRW_STEPS = 1000  # of EM, at most
BPRW_TOLERANCE = 1e-12  # EM has converged if no weight changes by as much


@dataclass
class Prompts:
    """The prompts of all classes and the images of a split, embedded by one method; float64.

    Attributes:
        text: unit means of the prompts, (C, P, D).
        image: unit means of the images, (N, D).
        uncertainty: of the prompts, (C, P); None if the method gives texts none.
        text_variance, image_variance: of the same scale as the unit means, (C, P, D) and (N, D);
            None if the method has no Gaussians.
        log_likelihood: log p(image | prompt), (N, C, P); None if the method has none.
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
    """The classes of a cache.

    Returns:
        classes: list of [folder, name].
        prompts_per_class: P.
    Raises: UserError if the cache has no classes.
    """
    classes = cache.meta.get("classes")
    prompts_per_class = cache.meta.get("prompts_per_class")
    if not classes or not prompts_per_class:
        cure = "make a cache with --dataset imagefolder"
        raise UserError(f"--zero-shot: {cache.folder}: it has no classes; {cure}")
    return classes, prompts_per_class


def frozen_prompts(cache):
    """The Prompts of the frozen CLIP, which has no uncertainty."""
    text = unit(_float64(cache.text.read()))
    image = unit(_float64(cache.image.read()))
    return Prompts(_by_class(text, cache), image, scale=logit_scale(cache))


@torch.inference_mode()
def prompts_of(adaptor, cache):
    """The Prompts of an adaptor."""
    encoded_text = adaptor.encode_text(cache.text.read().to(cache.device).float())
    encoded_image = adaptor.encode_image(cache.image.read().to(cache.device).float())
    text_mean, uncertainty = adaptor.describe_text(*encoded_text)
    image_mean, _ = adaptor.describe_image(*encoded_image)
    text_mean = _float64(text_mean)
    image_mean = _float64(image_mean)
    prompts = Prompts(
        text=_by_class(unit(text_mean), cache),
        image=unit(image_mean),
        scale=logit_scale(cache),
    )
    if uncertainty is not None:
        prompts.uncertainty = _by_class(_float64(uncertainty), cache)
    text_variance = adaptor.variance_of(*encoded_text)
    image_variance = adaptor.variance_of(*encoded_image)
    if text_variance is not None and image_variance is not None:
        # Where a mean is divided by its norm, its variance is divided by the squared norm.
        text_variance = _float64(text_variance) / _squared_norm(text_mean)
        prompts.text_variance = _by_class(text_variance, cache)
        prompts.image_variance = _float64(image_variance) / _squared_norm(image_mean)
    if hasattr(adaptor, "log_likelihood"):  # AsymVLM, whose score is the log-likelihood
        scores = _float64(adaptor.score(encoded_image, encoded_text))  # (N, C P)
        prompts.log_likelihood = scores.unflatten(1, prompts.text.shape[:2])
    return prompts


def _float64(values):
    return values.cpu().double()


def _squared_norm(values):
    """Of each row (N, D): (N, 1)."""
    return values.square().sum(dim=1, keepdim=True)


def _by_class(values, cache):
    """Group values of all captions by class: (C P, ...) -> (C, P, ...)."""
    _, prompts_per_class = classes_of(cache)
    return values.unflatten(0, (-1, prompts_per_class))


# The weights pi of the prompts of each class, (C, P). The weights of a class sum to 1.


def uniform_weights(prompts):
    """1 / P for every prompt."""
    classes, prompts_per_class, _ = prompts.text.shape
    return torch.full((classes, prompts_per_class), 1 / prompts_per_class, dtype=torch.float64)


def top_weights(prompts, count):
    """1 / K for the K least uncertain prompts of each class, 0 for the others. Args: count: K."""
    order = prompts.uncertainty.argsort(dim=1, stable=True)
    least_uncertain = order[:, :count]
    weights = torch.zeros_like(prompts.uncertainty)
    return weights.scatter(1, least_uncertain, 1 / count)


def threshold_weights(prompts):
    """Equal weights for the prompts that are no more uncertain than the mean of their class."""
    u = prompts.uncertainty
    limit = u.mean(dim=1, keepdim=True)
    # Rounding of the mean must not leave a class without a prompt.
    is_smallest = u == u.amin(dim=1, keepdim=True)
    is_kept = (u <= limit) | is_smallest
    count = is_kept.sum(dim=1, keepdim=True)
    return is_kept.to(u.dtype) / count


def inverse_weights(prompts):
    """Proportional to 1 / u; for AsymVLM that is kappa."""
    inverse = 1 / prompts.uncertainty
    return inverse / inverse.sum(dim=1, keepdim=True)


def bprw_weights(prompts):
    """Bayesian prompt re-weighting: how well each prompt explains the images nearest to its class.

    For each class, 10 samples are drawn from the Gaussian of each of the 10 images that are nearest
    to the mean prompt. The Gaussians of the prompts, with eps added to their variances, are a
    mixture. Its weights are fitted to the samples.
    Source: ProLIP, sec. 4.
    """
    generator = torch.Generator().manual_seed(0)
    weights = []
    for text, text_variance in zip(prompts.text, prompts.text_variance, strict=True):  # (P, D) each
        cosine = prompts.image @ unit(text.mean(dim=0))  # (N,)
        nearest = cosine.argsort(descending=True, stable=True)[:BPRW_IMAGES]
        mean = prompts.image[nearest, None]  # (images, 1, D)
        std = prompts.image_variance[nearest, None].sqrt()
        shape = (len(nearest), BPRW_SAMPLES, text.shape[1])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        samples = (mean + std * noise).flatten(0, 1)  # (images * samples, D)
        first_weights = 1 / text_variance.mean(dim=1)
        fitted = fit_mixture(samples, text, text_variance + BPRW_EPS, first_weights)
        weights.append(fitted)
    return torch.stack(weights)


def fit_mixture(samples, mean, variance, start, prior=BPRW_PRIOR):
    """Fit the weights of a mixture of P fixed diagonal Gaussians to n samples by EM.

    The E step is r_np proportional to pi_p N(o_n; mean_p, variance_p). The M step is
    pi_p = (sum_n r_np + a - 1) / (n + P (a - 1)), under a Dirichlet prior a. Negative weights,
    which a < 1 can give, become 0.

    Args:
        samples: o, (n, D).
        mean, variance: (P, D).
        start: the first weights up to a factor, (P,).
        prior: a.
    Returns: pi, (P,).
    """
    difference = samples[:, None] - mean  # (n, P, D)
    log_density = -(difference.square() / variance + variance.log()).sum(dim=2) / 2  # (n, P)
    weights = start / start.sum()
    total = len(samples) + len(mean) * (prior - 1)
    for _ in range(BPRW_STEPS):
        responsibility = (weights.log() + log_density).softmax(dim=1)  # (n, P)
        count = responsibility.sum(dim=0) + prior - 1
        new_weights = (count / total).clamp(min=0)
        new_weights = new_weights / new_weights.sum()
        change = (new_weights - weights).abs().max()
        weights = new_weights
        if change < BPRW_TOLERANCE:
            break
    return weights


def weightings_of(prompts):
    """All weights that the method allows, {name: (C, P)}."""
    weightings = {"uniform": uniform_weights(prompts)}
    prompts_per_class = prompts.text.shape[1]
    if prompts.uncertainty is not None:
        for count in range(1, prompts_per_class + 1):
            weightings[f"top {count}"] = top_weights(prompts, count)
        weightings["threshold"] = threshold_weights(prompts)
        weightings["inverse"] = inverse_weights(prompts)
    if prompts.text_variance is not None:
        weightings["BPRW"] = bprw_weights(prompts)
    return weightings


# The logits of all classes, (N, C).


def class_vectors(prompts, weights):
    """w_c = sum_p pi_cp t_cp, (C, D)."""
    return (weights[..., None] * prompts.text).sum(dim=1)


def class_variances(prompts, weights):
    """The variance of w_c, sum_p pi_cp^2 v_cp, (C, D)."""
    return (weights.square()[..., None] * prompts.text_variance).sum(dim=1)


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
    variance = class_variances(prompts, weights).sum(dim=1)  # (C,)
    return VARIANCE_SCALE * cosine - VARIANCE_SCALE / 2 * variance


def probit_logits(prompts, weights):
    """s E / sqrt(1 + pi s^2 V / 8), where E and V are the mean and variance of an uncertain cosine.
    Here pi is the number 3.14...

    With means z and variances a of an image i and a class t, and n = sum_d (z^2 + a),
    E = z_i . z_t / sqrt(n_i n_t) and V = sum_d [(z_i^2 + a_i) a_t + a_i z_t^2] / (n_i n_t).

    Returns: None if the method has no variances.
    """
    if prompts.text_variance is None:
        return None
    z_text = class_vectors(prompts, weights)  # (C, D)
    a_text = class_variances(prompts, weights)
    z_image = prompts.image  # (N, D)
    a_image = prompts.image_variance
    second_moment_text = z_text.square() + a_text
    second_moment_image = z_image.square() + a_image
    n = second_moment_image.sum(dim=1)[:, None] * second_moment_text.sum(dim=1)  # (N, C): n_i n_t
    mean = z_image @ z_text.T / n.sqrt()
    variance = (second_moment_image @ a_text.T + a_image @ z_text.square().T) / n
    s = prompts.scale
    return s * mean / (1 + math.pi * s**2 * variance / 8).sqrt()


LOGITS = {
    "plain": plain_logits,
    "unit": unit_logits,
    "variance": variance_logits,
    "probit": probit_logits,
}


# Metrics.


@dataclass
class Answers:
    """How every image was classified: arrays (N,).

    Attributes:
        rank: of the right class; 1 is the best.
        log_p: log probability of the right class.
        confidence: probability of the chosen class.
        uncertainty: of the chosen class, or None.
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
        log_p_right = np.take_along_axis(log_p, label[:, None], axis=1)  # (N, 1)
        if uncertainty is not None:
            chosen_class = log_p.argmax(axis=1)
            uncertainty = uncertainty.numpy()[chosen_class]
        return cls(
            rank=1 + (log_p > log_p_right).sum(axis=1),
            log_p=log_p_right[:, 0],
            confidence=np.exp(log_p.max(axis=1)),
            uncertainty=uncertainty,
        )

    def measure(self, weight=None):
        """The metrics, {name: float}.

        Args: weight: (R, N), how often each image counts (metrics.py). With it, the result is
            {name: (R,)}, without ECE and AUROC, which take no weight.
        """
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
        share_of_image = 1 / len(correct)
        measured["ECE"] = metrics.calibration_error(self.confidence, correct, share_of_image, BINS)
        measured["AUROC by p"] = metrics.auroc(correct, -self.confidence)
        if self.uncertainty is not None:
            measured["AUROC by class"] = metrics.auroc(correct, self.uncertainty)
        return measured


@torch.inference_mode()
def classify(prompts, label, resamples):
    """Classify the images of a method with every weighting and score.

    Args:
        prompts: Prompts.
        label: the right class of each image, (N,) ints.
        resamples: how many resamples of the images the bootstrap draws, or 0.
    Returns: {(weighting, score): ({metric: float}, {metric: its resamples (R,)})}.
    """
    results = {}
    for weighting, weights in weightings_of(prompts).items():
        uncertainty = None
        if prompts.uncertainty is not None:
            uncertainty = (weights * prompts.uncertainty).sum(dim=1)
        for score, logits_of in LOGITS.items():
            logits = logits_of(prompts, weights)
            if logits is None:
                continue
            answers = Answers.of(logits, label, uncertainty)
            draws = {}
            if resamples:
                images = np.arange(len(label))  # each is its own query
                draws = bootstrap.resample(answers.measure, images, resamples)
            results[weighting, score] = (answers.measure(), draws)
    return results


def labels_of(cache):
    """The class of every image of a cache, (N,) ints. The folder in an image's name tells it.

    Raises: UserError if an image belongs to no class.
    """
    classes, _ = classes_of(cache)
    class_of_folder = {folder: number for number, (folder, _) in enumerate(classes)}
    labels = []
    for image in cache.images:
        folder = image.partition("/")[0]
        problem = f"{image} belongs to no class"
        need(folder in class_of_folder, f"{cache.folder}: {problem}; rebuild the cache")
        labels.append(class_of_folder[folder])
    return np.array(labels)


def classify_with_all(cache, adaptors, resamples):
    """Classify the images of a cache with the frozen CLIP and with adaptors.

    Args:
        cache: EmbeddingCache of --dataset imagefolder.
        adaptors: {(method, seed): Adaptor}.
        resamples: as for `classify`.
    Returns: {(method, seed): what `classify` returns}. The first is ("frozen CLIP", None).
    """
    label = labels_of(cache)
    results = {("frozen CLIP", None): classify(frozen_prompts(cache), label, resamples)}
    for (method, seed), adaptor in adaptors.items():
        results[method, seed] = classify(prompts_of(adaptor, cache), label, resamples)
    return results
