"""Training and caching with several processes, the ranks that torchrun starts.

The result is that of a single process. Each rank encodes its `share_of_rank` of a batch, `gather`
collects what all ranks have encoded, with gradients, and every rank computes the loss of the whole
batch. `average_gradients` then turns the ranks' gradients into those of a single process, so that
no loss needs to know about ranks. Only the first rank writes files, and a `barrier` keeps it from
changing files that others still read. In a single process, everything here does nothing.
"""

import contextlib
import datetime
import logging
import math

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from utils.cli import UserError, torchrun_rank

PATIENCE = datetime.timedelta(days=7)  # for ranks at work; a rank that died is noticed at once


@contextlib.contextmanager
def joined(device, timeout=None):
    """Connect the ranks for the duration of the block, if torchrun started this process.

    Args:
        device: the device of the tensors that the ranks exchange.
        timeout: how long to wait for an answer, a timedelta. None selects the backend's default.
    Raises: UserError if the ranks cannot connect.
    """
    _, ranks = torchrun_rank()
    if ranks == 1:
        yield
        return
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run cannot find each other ({_first_line(error)}); "
            "start them with torchrun"
        ) from None
    yield
    dist.destroy_process_group()  # not after an error, since it would wait for ranks that are gone


def world_size():
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """Whether this rank is the one that writes files."""
    return rank() == 0


def share_of_rank(rows):
    """This rank's consecutive rows of a batch, (B, ...) -> (b, ...).

    b differs between ranks by at most one and may be 0.
    """
    return rows.tensor_split(world_size())[rank()]


def gather(encoded, total):
    """Collect what all ranks encoded of a batch of `total` = B rows.

    Args: encoded: tuple of (b, ...) tensors, this rank's share.
    Returns: tuple of (B, ...) tensors.
    """
    if world_size() == 1:
        return encoded
    return _Gather.apply(total, *encoded)


class _Gather(torch.autograd.Function):
    """all_gather of several tensors at once, with a gradient.

    The backward pass needs no exchange: each rank computes the loss of the whole batch, so it
    already has the gradient of all rows.
    """

    @staticmethod
    def forward(ctx, total, *parts):
        shares = torch.empty(total).tensor_split(world_size())
        ctx.sizes = [len(share) for share in shares]
        rows = torch.cat([_row_bytes(part) for part in parts], dim=1)  # (b, bytes)
        padding = rows.new_zeros(ctx.sizes[0] - len(rows), rows.shape[1])
        padded = torch.cat([rows, padding])  # all_gather needs equal sizes
        gathered = [torch.empty_like(padded) for _ in ctx.sizes]
        _exchange(dist.all_gather, gathered, padded)
        shares = [share[:size] for share, size in zip(gathered, ctx.sizes, strict=True)]
        whole = torch.cat(shares)  # (B, bytes)
        results = []
        start = 0
        for part in parts:
            end = start + _row_bytes(part).shape[1]
            content = whole[:, start:end].contiguous().view(part.dtype)
            results.append(content.view(total, *part.shape[1:]))
            start = end
        needs_gradient = ctx.needs_input_grad[1:]
        constants = [x for x, needed in zip(results, needs_gradient, strict=True) if not needed]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)  # `backward` gets None for constants, not zeros
        return tuple(results)

    @staticmethod
    def backward(ctx, *gradients):
        # The parameters need the sum over the ranks. average_gradients takes the mean, so multiply.
        shares = []
        for gradient in gradients:
            if gradient is None:
                shares.append(None)
            else:
                shares.append(gradient.split(ctx.sizes)[rank()] * world_size())
        return None, *shares


def _row_bytes(part):
    """The bytes of each row of a tensor (b, ...), (b, bytes) uint8; b may be 0."""
    row_size = math.prod(part.shape[1:])
    return part.reshape(len(part), row_size).view(torch.uint8)


def average_gradients(parameters):
    """Replace the gradients of an adaptor's parameters by their means over the ranks."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = parameters_to_vector(gradients)
    _exchange(dist.all_reduce, total)
    vector_to_parameters(total / world_size(), gradients)


def sum_over_ranks(count):
    """The sum of a whole number over the ranks, the same on every rank."""
    total = torch.tensor([count], dtype=torch.float64)
    _exchange(dist.all_reduce, total)
    return int(total)


def barrier():
    """Wait until all ranks have reached this point."""
    _exchange(dist.barrier)


@contextlib.contextmanager
def first_rank_first():
    """Let the first rank finish the block before the others enter it."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


@contextlib.contextmanager
def stop_together():
    """If one rank fails in the block, stop all ranks at its end.

    Raises: the rank's own error, or on the other ranks a UserError that says why they stop.
    """
    error = None
    try:
        yield
    except (UserError, OSError) as raised:
        error = raised
        if world_size() > 1:
            # At once, because the other ranks may take long to reach the end of the block.
            logging.error("rank %d has to stop: %s", rank(), error)
    failed_ranks = sum_over_ranks(error is not None)
    if error is not None:
        raise error
    if failed_ranks > 0:
        raise UserError("stopped, as another process of this run had to stop; see its message")


def _exchange(collective, *tensors):
    """Call one of torch's collective functions if there are other ranks.

    Raises: UserError if a rank is gone.
    """
    if world_size() == 1:
        return
    try:
        collective(*tensors)
    except RuntimeError as error:
        raise UserError(
            f"lost another process of this run ({_first_line(error)}); "
            "give the same command again, to train.py with --resume"
        ) from None


def _first_line(error):
    """The first line of an error message, cut to 160 characters."""
    return str(error).splitlines()[0][:160]
