"""PCME++'s loss: the expected squared distance of two Gaussians as the logit of a match, over all pairs of a batch."""

from models.layers import full_precision, pairwise_products, pairwise_sigmoid_loss, total_variance


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
