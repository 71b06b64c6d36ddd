"""ProbVLM's loss, how well a generalised Gaussian reconstructs both modalities' embeddings; and its variance.

The density of a residual r is beta / (2 alpha Gamma(1/beta)) exp(-(|r| / alpha)^beta): alpha > 0 is the scale, beta > 0
the shape, one each a coordinate. All constants are those of the authors' code.
"""

import torch
from torch.nn import functional as F

from models.layers import full_precision, widest

PARAMETER_EPS = 1e-4  # added to 1/alpha and beta in the loss: log and 1/beta stay finite where softplus is 0
RESIDUAL_RANGE = (1e-4, 1e3)  # of the residual's term: one outlier does not carry the batch
LIKELIHOOD_WEIGHT = 0.05  # of the likelihood, beside the absolute error
CROSS_WEIGHT = 1e-4  # of reconstructing the other modality
INV_ALPHA_EPS, ALPHA_RANGE = 1e-5, (1e-4, 5.0)  # in the variance: 1/alpha may be 0
BETA_OFFSET, BETA_RANGE = 0.1, (0.1, 5.0)  # in the variance: keeps Gamma(3/beta) below 9e30, which float32 holds


@full_precision
def positive(x):
    """softplus(x), of any shape; may underflow to 0."""
    return F.softplus(x)


@full_precision
def probvlm_loss(mean_image, inv_alpha_image, beta_image, z_image, mean_text, inv_alpha_text, beta_text, z_text):
    """fit(image, z_image) + fit(text, z_text) + 1e-4 (fit(image, z_text) + fit(text, z_image)), (B, D) each -> ().

    fit(mean, t) = mean_bd |mean - t| + 0.05 mean_bd [ clamp(|mean - t| a b, 1e-4, 1e3) - log a + lgamma(1/b) - log b ],
    with a = 1/alpha + 1e-4 and b = beta + 1e-4.
    Source: Upadhyay et al., "ProbVLM", arXiv 2307.00398, sec. 3, in the form of the authors' code, whose residual is
    multiplied by beta where the density raises it to that power.
    """
    image = _reconstruction_loss(mean_image, inv_alpha_image, beta_image, z_image, z_text)
    return image + _reconstruction_loss(mean_text, inv_alpha_text, beta_text, z_text, z_image)


def _reconstruction_loss(mean, inv_alpha, beta, z, z_other):
    """fit(mean, z) + 1e-4 fit(mean, z_other), all (B, D) -> (); the normaliser, the same for both, is computed once."""
    a, b = inv_alpha + PARAMETER_EPS, beta + PARAMETER_EPS
    # lgamma(1/b) - log b = lgamma(1 + 1/b), and nothing cancels at large b
    normalizer = (torch.lgamma(1 + 1 / b) - a.log()).mean()

    def fit(target):
        error = (mean - target).abs()  # (B, D)
        return error.mean() + LIKELIHOOD_WEIGHT * ((error * a * b).clamp(*RESIDUAL_RANGE).mean() + normalizer)

    return fit(z) + CROSS_WEIGHT * fit(z_other)


def mean_variance(inv_alpha, beta):
    """`variance`, averaged over the coordinates: (N, D) each -> (N,)."""
    return variance(inv_alpha, beta).mean(dim=-1)


@full_precision
def variance(inv_alpha, beta):
    """alpha^2 Gamma(3/b) / Gamma(1/b), the variance of a generalised Gaussian, of every coordinate.

    alpha = 1 / (inv_alpha + 1e-5), clipped to [1e-4, 5]; b = beta + 0.1, clipped to [0.1, 5].
    Args: inv_alpha (N, D), beta (N, D), both >= 0.
    Returns: (N, D), from 1e-9 to 6e26: the ratio of the Gammas is taken in logarithms.
    Source: arXiv 2307.00398, sec. 3; the clips are the authors' code's.
    """
    alpha = (1 / (inv_alpha + INV_ALPHA_EPS)).clamp(*ALPHA_RANGE)
    b = (beta + BETA_OFFSET).clamp(*BETA_RANGE)
    return alpha.square() * (torch.lgamma(3 / b) - torch.lgamma(1 / b)).exp()


def variance_of_passes(passes):
    """How uncertain several passes through a network with dropout are of each coordinate: aleatoric and epistemic.

    variance(mean_k 1/alpha_k, mean_k beta_k) + sqrt(Var_k[variance_k] Var_k[mean_k]), Var_k with K - 1 below.
    Args: passes: K >= 2 of (mean, 1/alpha, beta), (N, D) each, one after the other; only sums of them are kept.
    Returns: (N, D), up to 1e28, in float64 where the device has it, as the square of a variance is beyond float32.
    Source: arXiv 2307.00398, sec. 3, in the form of the authors' code.
    """
    for k, (mean, inv_alpha, beta) in enumerate(passes, start=1):
        found = [widest(x) for x in (inv_alpha, beta, variance(inv_alpha, beta), mean)]
        if k == 1:
            averages, squares = found, [0.0] * 4
            continue
        shifts = [x - average for x, average in zip(found, averages, strict=True)]
        averages = [average + shift / k for average, shift in zip(averages, shifts, strict=True)]
        squares = [s + shift**2 * (k - 1) / k for s, shift in zip(squares, shifts, strict=True)]  # Welford's
    of_variance, of_mean = (s / (k - 1) for s in squares[2:])
    return variance(*averages[:2]) + (of_variance * of_mean).sqrt()
