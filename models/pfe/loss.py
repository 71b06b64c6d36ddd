"""PFE's loss: how likely it is that the two halves of a true pair are draws of one and the same latent point."""

import torch
from torch.nn import functional as F

from models.layers import full_precision, same_rows

BLOCK = 256, 1024  # pairs at once in the score of all pairs, rows and columns: 1 MB each of what is computed
TOGETHER = 6  # V whose product is taken there before the logarithm
DIVISOR_EPS = 1e-10  # as in the authors' code
VARIANCE_MIN = 1e-6  # the loss divides by it, and softplus(-104) is 0; a deviation of 0.001 is none to a raw CLIP


@full_precision
def variance(x):
    """softplus(x), at least 1e-6, of any shape."""
    return F.softplus(x).clamp_min(VARIANCE_MIN)


@full_precision
def exponential_variance(x):
    """1e-6 + exp(x), of any shape, as the authors' code has it."""
    return VARIANCE_MIN + x.exp()


@full_precision
def mutual_likelihood_loss(mean_image, var_image, mean_text, var_text):
    """mean_b sum_d [ (mean_image - mean_text)^2 / (var_image + var_text) + log(var_image + var_text) ].

    That is twice the negative mutual likelihood score, less the constant D log 2 pi, of B true pairs.
    Args: all (B, D), variances > 0.
    Returns: ().
    Source: Shi & Jain, "Probabilistic face embeddings", arXiv 1904.09658, eq. 3.
    """
    return _disagreement(mean_image, var_image, mean_text, var_text).mean()


@full_precision
def mutual_likelihood_loss_of_all_pairs(mean_image, var_image, mean_text, var_text):
    """The same, averaged over all K pairs of one image: each caption with it, and each two of its captions.

    sum_d [ (mean - mean')^2 / (1e-10 + V) + log V ], V = var + var'. Images are told apart by their means.
    Args: all (B, D), variances > 0.
    Returns: (). It takes memory for (K, D), K - B being the pairs of captions that share an image.
    Source: arXiv 1904.09658, eq. 3, in the form of the authors' code.
    """
    first, second = same_rows(mean_image).triu(diagonal=1).nonzero(as_tuple=True)  # captions of one image
    captions = mean_text[first], var_text[first], mean_text[second], var_text[second]
    image, text = (mean_image, var_image), (mean_text, var_text)
    return torch.cat([_disagreement(*pairs, eps=DIVISOR_EPS) for pairs in ((*image, *text), captions)]).mean()


def _disagreement(mean, var, other_mean, other_var, eps=0.0):
    """sum_d [ (mean - mean')^2 / (eps + V) + log V ], V = var + var', of K pairs: (K, D) each -> (K,)."""
    var = var + other_var
    return ((mean - other_mean) ** 2 / (eps + var) + var.log()).sum(dim=-1)


@torch.no_grad()
@full_precision
def mutual_likelihood_score(mean_image, var_image, mean_text, var_text):
    """-sum_d [ (mean - mean')^2 / V + log V ], V = var + var', of all pairs: (N, D) and (M, D) -> (N, M), exact.

    Neither term is a product of an image's and a text's, so every pair takes D divisions. The dimensions are gone
    through one by one, for blocks of pairs that stay in the cache, not for (N, M, D) tensors in pieces; of six V the
    product is taken before the logarithm.
    Args: variances from 1e-6 to 1e6, so that no product leaves float32.
    Source: arXiv 1904.09658, eq. 3, twice and less the constant D log 2 pi, as in the authors' code.
    """
    score = mean_image.new_empty(len(mean_image), len(mean_text))
    mean_image, var_image = (x.T[:, :, None].contiguous() for x in (mean_image, var_image))  # (D, N, 1)
    mean_text, var_text = (x.T[:, None].contiguous() for x in (mean_text, var_text))  # (D, 1, M)
    for i in range(0, score.shape[0], BLOCK[0]):
        for j in range(0, score.shape[1], BLOCK[1]):
            rows, columns = slice(i, i + BLOCK[0]), slice(j, j + BLOCK[1])
            total = torch.zeros_like(score[rows, columns])
            var, square, product = torch.empty_like(total), torch.empty_like(total), torch.ones_like(total)
            for d in range(len(mean_image)):
                torch.add(var_image[d, rows], var_text[d, :, columns], out=var)
                torch.sub(mean_image[d, rows], mean_text[d, :, columns], out=square).square_()
                total.addcdiv_(square, var)
                product.mul_(var)
                if d % TOGETHER == TOGETHER - 1:
                    total.add_(product.log_())
                    product.fill_(1)
            score[rows, columns] = total.add_(product.log_()).neg_()
    return score
