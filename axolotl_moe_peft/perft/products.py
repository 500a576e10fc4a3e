"""Low-rank products of tokens with the experts that they were routed to, and the way in which a device computes them.

Shape suffixes: T tokens, K experts per token, S slots (dispatch.py), N experts, D model width, R rank.

For backward the tokens are kept as they are given, whatever the dtype of the products, and what has width R; the rows
of tokens that a product needs, and the masks of dropout, are made again there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shared.dropout import Mask
from .dispatch import BlockedSlots, GroupedSlots, HostSlots, Slots

_ALIGNED_BYTES = 16
# Bytes of gathered rows at a time off the CPU; a product has up to three tensors of their size.
_CHUNK_BYTES = 64 * 2**20


def slots_for(x_TD: Tensor, w_NRD: Tensor, num_active: int, gateable: bool) -> type[Slots] | None:
    """How to compute a sum over each token's experts: by slots of this kind, or (None) by `gated_mm`.

    All experts side by side are one wide product, without sorting, gathering and adding up. It has N / K times the
    arithmetic, which off the CPU is next to nothing while it is narrow: on an H100 with N * R half the width, 2048, it
    took 0.5 (K = 2) and 0.15 (K = 8) times as long as blocks in 16 bits, 0.7 and 0.2 in float32; grouped products took
    0.6. In float32 on a CPU it was faster up to N = 8 and as fast at N = 16 (rank 16, K = 2), so N * R may be 64 K
    there. N * R is kept for backward of every token, so it stays within half of the width, on a CPU a quarter.

    `grouped_mm` is one kernel on CUDA devices of compute capability 9 and 10 in bf16. Elsewhere torch copies the
    groups' ends to the host and loops over them, which waits for all that was started before.

    Args:
        x_TD: the tokens.
        w_NRD: the experts' weights, in the dtype that the products have.
        num_active: K.
        gateable: whether a weight of 0 is the same as not being chosen; not so with dropout of each expert's own.
    """
    num_experts, rank, width = w_NRD.shape
    on_host = x_TD.device.type == "cpu"
    most = min(width // 4, 64 * num_active) if on_host else width // 2
    if gateable and num_experts * rank <= most:
        return None
    if on_host:
        return HostSlots
    aligned = width * w_NRD.element_size() % _ALIGNED_BYTES == 0
    grouped = aligned and w_NRD.dtype == torch.bfloat16 and _has_grouped_kernel(x_TD.device)
    return GroupedSlots if grouped else BlockedSlots


def _has_grouped_kernel(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def tokens_at_once(kind: type[Slots], x_TD: Tensor, w_NRD: Tensor, num_active: int) -> int:
    """How many tokens `gather_mm` and `scatter_mm` should get at a time, so that their rows take little memory."""
    if kind is HostSlots:  # has chunks of its own
        return max(1, len(x_TD))
    return max(1, _CHUNK_BYTES // (num_active * w_NRD.shape[-1] * w_NRD.element_size()))


def gather_mm(x_TD: Tensor, w_NRD: Tensor, slots: Slots, mask: Mask | None = None) -> Tensor:
    """z_SR[s] = w_NRD[expert of s] @ x_TD[token of s], in the dtype of w. Differentiable by x and w.

    With a mask each slot's row of x goes through dropout of its own, without its scale.
    """
    return _apply(_GatherMM, slots, mask, x_TD, w_NRD)


def scatter_mm(z_SR: Tensor, w_NRD: Tensor, slots: Slots, num_tokens: int) -> Tensor:
    """y_TD[t] = sum of w_NRD[expert of s].T @ z_SR[s] over the slots s of token t. Differentiable by z and w."""
    return _apply(_ScatterMM, slots, None, z_SR, w_NRD, num_tokens)


def gated_mm(z_TS: Tensor, w_NRD: Tensor, gate_TN: Tensor) -> Tensor:
    """y_TD[t] = sum over all n of gate[t, n] * w_NRD[n].T @ z[t, n], where z (T, N * R) has the experts side by side.

    Differentiable by all three, which share a dtype, and are what is kept.
    """
    return _GatedMM.apply(z_TS, w_NRD, gate_TN)


def _apply(function: type[torch.autograd.Function], slots: Slots, mask: Mask | None, *rest: Any) -> Tensor:
    # torch.compile traces neither a loop over chunks on a CPU nor a generator
    traceable = mask is None and not isinstance(slots, HostSlots)
    apply = function.apply if traceable or not torch.compiler.is_compiling() else _apply_eagerly(function)
    return apply(type(slots), mask, *rest, *slots)


def _apply_eagerly(function: type[torch.autograd.Function]) -> Any:
    return torch.compiler.disable(function.apply)


class _GatherMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: type[Slots], mask: Mask | None, x_TD: Tensor, w_NRD: Tensor, *slots: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, w_NRD, *slots)
        ctx.kind, ctx.mask = kind, mask
        return kind(*slots).gather(x_TD, w_NRD, mask)

    @staticmethod
    def backward(ctx: Any, grad_SR: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w_NRD, *slots = ctx.saved_tensors
        slots, grad_SR = ctx.kind(*slots), grad_SR.contiguous()
        grad_x = grad_w = None
        if ctx.needs_input_grad[2]:
            grad_x = slots.scatter(grad_SR, w_NRD, len(x_TD), ctx.mask).to(x_TD.dtype)
        if ctx.needs_input_grad[3]:
            grad_w = slots.outer(grad_SR, x_TD, len(w_NRD), ctx.mask)
        return None, None, grad_x, grad_w, *(None for _ in slots)


class _ScatterMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: type[Slots], mask: None, z_SR: Tensor, w_NRD: Tensor, num_tokens: int, *slots: Tensor
    ) -> Tensor:
        ctx.save_for_backward(z_SR, w_NRD, *slots)
        ctx.kind = kind
        return kind(*slots).scatter(z_SR, w_NRD, num_tokens, None)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        z_SR, w_NRD, *slots = ctx.saved_tensors
        slots, grad_TD = ctx.kind(*slots), grad_TD.contiguous()
        grad_z = slots.gather(grad_TD, w_NRD, None) if ctx.needs_input_grad[2] else None
        grad_w = slots.outer(z_SR, grad_TD, len(w_NRD), None) if ctx.needs_input_grad[3] else None
        return None, None, grad_z, grad_w, None, *(None for _ in slots)


class _GatedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_TS: Tensor, w_NRD: Tensor, gate_TN: Tensor) -> Tensor:
        ctx.save_for_backward(z_TS, w_NRD, gate_TN)
        return _gated(z_TS, gate_TN) @ w_NRD.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        z_TS, w_NRD, gate_TN = ctx.saved_tensors
        grad_gated = grad_TD @ w_NRD.flatten(0, 1).t()
        grad_z = grad_w = grad_gate = None
        if ctx.needs_input_grad[0]:
            grad_z = _gated(grad_gated, gate_TN)
        if ctx.needs_input_grad[1]:
            grad_w = (_gated(z_TS, gate_TN).t() @ grad_TD).view(w_NRD.shape)
        if ctx.needs_input_grad[2]:
            grad_gate = (grad_gated * z_TS).unflatten(1, w_NRD.shape[:2]).sum(-1, dtype=gate_TN.dtype)
        return grad_z, grad_w, grad_gate


def _gated(z_TS: Tensor, gate_TN: Tensor) -> Tensor:
    return (z_TS.unflatten(1, (gate_TN.shape[1], -1)) * gate_TN.unsqueeze(-1)).flatten(1)
