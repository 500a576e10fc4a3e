"""Low-rank products of tokens with the experts that they were routed to, without a copy of the tokens per choice.

Shape suffixes: T tokens, K experts per token, S = T * K slots (one per choice), N experts, D model width, R rank.
Slots are sorted by expert, so that each expert's slots form one group of a grouped matrix product.

The two differentiable operations are each other's adjoint, so three plain kernels serve all forwards and backwards:

    gather_mm    z_SR[s]  = w[expert of s] @ x[token of s]               and its gradient by x is a scatter_mm
    scatter_mm   y_TD[t]  = sum over the slots s of t: w[expert]^T z[s]  and its gradient by z is a gather_mm

Only x, z and the weights are kept for backward; the tokens are gathered again there.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of gathered rows at a time on a CPU. At 4 MiB they stay in the cache and the allocator reuses them; with 32 MiB
# and more each product maps fresh pages, which took three to four times as long (2048 x 2048 tokens, K = 2).
_CPU_CHUNK_BYTES = 4 * 2**20
# Every stride of grouped_mm's operands must be a multiple of 16 bytes: 8 elements suffice for every dtype.
_ALIGNED_ELEMENTS = 8
_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Dispatch(NamedTuple):
    """Slots sorted by expert.

    Attributes:
        token_S: int64, the token of each slot.
        order_S: int64, each slot's position in the unsorted choices `indices_TK.flatten()`.
        ends_N: int32, where each expert's slots end.
    """

    token_S: Tensor
    order_S: Tensor
    ends_N: Tensor


def dispatch(indices_TK: Tensor, num_experts: int) -> Dispatch:
    """Sort the choices (T, K) by expert; slots of one expert stay in the order of their tokens.

    Three tokens, K = 2, N = 4, where nobody chose expert 2:

        indices_TK    [[1, 3], [0, 1], [3, 1]]      slots 0 to 5, in the order of tokens: 1 3 0 1 3 1
        order_S       [2, 0, 3, 5, 1, 4]            the same slots sorted by expert:      0 1 1 1 3 3
        token_S       [1, 0, 1, 2, 0, 2]            the token of each, order_S // K
        ends_N        [1, 4, 4, 6]                  expert 1 has the slots 1 to 3 of the sorted ones, expert 2 none
    """
    expert_S, order_S = indices_TK.flatten().sort(stable=True)
    experts_N = torch.arange(num_experts, device=indices_TK.device)
    ends_N = torch.searchsorted(expert_S, experts_N, right=True).to(torch.int32)
    return Dispatch(order_S // indices_TK.shape[-1], order_S, ends_N)


def gather_mm(x_TD: Tensor, w_NRD: Tensor, slots: Dispatch) -> Tensor:
    """z_SR[s] = w_NRD[expert of s] @ x_TD[token of s]. Differentiable by x and w, which share one dtype."""
    return _apply(_GatherMM, x_TD, w_NRD, *slots)


def scatter_mm(z_SR: Tensor, w_NRD: Tensor, slots: Dispatch, num_tokens: int) -> Tensor:
    """y_TD[t] = sum of w_NRD[expert of s].T @ z_SR[s] over the slots s of token t. Differentiable by z and w."""
    return _apply(_ScatterMM, z_SR, w_NRD, *slots, num_tokens)


def _apply(function: type[torch.autograd.Function], x: Tensor, *rest: Any) -> Tensor:
    # torch.compile traces grouped_mm in bf16 alone, and not our loop over chunks on a CPU
    if torch.compiler.is_compiling() and (x.dtype != torch.bfloat16 or x.device.type == "cpu"):
        return _apply_eagerly(function, x, *rest)
    return function.apply(x, *rest)


@torch.compiler.disable
def _apply_eagerly(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    return function.apply(*arguments)


class _GatherMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_NRD: Tensor, *slots: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, w_NRD, *slots)
        return _gather(x_TD, w_NRD, Dispatch(*slots))

    @staticmethod
    def backward(ctx: Any, grad_SR: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w_NRD, *slots = ctx.saved_tensors
        slots, grad_SR = Dispatch(*slots), grad_SR.contiguous()
        grad_x = _scatter(grad_SR, w_NRD, slots, len(x_TD)) if ctx.needs_input_grad[0] else None
        grad_w = _outer(grad_SR, x_TD, slots) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None, None, None


class _ScatterMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_SR: Tensor, w_NRD: Tensor, token_S: Tensor, order_S: Tensor, ends_N: Tensor, t: int
    ) -> Tensor:
        ctx.save_for_backward(z_SR, w_NRD, token_S, order_S, ends_N)
        return _scatter(z_SR, w_NRD, Dispatch(token_S, order_S, ends_N), t)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        z_SR, w_NRD, *slots = ctx.saved_tensors
        slots, grad_TD = Dispatch(*slots), grad_TD.contiguous()
        grad_z = _gather(grad_TD, w_NRD, slots) if ctx.needs_input_grad[0] else None
        grad_w = _outer(z_SR, grad_TD, slots) if ctx.needs_input_grad[1] else None
        return grad_z, grad_w, None, None, None, None


def _gather(x_TD: Tensor, w_NRD: Tensor, slots: Dispatch) -> Tensor:
    z_SR = x_TD.new_empty(len(slots.token_S), w_NRD.shape[1])
    for rows, experts, ends in _chunks(slots, x_TD):
        z_SR[rows] = _grouped_mm(x_TD[slots.token_S[rows]], w_NRD[experts].transpose(1, 2), ends)
    return z_SR


def _scatter(z_SR: Tensor, w_NRD: Tensor, slots: Dispatch, num_tokens: int) -> Tensor:
    width = w_NRD.shape[-1]
    if z_SR.device.type != "cpu":
        # index_add_ adds in no fixed order there: sort back and sum over K, or recomputation may route differently
        y_SD = torch.empty(len(z_SR), width, dtype=z_SR.dtype, device=z_SR.device)
        y_SD[slots.order_S] = _grouped_mm(z_SR, w_NRD, slots.ends_N)
        return y_SD.view(num_tokens, -1, width).sum(1, dtype=y_SD.dtype)  # autocast makes sums float32
    y_TD = z_SR.new_zeros(num_tokens, width)
    for rows, experts, ends in _chunks(slots, y_TD):
        y_TD.index_add_(0, slots.token_S[rows], _grouped_mm(z_SR[rows], w_NRD[experts], ends))
    return y_TD


def _outer(z_SR: Tensor, x_TD: Tensor, slots: Dispatch) -> Tensor:
    grad_NRD = x_TD.new_zeros(len(slots.ends_N), z_SR.shape[1], x_TD.shape[1])
    for rows, experts, ends in _chunks(slots, x_TD):
        grad_NRD[experts] += _grouped_mm(z_SR[rows].t(), x_TD[slots.token_S[rows]], ends)
    return grad_NRD


def _chunks(slots: Dispatch, x_TD: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of slots, the experts they belong to, and where those experts end within the rows."""
    num_slots = len(slots.token_S)
    if x_TD.device.type != "cpu":
        yield slice(0, num_slots), slice(None), slots.ends_N  # one chunk needs no copy to the host
        return
    step = max(1, _CPU_CHUNK_BYTES // (x_TD.shape[1] * x_TD.element_size()))
    ends = slots.ends_N.tolist()
    for start in range(0, num_slots, step):
        stop = min(start + step, num_slots)
        first, last = bisect_right(ends, start), bisect_left(ends, stop)
        chunk_ends = torch.tensor([min(end, stop) - start for end in ends[first : last + 1]], dtype=torch.int32)
        yield slice(start, stop), slice(first, last + 1), chunk_ends


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Products of the groups that end at `ends`: (S, I) by (N, I, O) is (S, O); (I, S) by (S, O) is (N, I, O)."""
    if _has_grouped_mm(a, b):
        return F.grouped_mm(a, b, offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    if b.dim() == 3:
        return torch.cat([rows @ w for rows, w in zip(a.split(sizes), b)])
    return torch.stack([rows @ cols for rows, cols in zip(a.split(sizes, dim=1), b.split(sizes))])


def _has_grouped_mm(a: Tensor, b: Tensor) -> bool:
    if a.dtype not in _GROUPED_MM_DTYPES or (a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 0)):
        return False
    rows = a.shape[1] if b.dim() == 3 else a.shape[0]
    return rows % _ALIGNED_ELEMENTS == 0 and b.shape[-1] % _ALIGNED_ELEMENTS == 0


def pad_rank(w_NRD: Tensor) -> Tensor:
    """Pad R with zeros to what grouped_mm can take; products with the padded weight are exactly the same."""
    missing = -w_NRD.shape[1] % _ALIGNED_ELEMENTS
    return F.pad(w_NRD, (0, 0, 0, missing)) if missing else w_NRD
