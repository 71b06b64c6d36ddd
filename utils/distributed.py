"""Several processes that compute what one would: the ranks that torchrun starts. Alone, everything here does nothing.

No loss knows of ranks. Each encodes its `share_of_rank` of a batch; `gather` gives it what all have encoded, with
gradients; it computes the loss of the batch; `average_gradients` makes of their gradients those of a single process.
Only the first rank writes; a `barrier` keeps it from changing files that others still read.
"""

import contextlib
import datetime
import logging

import torch
import torch.distributed as dist

from utils.cli import UserError, torchrun_rank

PATIENCE = datetime.timedelta(days=7)  # for a rank that is still encoding; one that has died is noticed at once


@contextlib.contextmanager
def joined(device, timeout=None):
    """Join the ranks, which exchange tensors of this device, while the block runs, if torchrun started this process.

    Args: timeout: timedelta until an answer must be there; None: the backend's.
    Raises: UserError if they do not find each other.
    """
    if torchrun_rank()[1] == 1:
        yield
        return
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    except (RuntimeError, ValueError) as error:
        what = "the processes of this run do not find each other"
        raise UserError(f"{what} ({str(error).splitlines()[0][:160]}); start them with torchrun") from None
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def world_size():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Which of them this process is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """Whether this rank is the one that writes."""
    return rank() == 0


def share_of_rank(rows):
    """This rank's consecutive rows of a batch, (B, ...) -> (b, ...): b differs by one at most and may be 0."""
    return rows.tensor_split(world_size())[rank()]


def gather(encoded, total):
    """What all ranks encoded of their shares of a batch of B = `total` rows: tuple of (b, ...) -> of (B, ...)."""
    return encoded if world_size() == 1 else tuple(_Gather.apply(x, total) for x in encoded)


class _Gather(torch.autograd.Function):
    """Going back takes no exchange: each rank computes the loss of all pairs, so it has the gradient of all rows."""

    @staticmethod
    def forward(ctx, x, total):
        ctx.sizes = [len(share) for share in torch.empty(total).tensor_split(world_size())]
        padded = torch.cat([x, x.new_zeros(ctx.sizes[0] - len(x), *x.shape[1:])])  # to the one size of an all_gather
        shares = [torch.empty_like(padded) for _ in ctx.sizes]
        _exchange(dist.all_gather, shares, padded)
        return torch.cat([share[:size] for share, size in zip(shares, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        return gradient.split(ctx.sizes)[rank()] * world_size(), None  # averaged later, where their sum is right


def average_gradients(parameters):
    """Replace every gradient of an adaptor's parameters by its mean over the ranks."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    _exchange(dist.all_reduce, flat)
    for gradient, mean in zip(gradients, (flat / world_size()).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def sum_over_ranks(count):
    """A whole number, summed over the ranks: the same on every rank."""
    summed = torch.tensor([count], dtype=torch.float64)
    _exchange(dist.all_reduce, summed)
    return int(summed)


def barrier():
    """Wait for all ranks to be here."""
    _exchange(dist.barrier)


@contextlib.contextmanager
def first_rank_first():
    """The first rank goes through the block before the others do."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


@contextlib.contextmanager
def stop_together():
    """Where one rank has an error in the block, all stop at its end, the others with a UserError that says so."""
    error = None
    try:
        yield
    except (UserError, OSError) as raised:
        error = raised
        if world_size() > 1:
            logging.error("rank %d has to stop: %s", rank(), error)  # now, as the others may be at work for long
    if sum_over_ranks(error is not None):
        raise error or UserError("stopped, as another process of this run had to stop; see its message")


def _exchange(collective, *tensors):
    """Call one of torch's collective functions if there are other ranks; that one is gone becomes a UserError."""
    try:
        if world_size() > 1:
            collective(*tensors)
    except RuntimeError as error:
        reason, cure = str(error).splitlines()[0][:160], "give the same command again, to train.py with --resume"
        raise UserError(f"lost another process of this run ({reason}); {cure}") from None
