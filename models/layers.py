"""What the methods share: the MLP trunk, unit vectors, sums over all pairs, and logs that are never half-precision."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

HIDDEN = 1024  # width of every hidden layer in the paper's code


def mlp(embed_dim):
    """The trunk of all methods but ProbVLM: three hidden layers with ReLU, (N, D) -> (N, D), where D is embed_dim."""
    layers = [layer for width in (embed_dim, HIDDEN, HIDDEN) for layer in (nn.Linear(width, HIDDEN), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, embed_dim))


def at_least_float32(x):
    """Half-precision tensors become float32; others stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(function):
    """Decorator: half-precision tensor arguments are raised to float32.

    Under autocast, log1p, lgamma and logsumexp would stay in bfloat16, which has three significant digits. Of what is
    raised, autocast lowers nothing but matrix products, of which a loss needs `pairwise_products` only.
    """

    @functools.wraps(function)
    def raised(*arguments, **options):
        return function(*(at_least_float32(a) if isinstance(a, torch.Tensor) else a for a in arguments), **options)

    return raised


@full_precision
def pairwise_products(x, y):
    """x_i . y_j, x (N, D), y (M, D) -> (N, M), at least float32; under autocast rounded to its type on the way."""
    return at_least_float32(x @ y.T)


@full_precision
def unit(x):
    """x / ||x|| along the last axis, (N, D) -> (N, D); the zero vector stays zero."""
    return F.normalize(x, dim=-1)


def cosine_similarity(x, y):
    """Cosines of all pairs: x (N, D), y (M, D) -> (N, M) in [-1, 1], up to rounding."""
    return pairwise_products(unit(x), unit(y))


@full_precision
def total_variance(log_var):
    """sum_d exp(log_var_d), (N, D) -> (N,): summed before pairs are formed, so that no (B, B, D) tensor is needed."""
    return log_var.exp().sum(dim=-1)


@full_precision
def pairwise_sigmoid_loss(logits):
    """Binary cross-entropy, summed over all pairs, of which the diagonal is true: logits (B, B) -> ().

    -sum_ij log sigmoid(s_ij logit_ij), s_ii = 1, else -1: with targets 0 and 1, a sure negative would be the difference
    of two large numbers.
    Source: "Sigmoid loss for language image pre-training", arXiv 2303.15343.
    """
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1  # (B, B)
    return -F.logsigmoid(signs * logits).sum()
