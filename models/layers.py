"""What the methods share: layers, unit vectors, sums over all pairs, and logs that are never half-precision."""

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
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


def widest(x):
    """x in float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()  # Apple's GPU has no float64


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


@full_precision
def symmetric_cross_entropy(logits):
    """InfoNCE in both directions, of all pairs, of which the diagonal is true: logits (B, B) -> ().

    mean_b [log sum_j exp(logit_bj) + log sum_i exp(logit_ib) - 2 logit_bb] / 2. Its gradient has no gradient.
    Source: "Representation learning with contrastive predictive coding", arXiv 1807.03748; both ways as in CLIP.
    """
    return _SymmetricCrossEntropy.apply(logits)


class _SymmetricCrossEntropy(torch.autograd.Function):
    """Written by hand, as one exponential each way gives the loss and its gradient, (P + Q - 2 I) / 2B.

    P and Q are the softmaxes along rows and columns; log sum_k exp(l_k) = max_k l_k - log max_k P_k.
    """

    @staticmethod
    def forward(ctx, logits):
        p = logits.softmax(dim=1)
        by_row = logits.amax(dim=1) - p.amax(dim=1).log()
        highest = logits.amax(dim=0)
        q = (logits - highest).exp_()  # faster than softmax along columns
        total = q.sum(dim=0)
        ctx.save_for_backward(p.addcdiv_(q, total))
        p.diagonal().sub_(2)
        return (by_row + highest + total.log() - 2 * logits.diagonal()).mean() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (summed,) = ctx.saved_tensors
        return summed * (gradient / (2 * len(summed)))


def same_rows(x):
    """Which rows of x (B, D) are equal: (B, B), bool. Equal embeddings are taken for one image: there are no ids."""
    _, number = torch.unique(x, dim=0, return_inverse=True)  # (B,)
    return number[:, None] == number


# Several ranks encode a share of the batch each; what follows sees the whole batch, so that they equal one.


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) times a weight plus a bias, in training by the whole batch's statistics, (B, D).

    Both statistics are also kept as running averages, which take their place in evaluation; var is the mean squared
    deviation, and 0 for a batch of one.

    Args: decay: of the running averages, a step. affine: whether weight and bias are learnt, or are 1 and 0.
    """

    def __init__(self, width, decay, eps, affine=True):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        """This rank's share (b, D) of a batch -> (b, D), at least float32."""
        x = at_least_float32(x)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        rows = sum(rows_of_ranks(x))
        mean = sum_over_ranks(x.sum(dim=0)) / rows
        var = sum_over_ranks((x - mean).square().sum(dim=0)) / rows
        with torch.no_grad():
            self.running_mean.lerp_(mean, 1 - self.decay)
            self.running_var.lerp_(var, 1 - self.decay)
        x = (x - mean) * (var + self.eps).rsqrt()
        return x if self.weight is None else x * self.weight + self.bias


class Dropout(nn.Module):
    """In training, sets a share p of x (B, ...) to 0 and divides the rest by 1 - p.

    The mask is drawn for the whole batch on the CPU, whose generator is the same on all ranks, and which --resume
    restores.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or not self.p:
            return x
        rows = rows_of_ranks(x)
        kept = (torch.rand(sum(rows), *x.shape[1:]) >= self.p).split(rows)[dist.get_rank() if len(rows) > 1 else 0]
        return x * kept.to(x) / (1 - self.p)


def rows_of_ranks(x):
    """How many rows each rank has of a batch: [b], of which this one's are x (b, ...)."""
    if not dist.is_initialized():
        return [len(x)]
    rows = torch.zeros(dist.get_world_size(), device=x.device)
    rows[dist.get_rank()] = len(x)
    return [int(b) for b in sum_over_ranks(rows)]


def sum_over_ranks(x):
    """A tensor summed over the ranks, with a gradient: that of the sum of the ranks' losses.

    Raises: ConnectionError if one of them is gone.
    """
    return _SumOverRanks.apply(x) if dist.is_initialized() else x


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        summed = x.clone()
        try:
            dist.all_reduce(summed)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:160]
            raise ConnectionError(f"lost another process of this run ({reason}); go on with --resume") from None
        return summed

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverRanks.apply(gradient)
