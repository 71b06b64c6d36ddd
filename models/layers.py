"""What the methods share: layers, unit vectors, scores and losses of all pairs, and precision."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

HIDDEN = 1024  # width of hidden layers in AsymVLM's repository; ProbVLM's heads have width D


def mlp(embed_dim):
    """The MLP of AsymVLM, PFE, PCME++ and ProLIP: three hidden layers, ReLU, (N, D) -> (N, D)."""
    return nn.Sequential(
        nn.Linear(embed_dim, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, embed_dim),
    )


def at_least_float32(x):
    """Raise a half-precision tensor to float32 and return anything else as it is."""
    if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def full_precision(function):
    """Decorator: raises half-precision tensors among the positional arguments to float32.

    Autocast would leave lgamma, and on the CPU also log1p and logsumexp, in bfloat16, which has two
    to three significant digits. With float32 arguments, autocast lowers nothing but matrix
    products, and the only matrix product of a loss is `pairwise_products`.
    """

    @functools.wraps(function)
    def raised(*arguments, **options):
        arguments = [at_least_float32(argument) for argument in arguments]
        return function(*arguments, **options)

    return raised


def widest(x):
    """Convert x to float64 if the device supports it."""
    if x.device.type == "mps":  # Apple's GPU has no float64
        return x
    return x.double()


def as_float64(x):
    """Convert x to float64, on the CPU if its device has no float64.

    Unlike `widest`, it never leaves a tensor in float32, in which the result would overflow.
    """
    return x.cpu().double() if x.device.type == "mps" else x.double()


@full_precision
def pairwise_products(x, y):
    """x_i . y_j, x (N, D), y (M, D) -> (N, M), float32 or float64.

    Under autocast, the product itself is computed in half precision.
    """
    return at_least_float32(x @ y.T)


@full_precision
def unit(x):
    """x / ||x|| along the last axis, (N, D) -> (N, D). The zero vector stays zero."""
    return F.normalize(x, dim=-1)


def cosine_similarity(x, y):
    """Cosines of all pairs: x (N, D), y (M, D) -> (N, M) in [-1, 1], up to rounding."""
    return pairwise_products(unit(x), unit(y))


@full_precision
def total_variance(log_var):
    """sum_d exp(log_var_d), (N, D) -> (N,).

    Summing before pairs are formed avoids a (B, B, D) tensor.
    """
    return log_var.exp().sum(dim=-1)


@full_precision
def pairwise_sigmoid_loss(logits):
    """Binary cross-entropy summed over all pairs; the true ones are on the diagonal: (B, B) -> ().

    -sum_ij log sigmoid(s_ij logit_ij), s_ii = 1, else -1. With targets 0 and 1 instead of signs,
    the loss of a confident negative would be the difference of two large numbers.
    Source: "Sigmoid loss for language image pre-training", arXiv 2303.15343.
    """
    match = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)  # (B, B)
    signs = 2 * match - 1
    return -F.logsigmoid(signs * logits).sum()


@full_precision
def symmetric_cross_entropy(logits):
    """InfoNCE in both directions over all pairs; the true ones are on the diagonal: (B, B) -> ().

    -mean_b [log softmax over row b + log softmax over column b]_bb / 2, which is the mean of the
    cross-entropies of rows and of columns. We compute only the log normalisers, not the softmaxes:
    a softmax over columns is slow on CUDA, and F.cross_entropy of logits.T is slow on the CPU.
    Source: "Representation learning with contrastive predictive coding", arXiv 1807.03748;
    both directions as in CLIP.
    """
    log_normalisers = logits.logsumexp(dim=1) + logits.logsumexp(dim=0)  # (B,)
    return log_normalisers.mean() / 2 - logits.diagonal().mean()


def same_rows(x):
    """Which rows of x (B, D) are equal: (B, B), bool.

    Equal embeddings count as one image, because a batch has no image ids.
    """
    _, row_id = torch.unique(x, dim=0, return_inverse=True)  # (B,)
    return row_id[:, None] == row_id
