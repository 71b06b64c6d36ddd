"""ProbVLM's loss and variance: generalised Gaussians that reconstruct the embeddings.

The density of a residual r is beta / (2 alpha Gamma(1/beta)) exp(-(|r| / alpha)^beta), where
alpha > 0 is the scale and beta > 0 the shape of each coordinate. All constants are those of the
authors' code.
"""

import torch
from torch.nn import functional as F

from models.layers import as_float64, full_precision

# In the loss.
LIKELIHOOD_WEIGHT = 0.05  # relative to the absolute error: the default of the authors' function
ORIGINAL_LIKELIHOOD_WEIGHT = 1e-4  # what the authors' README and notebook pass
PARAMETER_EPS = 1e-4  # added to 1/alpha and beta, so that log and 1/beta are finite at 0
RESIDUAL_RANGE = (1e-4, 1e3)  # so that one outlier does not dominate the batch
CROSS_WEIGHT = 1e-4  # of reconstructing the other modality

# In the variance.
INV_ALPHA_EPS = 1e-5  # 1/alpha may be 0
ALPHA_RANGE = (1e-4, 5.0)
BETA_OFFSET = 0.1
BETA_RANGE = (0.1, 5.0)  # keeps Gamma(3/beta) below 9e30, which float32 can represent


@full_precision
def positive(x):
    """softplus(x), of any shape. It may underflow to 0."""
    return F.softplus(x)


@full_precision
def probvlm_loss(
    mean_image,
    inv_alpha_image,
    beta_image,
    z_image,
    mean_text,
    inv_alpha_text,
    beta_text,
    z_text,
    likelihood_weight=LIKELIHOOD_WEIGHT,
):
    """fit(image, z_image) + fit(text, z_text) + 1e-4 (fit(image, z_text) + fit(text, z_image)).

    fit(mean, t) = mean_bd |mean - t|
                   + w mean_bd [ clamp(|mean - t| a b, 1e-4, 1e3) - log a + lgamma(1/b) - log b ]
    with a = 1/alpha + 1e-4 and b = beta + 1e-4.

    Args:
        likelihood_weight: w, a float. All other arguments are (B, D).
    Returns: the terms by name, () each, weighted so that their sum is the loss.
    Source: Upadhyay et al., "ProbVLM", arXiv 2307.00398, sec. 3, in the form of the authors' code,
        whose residual is multiplied by beta where the density raises it to that power.
    """
    intra_image, cross_image = _fit(
        mean_image, inv_alpha_image, beta_image, z_image, z_text, likelihood_weight
    )
    intra_text, cross_text = _fit(
        mean_text, inv_alpha_text, beta_text, z_text, z_image, likelihood_weight
    )
    return {
        "intra_image": intra_image,
        "intra_text": intra_text,
        "cross_image": CROSS_WEIGHT * cross_image,
        "cross_text": CROSS_WEIGHT * cross_text,
    }


def _fit(mean, inv_alpha, beta, z, z_other, likelihood_weight):
    """fit(mean, z) and fit(mean, z_other), all (B, D) -> () and ()."""
    a = inv_alpha + PARAMETER_EPS
    b = beta + PARAMETER_EPS
    # lgamma(1/b) - log b = lgamma(1 + 1/b), in which nothing cancels at large b
    log_partition = (torch.lgamma(1 + 1 / b) - a.log()).mean()

    def fit(target):
        error = (mean - target).abs()  # (B, D)
        residual = (error * a * b).clamp(*RESIDUAL_RANGE).mean()
        return error.mean() + likelihood_weight * (residual + log_partition)

    return fit(z), fit(z_other)


def mean_variance(inv_alpha, beta):
    """`variance`, averaged over the coordinates: (N, D) each -> (N,)."""
    return variance(inv_alpha, beta).mean(dim=-1)


@full_precision
def variance(inv_alpha, beta):
    """alpha^2 Gamma(3/b) / Gamma(1/b), the variance of a generalised Gaussian, per coordinate.

    alpha = 1 / (inv_alpha + 1e-5), clipped to [1e-4, 5]; b = beta + 0.1, clipped to [0.1, 5].

    Args: inv_alpha and beta, >= 0, of any shape.
    Returns: the same shape, from 3e-9 to 6e26. The ratio of the Gammas is taken in logarithms.
    Source: arXiv 2307.00398, sec. 3; the clips are those of the authors' code.
    """
    alpha = (1 / (inv_alpha + INV_ALPHA_EPS)).clamp(*ALPHA_RANGE)
    b = (beta + BETA_OFFSET).clamp(*BETA_RANGE)
    log_ratio = torch.lgamma(3 / b) - torch.lgamma(1 / b)
    return alpha.square() * log_ratio.exp()


def variance_of_passes(mean, inv_alpha, beta):
    """Aleatoric plus epistemic uncertainty of K >= 2 passes through a network with dropout.

    variance(mean_k 1/alpha_k, mean_k beta_k) + sqrt(Var_k[variance_k] Var_k[mean_k]), where Var_k
    divides by K - 1.

    Args: (K, N, D) each.
    Returns: (N, D), up to 1e28, in float64, because the square of a variance overflows in float32;
        on the CPU if the device has no float64.
    Source: arXiv 2307.00398, sec. 3, in the form of the authors' code.
    """
    average_inv_alpha = as_float64(inv_alpha).mean(dim=0)  # (N, D)
    average_beta = as_float64(beta).mean(dim=0)
    aleatoric = variance(average_inv_alpha, average_beta)
    variance_of_variance = as_float64(variance(inv_alpha, beta)).var(dim=0)
    variance_of_mean = as_float64(mean).var(dim=0)
    epistemic = (variance_of_variance * variance_of_mean).sqrt()
    return aleatoric + epistemic
