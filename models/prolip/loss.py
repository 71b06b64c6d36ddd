"""ProLIP's loss: probabilistic pairwise contrastive loss (PPCL) and information bottleneck (VIB), arXiv 2410.18857."""

from models.layers import full_precision, pairwise_products, pairwise_sigmoid_loss, total_variance

LOGIT_SCALE, LOGIT_BIAS = 1.0, 0.0  # fixed in the paper's code; ProLIP itself learns them
VIB_BETA = 1e-5  # weight of the information bottleneck, as in the paper's code


@full_precision
def pairwise_logits(mean_image, log_var_image, mean_text, log_var_text):
    """scale (mean_i . mean_j - sum_d (exp log_var_i + exp log_var_j) / 2) + bias, (N, D) and (M, D) -> (N, M).

    Source: Chun et al., "Probabilistic language-image pre-training", arXiv 2410.18857, the logit of the PPCL.
    """
    variances = total_variance(log_var_image)[:, None] + total_variance(log_var_text)  # (N, M)
    return LOGIT_SCALE * (pairwise_products(mean_image, mean_text) - variances / 2) + LOGIT_BIAS


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
