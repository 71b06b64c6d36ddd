"""Choose a device and a precision.

"auto" is the GPU if CUDA has one, else the CPU; and bfloat16 if that device computes it natively,
else float32.
"""

import logging
import os

import torch

from utils.cli import UserError, need

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name):
    """The device of --device: "auto", "cpu", "cuda", "cuda:1", "mps", ...

    Raises: UserError if it is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        # torchrun gives every rank of a machine a GPU of its own.
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name}: not available here ({reason}); try --device cpu"
        ) from None
    return device


def device_name(device):
    """ "cpu", "mps" or the name of a CUDA card, on whose kind the last bits of a result depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def sent(tensor, device):
    """Copy a CPU tensor to a device. On CUDA the copy may still be under way."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pick_precision(name, device):
    """The dtype of --precision. "auto" is bfloat16 if the device computes it, else float32.

    Args: name: "auto", "fp32", "bf16" or "fp16"; None means "auto".
    Raises: UserError for "fp16" on the CPU.
    """
    is_cpu_fp16 = name == "fp16" and device.type == "cpu"
    need(not is_cpu_fp16, "--precision fp16: not available on the CPU; choose bf16 or fp32")
    is_native = _computes_bfloat16(device)
    if name in ("auto", None):
        return torch.bfloat16 if is_native else torch.float32
    if name == "bf16" and not is_native:
        logging.warning(
            "note: --precision bf16: %s does not compute it natively and may be very slow",
            device.type,
        )
    return PRECISIONS[name]


def precision_name(dtype):
    """The name of a dtype in --precision."""
    return next(name for name, candidate in PRECISIONS.items() if candidate == dtype)


def autocast(device, dtype):
    """A context that computes matrix products in dtype. With float32 it changes nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _computes_bfloat16(device):
    if device.type == "cuda":
        with torch.cuda.device(device):  # the one that is named, not the current one
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        is_supported = getattr(torch.cpu, name, None)  # private, and may disappear
        if is_supported is not None and is_supported():
            return True
    return False
