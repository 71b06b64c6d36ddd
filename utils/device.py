"""Which device and which precision: "auto" in, a torch.device and a dtype that the device computes natively, out."""

import contextlib
import ctypes
import logging
import os

import torch

from utils.cli import UserError, need

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name):
    """The device of --device: "auto", "cpu", "cuda", "cuda:1", "mps", ...

    Raises: UserError if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's: every rank of a machine has a GPU of its own
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not available here ({reason}); try --device cpu") from None
    if device.type == "cpu":  # glibc keeps freed memory, up to 1 GB a piece: a ViT-B/32 encodes a third faster
        with contextlib.suppress(OSError, AttributeError):  # elsewhere it does nothing
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return device


def pick_precision(name, device):
    """The dtype of --precision: that of "auto" is bfloat16 where the device has it natively, else float32."""
    need(name != "fp16" or device.type != "cpu", "--precision fp16: not on the CPU; choose bf16 or fp32")
    automatic = torch.bfloat16 if _computes_bfloat16(device) else torch.float32
    if name == "bf16" and automatic != torch.bfloat16:
        logging.warning("note: --precision bf16: %s does not compute it natively, and may be very slow", device.type)
    return PRECISIONS.get(name, automatic)


def precision_name(dtype):
    """The name under which --precision takes a dtype."""
    return next(name for name, candidate in PRECISIONS.items() if candidate == dtype)


def autocast(device, dtype):
    """A context in which matrix products are computed in dtype; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _computes_bfloat16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: they may go away
    return device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)
