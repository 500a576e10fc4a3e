"""In which dtype products are computed, under autocast and without.

Some devices have no autocast to ask: meta, on which a model is run without data.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x, as autocast would have it for its own operations."""
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Where products keep the dtype of their operands."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_as_in_training(x: Tensor) -> AbstractContextManager:
    """Mixed precision for a pass with x: routers of a bf16 base may be float32 (by the family, or by Axolotl)."""
    if x.is_meta or x.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(x.device.type, x.dtype)
