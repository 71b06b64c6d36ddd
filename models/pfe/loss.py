"""PFE's loss: how likely it is that both embeddings of a pair are draws of one latent point."""

import torch
from torch.nn import functional as F

from models.layers import full_precision, same_rows

DIVISOR_EPS = 1e-10  # as in the authors' code
VARIANCE_MIN = 1e-6  # the loss divides by it, and softplus(-104) is 0 in float32

# The score of all pairs is computed in blocks of this many images and texts: 1 MB per tensor, which
# a processor's cache holds, or 160 MB on a GPU, which has to be busy while the host launches more.
BLOCK = (256, 1024)
BLOCK_ON_GPU = (5000, 8192)
FACTORS = 6  # variances that are multiplied before one logarithm is taken


@full_precision
def softplus_variance(x):
    """softplus(x), at least 1e-6, of any shape."""
    return F.softplus(x).clamp_min(VARIANCE_MIN)


@full_precision
def exponential_variance(x):
    """1e-6 + exp(x), of any shape, as in the authors' code."""
    return VARIANCE_MIN + x.exp()


@full_precision
def mutual_likelihood_loss(mean_image, var_image, mean_text, var_text):
    """mean_b sum_d [ (mean_image - mean_text)^2 / V + log V ], V = var_image + var_text.

    This is the mean over B true pairs of minus twice the score of eq. 3, without the constant
    D log 2 pi.

    Args: all (B, D), variances > 0.
    Returns: ().
    Source: Shi & Jain, "Probabilistic face embeddings", arXiv 1904.09658, eq. 3.
    """
    return _disagreement(mean_image, var_image, mean_text, var_text).mean()


@full_precision
def mutual_likelihood_loss_within_images(mean_image, var_image, mean_text, var_text):
    """The mutual likelihood loss over the K pairs whose two members belong to the same image.

    They are every caption with its image, and every two captions of the same image. The loss is the
    mean over them of sum_d [ (mean - mean')^2 / (1e-10 + V) + log V ], V = var + var'. Images are
    told apart by their means.

    Args: all (B, D), variances > 0.
    Returns: (). Memory grows with (K, D); K - B is the number of pairs of captions.
    Source: arXiv 1904.09658, eq. 3, in the form of the authors' code.
    """
    image_caption = _disagreement(mean_image, var_image, mean_text, var_text, DIVISOR_EPS)  # (B,)
    same_image = same_rows(mean_image)  # (B, B)
    first, second = same_image.triu(diagonal=1).nonzero(as_tuple=True)  # captions of one image
    two_captions = _disagreement(
        mean_text[first], var_text[first], mean_text[second], var_text[second], DIVISOR_EPS
    )  # (K - B,)
    return torch.cat([image_caption, two_captions]).mean()


def _disagreement(mean, var, other_mean, other_var, eps=0.0):
    """sum_d [ (mean - mean')^2 / (eps + V) + log V ], V = var + var', of K pairs -> (K,)."""
    total_var = var + other_var  # (K, D)
    per_dimension = (mean - other_mean) ** 2 / (eps + total_var) + total_var.log()
    return per_dimension.sum(dim=-1)


@torch.no_grad()
@full_precision
def mutual_likelihood_score(mean_image, var_image, mean_text, var_text):
    """-sum_d [ (mean - mean')^2 / V + log V ], V = var + var', of all pairs.

    Neither term is a product of an image's and a text's, so each pair takes D divisions. They are
    done one dimension after the other for blocks of pairs that fit in the processor's cache, which
    takes half as long as summing blocks of shape (n, m, D) over their last axis: about 20 s instead
    of 45 s for COCO's 5,000 images and 25,000 texts on two cores.

    Args: images (N, D) each, texts (M, D) each; variances from 1e-6 to 1e6, so that the product of
        six of them does not overflow in float32.
    Returns: (N, M), exact.
    Source: twice the score of arXiv 1904.09658, eq. 3, without the constant D log 2 pi, as in the
        authors' code.
    """
    images, texts = BLOCK if mean_image.device.type == "cpu" else BLOCK_ON_GPU
    score = mean_image.new_empty(len(mean_image), len(mean_text))
    for row in range(0, len(mean_image), images):
        image = slice(row, row + images)
        for column in range(0, len(mean_text), texts):
            text = slice(column, column + texts)
            score[image, text] = -_disagreement_of_block(
                mean_image[image], var_image[image], mean_text[text], var_text[text]
            )
    return score


def _disagreement_of_block(mean_image, var_image, mean_text, var_text):
    """`_disagreement` of all pairs, (n, D) and (m, D) -> (n, m), one dimension after the other."""
    mean_image = mean_image.T[:, :, None].contiguous()  # (D, n, 1)
    var_image = var_image.T[:, :, None].contiguous()
    mean_text = mean_text.T.contiguous()  # (D, m)
    var_text = var_text.T.contiguous()
    total = mean_image.new_zeros(mean_image.shape[1], mean_text.shape[1])  # (n, m)
    product = torch.ones_like(total)
    var = torch.empty_like(total)
    difference = torch.empty_like(total)
    for d in range(len(mean_image)):
        torch.add(var_image[d], var_text[d], out=var)
        torch.sub(mean_image[d], mean_text[d], out=difference)
        total.addcdiv_(difference.square_(), var)
        product.mul_(var)
        if (d + 1) % FACTORS == 0:
            total.add_(product.log_())
            product.fill_(1)
    return total.add_(product.log_())
