"""ProLIP's loss: pairwise contrastive loss (PPCL) and information bottleneck (VIB).

Source: Chun et al., "Probabilistic language-image pre-training", arXiv 2410.18857.
"""

import math

import torch
from torch.nn import functional as F

from models.layers import (
    full_precision,
    pairwise_products,
    pairwise_sigmoid_loss,
    total_variance,
)

# Of AsymVLM's repository. ProLIP's authors learn scale and bias.
LOGIT_SCALE = 1.0
LOGIT_BIAS = 0.0
VIB_BETA = 1e-5  # weight of the information bottleneck

# Of the authors' own code, for terms that AsymVLM's repository leaves out or changes.
ORIGINAL_VIB_BETA = 1e-4
INCLUSION_WEIGHT = 1e-7  # of the inclusion of the image in the text
INCLUSION_SCALE = 1000.0  # multiplies the difference of the two inclusions
INCLUSION_EPS = -20.0  # added to -log_var


@full_precision
def pairwise_logits(
    mean_image,
    log_var_image,
    mean_text,
    log_var_text,
    scale=LOGIT_SCALE,
    bias=LOGIT_BIAS,
):
    """scale (mean_i . mean_j - sum_d (exp log_var_i + exp log_var_j) / 2) + bias.

    Args: images (N, D) each, texts (M, D) each.
    Returns: (N, M).
    Source: arXiv 2410.18857, the logit of the PPCL.
    """
    products = pairwise_products(mean_image, mean_text)  # (N, M)
    variances = total_variance(log_var_image)[:, None] + total_variance(log_var_text)  # (N, M)
    return scale * (products - variances / 2) + bias


@full_precision
def information_bottleneck(mean, log_var):
    """-mean_bd (1 + v/2 - mean^2 - exp(v/2)) / 2, with v = log_var, (B, D) each -> ().

    The authors' form: it has v/2 where the divergence from a standard normal distribution has v.
    Their guard against values above 10,000 is left out.
    """
    return -(1 + log_var / 2 - mean.square() - (log_var / 2).exp()).mean() / 2


# The terms share their arguments. These are raised here, so that the gradients of the terms add up
# in float32.
@full_precision
def prolip_loss(mean_image, log_var_image, mean_text, log_var_text):
    """sum_ij -log sigmoid(s_ij logit_ij) / B + 1e-5 (VIB_image + VIB_text), s_ii = 1, else -1.

    Args: (B, D) each.
    Returns: the terms by name, () each, weighted so that their sum is the loss.
    """
    logits = pairwise_logits(mean_image, log_var_image, mean_text, log_var_text)  # (B, B)
    return {
        "contrastive": pairwise_sigmoid_loss(logits) / len(logits),
        "kl_image": VIB_BETA * information_bottleneck(mean_image, log_var_image),
        "kl_text": VIB_BETA * information_bottleneck(mean_text, log_var_text),
    }


@full_precision
def original_loss(mean_image, log_var_image, mean_text, log_var_text, log_scale, bias):
    """PPCL with exp(log_scale) and bias + 1e-4 (KL_image + KL_text) + 1e-7 I(image, text).

    KL: `information_bottleneck`. I: `inclusion_loss`, of the image in the text.

    Args: (B, D) each; log_scale and bias are scalars.
    Returns: the terms by name, () each, weighted so that their sum is the loss.
    Source: arXiv 2410.18857, without masked inputs.
    """
    image = (mean_image, log_var_image)
    text = (mean_text, log_var_text)
    logits = pairwise_logits(*image, *text, log_scale.exp(), bias)  # (B, B)
    return {
        "contrastive": pairwise_sigmoid_loss(logits) / len(logits),
        "kl_image": ORIGINAL_VIB_BETA * information_bottleneck(*image),
        "kl_text": ORIGINAL_VIB_BETA * information_bottleneck(*text),
        "inclusion": INCLUSION_WEIGHT * inclusion_loss(*image, *text),
    }


@full_precision
def inclusion_loss(mean, log_var, other_mean, other_log_var):
    """I(1, 2) = mean_bd -log sigmoid(1000 [H(1, 2) - H(2, 1)]), (B, D) each -> ().

    It is small if Gaussian 1 is included in Gaussian 2. H: `inclusion`.
    Source: arXiv 2410.18857, sec. 3.
    """
    forward = inclusion(mean, log_var, other_mean, other_log_var)  # (B, D)
    backward = inclusion(other_mean, other_log_var, mean, log_var)
    return -F.logsigmoid(INCLUSION_SCALE * (forward - backward)).mean()


@full_precision
def inclusion(mean, log_var, other_mean, other_log_var):
    """H(1, 2) = -2 s1 - s2 - log(A)/2 + Q^2/(4A) - C per coordinate, (B, D) each -> (B, D).

    The authors' form: with densities f and s = log_var, the log integral of f_1^2 f_2 would have
    -s1 - s2/2 in place of -2 s1 - s2. Here p = exp(-s1 - 20), q = exp(-s2 - 20), A = p + q/2,
    Q = 2 mean_1 p + mean_2 q and C = mean_1^2 p + mean_2^2 q/2. The last two terms are equal to
    -(mean_1 - mean_2)^2 p (q/2) / A, in which nothing cancels.
    """
    log_p = INCLUSION_EPS - log_var
    log_half_q = INCLUSION_EPS - other_log_var - math.log(2)
    log_a = torch.logaddexp(log_p, log_half_q)
    overlap = (log_p + log_half_q - log_a).exp()  # p (q/2) / A
    distance = overlap * (mean - other_mean).square()
    return -2 * log_var - other_log_var - log_a / 2 - distance
