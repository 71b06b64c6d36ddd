"""ProLIP's loss: probabilistic pairwise contrastive loss (PPCL) and information bottleneck (VIB), arXiv 2410.18857."""

import math

import torch
from torch.nn import functional as F

from models.layers import full_precision, pairwise_products, pairwise_sigmoid_loss, total_variance

LOGIT_SCALE, LOGIT_BIAS = 1.0, 0.0  # fixed in the paper's code; ProLIP itself learns them
VIB_BETA = 1e-5  # weight of the information bottleneck, as in the paper's code

# The authors' own, which the paper's code leaves out or changes (arXiv 2410.18857, sec. 3, and their code).
ORIGINAL_VIB_BETA = 1e-4
INCLUSION_WEIGHT = 1e-7  # of the inclusion loss, image in text
INCLUSION_SCALE, INCLUSION_EPS = 1000.0, -20.0  # of the difference's logit; added to -log_var


@full_precision
def pairwise_logits(mean_image, log_var_image, mean_text, log_var_text, scale=LOGIT_SCALE, bias=LOGIT_BIAS):
    """scale (mean_i . mean_j - sum_d (exp log_var_i + exp log_var_j) / 2) + bias, (N, D) and (M, D) -> (N, M).

    Source: Chun et al., "Probabilistic language-image pre-training", arXiv 2410.18857, the logit of the PPCL.
    """
    variances = total_variance(log_var_image)[:, None] + total_variance(log_var_text)  # (N, M)
    return scale * (pairwise_products(mean_image, mean_text) - variances / 2) + bias


@full_precision
def information_bottleneck(mean, log_var):
    """-mean_bd (1 + v/2 - mean^2 - exp(v/2)) / 2, with v = log_var, (B, D) -> ().

    The authors' form: v/2 where the divergence from a standard normal has v. No guard against terms above 10,000.
    """
    return -(1 + log_var / 2 - mean.square() - (log_var / 2).exp()).mean() / 2


@full_precision  # once, here: gradients of what the terms share are then summed in float32, too
def prolip_loss(mean_image, log_var_image, mean_text, log_var_text):
    """sum_ij -log sigmoid(+-logit_ij) / B, + where i = j, plus VIB_BETA times each modality's VIB; (B, D) -> ()."""
    logits = pairwise_logits(mean_image, log_var_image, mean_text, log_var_text)  # (B, B)
    bottleneck = information_bottleneck(mean_image, log_var_image) + information_bottleneck(mean_text, log_var_text)
    return pairwise_sigmoid_loss(logits) / len(logits) + VIB_BETA * bottleneck


@full_precision
def original_loss(mean_image, log_var_image, mean_text, log_var_text, log_scale, bias):
    """PPCL with exp(log_scale) and bias + 1e-4 (KL_image + KL_text) + 1e-7 I(image, text), (B, D) each -> ().

    KL: `information_bottleneck`. I: `inclusion_loss`, image in text. Source: arXiv 2410.18857, without masked inputs.
    """
    image, text = (mean_image, log_var_image), (mean_text, log_var_text)
    logits = pairwise_logits(*image, *text, log_scale.exp(), bias)  # (B, B)
    bottleneck = information_bottleneck(*image) + information_bottleneck(*text)
    inclusion = INCLUSION_WEIGHT * inclusion_loss(*image, *text)
    return pairwise_sigmoid_loss(logits) / len(logits) + ORIGINAL_VIB_BETA * bottleneck + inclusion


@full_precision
def inclusion_loss(mean, log_var, other_mean, other_log_var):
    """I(1, 2) = mean_bd -log sigmoid(1000 [H(1, 2) - H(2, 1)]), small if Gaussian 1 is included in 2, (B, D) -> ().

    Source: arXiv 2410.18857, sec. 3. H: `inclusion`.
    """
    one, other = (mean, log_var), (other_mean, other_log_var)
    return -F.logsigmoid(INCLUSION_SCALE * (inclusion(*one, *other) - inclusion(*other, *one))).mean()


@full_precision
def inclusion(mean, log_var, other_mean, other_log_var):
    """H(1, 2) = -2 s1 - s2 - log(A)/2 + Q^2/(4A) - C, after the log integral of p_1^2 p_2, of every coordinate.

    s = log_var, p = exp(-s1 - 20), q = exp(-s2 - 20), A = p + q/2, Q = 2 mean_1 p + mean_2 q, C = mean_1^2 p +
    mean_2^2 q/2. The last two terms are -(mean_1 - mean_2)^2 p (q/2) / A, in which nothing cancels.
    Args: all (B, D).
    Returns: (B, D).
    """
    log_p, log_half_q = INCLUSION_EPS - log_var, INCLUSION_EPS - other_log_var - math.log(2)
    log_a = torch.logaddexp(log_p, log_half_q)
    overlap = (log_p + log_half_q - log_a).exp()  # p (q/2) / A
    return -2 * log_var - other_log_var - log_a / 2 - overlap * (mean - other_mean).square()
