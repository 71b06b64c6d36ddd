"""Seed every library that draws random numbers."""

import os
import random

import numpy as np
import torch


def seed_everything(seed):
    """Seed Python, NumPy and torch, and ask torch for deterministic kernels where it has them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # cuBLAS is deterministic only with this setting.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Otherwise every new tensor is filled first, which takes time and changes nothing here.
    torch.utils.deterministic.fill_uninitialized_memory = False
