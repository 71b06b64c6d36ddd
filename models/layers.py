"""What the methods share: the MLP trunk, the Gaussian head, unit vectors, and the rule that sums and logs are never half-precision."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

HIDDEN = 1024  # width of every hidden layer in the paper's code


def mlp(embed_dim, hidden=HIDDEN):
    """The trunk that AsymVLM, PFE, PCME++ and ProLIP put on an embedding: three hidden layers with ReLU, (N, D) -> (N, D)."""
    return nn.Sequential(
        nn.Linear(embed_dim, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, embed_dim),
    )


def at_least_float32(x):
    """Half-precision tensors become float32; others stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(function):
    """Decorator: half-precision tensor arguments are raised to float32, and autocast does not lower the products inside.

    Under autocast, log1p, lgamma and logsumexp would stay in bfloat16, which has three significant digits.
    """

    @functools.wraps(function)
    def raised(*arguments, **options):
        arguments = [at_least_float32(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        device = next(a.device.type for a in arguments if isinstance(a, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*arguments, **options)

    return raised


@full_precision
def unit(x):
    """x / ||x|| along the last axis, (N, D) -> (N, D); the zero vector stays zero."""
    return F.normalize(x, dim=-1)


@full_precision
def cosine_similarity(x, y):
    """Cosines of all pairs: x (N, D), y (M, D) -> (N, M) in [-1, 1], up to rounding."""
    return unit(x) @ unit(y).T
