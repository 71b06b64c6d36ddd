"""PCME++'s loss: the logit of a pair falls linearly with the expected squared distance."""

import torch
from torch.nn import functional as F

from models.layers import (
    full_precision,
    pairwise_products,
    pairwise_sigmoid_loss,
    same_rows,
    total_variance,
)

# The author's own terms, which AsymVLM's repository leaves out (arXiv 2305.18171, sec. 3).
SMOOTHING = 1e-4  # a match has the label 1 - 1e-4, any other pair 1e-4
VIB_WEIGHT = 1e-4  # of each modality's information bottleneck
PSEUDO_WEIGHT = 0.1  # of the pseudo-positives of rows and of columns


@full_precision
def closed_form_sampled_distance(mean_image, log_var_image, mean_text, log_var_text):
    """Expected squared distance between two draws, one from each Gaussian of a pair, for all pairs.

    d(i, j) = ||mean_i - mean_j||^2 + sum_d (exp log_var_i + exp log_var_j). This is a matrix
    product plus row and column sums; the (B, B, D) tensor of the definition would take 8.6 GB at
    B = 2048, D = 512.

    Args: images (N, D) each, texts (M, D) each.
    Returns: (N, M), >= 0.
    Source: Chun, "Improved probabilistic image-text representations", arXiv 2305.18171, eq. 1.
    """
    norm_image = mean_image.square().sum(dim=-1)[:, None]  # (N, 1)
    norm_text = mean_text.square().sum(dim=-1)  # (M,)
    between_means = norm_image + norm_text - 2 * pairwise_products(mean_image, mean_text)  # (N, M)
    between_means = between_means.clamp_min(0)  # rounding can make it negative
    return between_means + total_variance(log_var_image)[:, None] + total_variance(log_var_text)


@full_precision
def matching_loss(mean_image, log_var_image, mean_text, log_var_text, shift, negative_scale):
    """2 mean_ij BCE(sigmoid(-negative_scale d(i, j) + shift), [i = j]) of B true pairs.

    Args: (B, D) each; shift and negative_scale are scalars.
    Returns: ().
    Source: twice arXiv 2305.18171, eq. 2, as in AsymVLM's repository.
    """
    distance = closed_form_sampled_distance(mean_image, log_var_image, mean_text, log_var_text)
    logits = shift - negative_scale * distance  # (B, B)
    return 2 * pairwise_sigmoid_loss(logits) / logits.numel()


@full_precision
def original_loss(mean_image, log_var_image, mean_text, log_var_text, shift, negative_scale):
    """2 BCE(M) + 0.1 (BCE(M_rows) + BCE(M_columns)) + 1e-4 (KL_image + KL_text) of B true pairs.

    BCE(labels) is `soft_cross_entropy` of the logits shift - negative_scale d(i, j). M_ij is
    whether text j describes image i; images with equal means are one image. M_rows and M_columns
    also count the `pseudo_positives` of rows and of columns as matches. KL:
    `kl_to_standard_normal`.

    Args: (B, D) each; shift and negative_scale are scalars.
    Returns: the terms by name, () each, weighted so that their sum is the loss.
    Source: arXiv 2305.18171, sec. 3, with the weights of the author's code.
    """
    distance = closed_form_sampled_distance(mean_image, log_var_image, mean_text, log_var_text)
    logits = shift - negative_scale * distance  # (B, B)
    match = same_rows(mean_image)  # (B, B)
    by_row = match | pseudo_positives(logits, match)
    by_column = match | pseudo_positives(logits.T, match.T).T  # the same for the transpose
    pseudo = soft_cross_entropy(logits, by_row) + soft_cross_entropy(logits, by_column)
    return {
        "matching": 2 * soft_cross_entropy(logits, match),
        "pseudo_positives": PSEUDO_WEIGHT * pseudo,
        "kl_image": VIB_WEIGHT * kl_to_standard_normal(mean_image, log_var_image),
        "kl_text": VIB_WEIGHT * kl_to_standard_normal(mean_text, log_var_text),
    }


def soft_cross_entropy(logits, match):
    """Mean cross-entropy over all pairs, with smoothed labels: (B, B) each -> ().

    The label is 1 - 1e-4 for a match and 1e-4 for any other pair.
    """
    labels = SMOOTHING + (1 - 2 * SMOOTHING) * match.to(logits)
    return F.binary_cross_entropy_with_logits(logits, labels)


def pseudo_positives(logits, match):
    """Which j of row i have at least the logit of the row's first match: (B, B) -> (B, B), bool.

    The first match is the true pair (i, i), unless an image is more than once in the batch.

    Args: match: (B, B) bool, with at least one match per row.
    """
    first_match = match.to(torch.uint8).argmax(dim=1, keepdim=True)  # (B, 1)
    return logits >= logits.gather(1, first_match)


@full_precision
def kl_to_standard_normal(mean, log_var):
    """-mean_bd (1 + log_var - mean^2 - exp(log_var)) / 2, (B, D) each -> ().

    This is the divergence from a standard normal distribution, the paper's VIB.
    """
    return -(1 + log_var - mean.square() - log_var.exp()).mean() / 2
