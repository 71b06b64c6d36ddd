"""PCME++'s loss: the expected squared distance of two Gaussians as the logit of a match, over all pairs of a batch."""

from torch.nn import functional as F

from models.layers import full_precision, pairwise_products, pairwise_sigmoid_loss, same_rows, total_variance

# The author's own, which the paper's code leaves out (arXiv 2305.18171, sec. 3, and the author's code).
SMOOTHING = 1e-4  # a match has the label 1 - 1e-4, another pair 1e-4
VIB_WEIGHT = 1e-4  # of each modality's information bottleneck
PSEUDO_WEIGHT = 0.1  # of the pseudo-positives of rows and of columns


@full_precision
def closed_form_sampled_distance(mean_image, log_var_image, mean_text, log_var_text):
    """The expected squared distance of a draw from each Gaussian, for all pairs: (N, D) and (M, D) -> (N, M), >= 0.

    d(i, j) = ||mean_i - mean_j||^2 + sum_d (exp log_var_i + exp log_var_j): a matmul plus row and column sums, where
    the (B, B, D) tensor of the definition would take 8.6 GB at B = 2048, D = 512.
    Source: Chun, "Improved probabilistic image-text representations", arXiv 2305.18171, eq. 1.
    """
    norms = mean_image.square().sum(dim=-1)[:, None] + mean_text.square().sum(dim=-1)  # (N, M)
    between = norms - 2 * pairwise_products(mean_image, mean_text)  # rounding brings equal means below 0
    return between.clamp_min(0) + total_variance(log_var_image)[:, None] + total_variance(log_var_text)


@full_precision
def matching_loss(mean_image, log_var_image, mean_text, log_var_text, shift, negative_scale):
    """2 mean_ij BCE(sigmoid(-negative_scale d(i, j) + shift), [i = j]), of B true pairs: (B, D) each, scalars -> ().

    Source: arXiv 2305.18171, eq. 2, twice, as in the paper's code.
    """
    distance = closed_form_sampled_distance(mean_image, log_var_image, mean_text, log_var_text)  # (B, B)
    return 2 * pairwise_sigmoid_loss(shift - negative_scale * distance) / distance.numel()


@full_precision
def original_loss(mean_image, log_var_image, mean_text, log_var_text, shift, negative_scale):
    """2 BCE(logit, M) + 0.1 (P_rows + P_columns) + 1e-4 (KL_image + KL_text), of B true pairs: (B, D) each -> ().

    logit_ij = -negative_scale d(i, j) + shift; BCE is the mean over all pairs. M_ij is whether text j describes image
    i, of which equal means are the same one; labels are smoothed. P_rows and P_columns: `pseudo_positives`. KL:
    `information_bottleneck`.
    Source: arXiv 2305.18171, sec. 3, with the weights of the author's code.
    """
    distance = closed_form_sampled_distance(mean_image, log_var_image, mean_text, log_var_text)  # (B, B)
    logits, match = shift - negative_scale * distance, same_rows(mean_image)
    pseudo = soft_cross_entropy(logits, match | pseudo_positives(logits))
    pseudo = pseudo + soft_cross_entropy(logits, match | pseudo_positives(logits.T).T)
    bottleneck = information_bottleneck(mean_image, log_var_image) + information_bottleneck(mean_text, log_var_text)
    return 2 * soft_cross_entropy(logits, match) + PSEUDO_WEIGHT * pseudo + VIB_WEIGHT * bottleneck


def soft_cross_entropy(logits, match):
    """Mean over all pairs of the cross-entropy with the label 1 - 1e-4 of a match and 1e-4 else, (B, B) each -> ()."""
    labels = SMOOTHING + (1 - 2 * SMOOTHING) * match.to(logits)
    return -(labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits)).mean()


def pseudo_positives(logits):
    """The j whose logit is at least the true pair's, i's own, in row i: (B, B) -> (B, B), bool."""
    return logits >= logits.diagonal()[:, None]


@full_precision
def information_bottleneck(mean, log_var):
    """-mean_bd (1 + log_var - mean^2 - exp(log_var)) / 2, the divergence from a standard normal, (B, D) -> ()."""
    return -(1 + log_var - mean.square() - log_var.exp()).mean() / 2
