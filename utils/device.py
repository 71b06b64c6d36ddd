"""Which device and which precision: "auto" in, a torch.device and a dtype that the device computes natively, out."""

import contextlib
import ctypes
import os

import torch

from utils.cli import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name):
    """The device of --device. On the CPU, the process also keeps the memory that it frees from now on.

    Args: name: "auto", "cpu", "cuda", "cuda:1", "mps", ... Raises: UserError if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's: every rank of a machine has a GPU of its own
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name}: not available here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def pick_precision(name, device):
    """The dtype of matrix products under --precision: of "auto", bfloat16 where the device has it natively, else float32."""
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16: not on the CPU; choose bf16 or fp32")
        return PRECISIONS[name]
    return torch.bfloat16 if _computes_bfloat16(device) else torch.float32


def precision_name(dtype):
    """The name under which --precision takes a dtype."""
    return next(name for name, candidate in PRECISIONS.items() if candidate == dtype)


def lowered(device, dtype):
    """A context in which matrix products are computed in dtype; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _computes_bfloat16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: they may go away
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def _keep_freed_memory():
    """Make glibc keep the memory that torch frees, up to 1 GB a piece, for the next tensor instead of giving it back to the system.

    On the CPU every large tensor is otherwise paid for in page faults: encoding with a ViT-B/32 is a third faster this way. Elsewhere it does
    nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
