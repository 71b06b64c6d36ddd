"""Several processes that compute what one would: the ranks that torchrun starts. Alone, everything here does nothing.

No loss knows of ranks. Each encodes its share of the batch; `gather` puts the shares together, with gradients; each computes the loss of the whole
batch; `average_gradients` makes of their gradients the one that a single process has.
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
    """Join the ranks while the block runs, if torchrun started this process.

    Args: device: where the tensors are that ranks exchange. timeout: timedelta until an answer must be there; None: that of the backend.
    """
    if torchrun_rank()[1] == 1:
        yield
        return
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run do not find each other ({str(error).splitlines()[0][:160]}); start them with torchrun"
        ) from None
    yield
    dist.destroy_process_group()


def world_size():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Which of them this process is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """Whether this rank is the one that writes."""
    return rank() == 0


def own(rows):
    """This rank's share of a batch, (B, ...) -> (b, ...): consecutive rows; shares differ by one row at most and may be empty."""
    return rows.tensor_split(world_size())[rank()]


def gather(encoded, rows):
    """Put together what every rank encoded of its share of a batch, with gradients.

    Args: encoded: tuple of (b, ...) tensors. rows: B, of all ranks together. Returns: tuple of (B, ...) tensors, the same on every rank.
    """
    return encoded if world_size() == 1 else tuple(_Gather.apply(x, rows) for x in encoded)


class _Gather(torch.autograd.Function):
    """Every rank has the gradient of the whole batch already, as each computes the whole loss: going back takes no exchange."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.sizes = [len(share) for share in torch.empty(rows).tensor_split(world_size())]
        padded = torch.cat(
            [x, x.new_zeros(ctx.sizes[0] - len(x), *x.shape[1:])]
        )  # the backends exchange tensors of one size
        shares = [torch.empty_like(padded) for _ in ctx.sizes]
        with _answered():
            dist.all_gather(shares, padded)
        return torch.cat([share[:size] for share, size in zip(shares, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        return gradient.split(ctx.sizes)[
            rank()
        ] * world_size(), None  # times W: the average over ranks is to be the sum of the shares'


def average_gradients(parameters):
    """Replace every gradient by its mean over the ranks; of what the loss itself holds, such as a temperature, every rank has the whole one.

    Args: parameters: iterable of those of the adaptor, in the same order on every rank.
    """
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with _answered():
        dist.all_reduce(flat)
    for gradient, mean in zip(
        gradients, (flat / world_size()).split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))


def agreed(answer):
    """Whether the first rank says so. Args: answer: bool, of which that rank's counts. Returns: bool, the same on every rank."""
    if world_size() == 1:
        return answer
    said = torch.tensor([float(answer and is_first())])
    with _answered():
        dist.all_reduce(said)
    return bool(said)


def wait():
    """Wait for all ranks to be here."""
    if world_size() > 1:
        with _answered():
            dist.barrier()


@contextlib.contextmanager
def first_rank_first():
    """The first rank goes through the block before the others do."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


@contextlib.contextmanager
def together():
    """Leave the block together: where one rank has an error to report, all stop. Raises: that error; on the other ranks, a UserError."""
    error = None
    try:
        yield
    except (UserError, OSError) as raised:
        error = raised
    if world_size() > 1:
        if error is not None:
            logging.error("rank %d has to stop: %s", rank(), error)  # now, as the others may be at work for long
        failed = torch.tensor([float(error is not None)])
        with _answered():
            dist.all_reduce(failed)
        if failed and error is None:
            raise UserError("stopped, as another process of this run had to stop; see its message")
    if error is not None:
        raise error


@contextlib.contextmanager
def _answered():
    """Turn what a backend raises when a rank is gone into a UserError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(
            f"lost another process of this run ({reason}); give the same command again, to train.py with --resume"
        ) from None
