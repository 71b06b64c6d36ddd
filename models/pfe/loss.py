"""PFE's loss: how likely it is that the two halves of a true pair are draws of one and the same latent point."""

from torch.nn import functional as F

from models.layers import full_precision

VARIANCE_MIN = 1e-6  # the loss divides by it, and softplus(-104) is 0; a deviation of 0.001 is none to a raw CLIP


@full_precision
def variance(x):
    """softplus(x), at least 1e-6, of any shape."""
    return F.softplus(x).clamp_min(VARIANCE_MIN)


@full_precision
def mutual_likelihood_loss(mean_image, var_image, mean_text, var_text):
    """mean_b sum_d [ (mean_image - mean_text)^2 / (var_image + var_text) + log(var_image + var_text) ].

    That is twice the negative mutual likelihood score, less the constant D log 2 pi, of B true pairs.
    Args: all (B, D), variances > 0.
    Returns: ().
    Source: Shi & Jain, "Probabilistic face embeddings", arXiv 1904.09658, eq. 3.
    """
    var = var_image + var_text  # (B, D)
    return ((mean_image - mean_text) ** 2 / var + var.log()).sum(dim=-1).mean()
