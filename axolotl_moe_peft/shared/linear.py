"""Linear layers of a base, and a linear map that keeps its input for backward as it is given: no cast copy, no mask.

Shape suffixes: I inputs, O outputs, T all leading dimensions flattened.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .dropout import Mask
from .precision import without_autocast

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """F.linear of x (..., I) in the weight's dtype, behind dropout with this probability.

    Output and gradients are those of the same operations one by one, of which autograd keeps x in the weight's dtype,
    with dropout a mask and a masked copy too.
    """
    if torch.compiler.is_compiling():  # the compiler itself recomputes what is cheaper than to keep
        return F.linear(F.dropout(x.to(weight_OI.dtype), dropout), weight_OI, bias_O)
    return _Linear.apply(x, weight_OI, bias_O, Mask.draw(dropout) if dropout else None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, mask: Mask | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.mask = mask
        return F.linear(_masked(x, weight_OI.dtype, mask), weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad_TO, grad_x, grad_weight, grad_bias = grad.reshape(-1, len(weight_OI)), None, None, None
        # an ambient autocast would compute in 16 bits what was float32 in forward
        with without_autocast(grad.device):
            if ctx.needs_input_grad[0]:
                grad_x = (grad_TO @ weight_OI).view(x.shape)
                grad_x = grad_x.to(x.dtype) if ctx.mask is None else _drop(grad_x, ctx.mask).to(x.dtype)
            if ctx.needs_input_grad[1]:
                x_TI = _masked(x, weight_OI.dtype, ctx.mask).reshape(-1, weight_OI.shape[1])
                grad_weight = grad_TO.t() @ x_TI
            if ctx.needs_input_grad[2]:
                grad_bias = grad_TO.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _masked(x: Tensor, dtype: torch.dtype, mask: Mask | None) -> Tensor:
    return x.to(dtype) if mask is None else _drop(x.to(dtype, copy=True), mask)


def _drop(x: Tensor, mask: Mask) -> Tensor:
    return mask.dropper(x.device)(x).mul_(mask.scale)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a layer that an adapter can go beside; None if it is no such layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def has_plain_weight(module: nn.Module) -> bool:
    """Whether a linear layer's weight is a matrix of numbers in one piece, and not quantised, sharded or wrapped."""
    shape = linear_shape(module)
    if isinstance(module, nn.Linear):
        shape = shape[::-1]
    weight = module.weight
    return type(weight.data) is Tensor and weight.dtype in _WEIGHT_DTYPES and weight.shape == shape
