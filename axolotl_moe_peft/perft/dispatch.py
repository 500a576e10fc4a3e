"""Slots: the choices of a batch of tokens sorted by expert, and matrix products of such groups.

Shape suffixes: T tokens, K experts per token, S slots (one per choice, and padding where a kind of slots has some), N
experts, D model width, R rank; of blocks of slots: G blocks of B slots.

There is a kind of slots for each kind of device, which `products.slots_for` picks. All have the same three kernels, of
which the first two are each other's adjoint, so that they serve all forwards and backwards:

    gather    z_SR[s]     = w[expert of s] @ x[token of s]
    scatter   y_TD[t]     = sum over the slots s of t:  w[expert of s].T @ z[s]
    outer     g_NRD[e]    = sum over the slots s of e:  z[s] outer x[token of s]

Some choices may be of no expert: their index is N. Nothing is multiplied for them, and they add nothing.

A kernel reads x in any dtype and computes in that of w or z. With a mask the rows x[token of s] go through dropout
(without its scale), a mask of its own for each slot and the same in all three kernels.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.dropout import Mask

# Bytes of gathered rows at a time on a CPU. At 4 MiB they stay in the cache and the allocator reuses them; with 32 MiB
# and more each product maps fresh pages, which took three to four times as long (2048 x 2048 tokens, K = 2).
_CPU_CHUNK_BYTES = 4 * 2**20
# Every stride of grouped_mm's operands must be a multiple of 16 bytes: 8 elements suffice for every dtype.
_ALIGNED_ELEMENTS = 8
_CPU_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Slots of one expert in a product: padding is at most N blocks, and a block reads a copy of its expert's weight.
_BLOCK = 64

Drop = Callable[[Tensor], Tensor]


class Slots(Protocol):
    """Choices sorted by expert, as tensors (a named tuple of them).

    Attributes:
        choice_S: int64, each slot's position in the unsorted choices `indices_TK.flatten()`; T * K for padding.
        token_S: int64, the token of each slot; any for padding.
    """

    choice_S: Tensor
    token_S: Tensor

    @classmethod
    def of(cls, indices_TK: Tensor, num_experts: int, partial: bool = False) -> Slots:
        """Sort the choices; slots of one expert stay in the order of their tokens.

        Args:
            indices_TK: int64, the expert of each choice.
            num_experts: N.
            partial: whether some may be of no expert.
        """

    def gather(self, x_TD: Tensor, w_NRD: Tensor, mask: Mask | None) -> Tensor: ...

    def scatter(self, z_SR: Tensor, w_NRD: Tensor, num_tokens: int, mask: Mask | None) -> Tensor: ...

    def outer(self, z_SR: Tensor, x_TD: Tensor, num_experts: int, mask: Mask | None) -> Tensor: ...


class HostSlots(NamedTuple):
    """On a CPU: a chunk of slots at a time that fits into its cache, a product for each of the chunk's experts.

    Three tokens, K = 2, N = 4, where nobody chose expert 2:

        indices_TK    [[1, 3], [0, 1], [3, 1]]      slots 0 to 5, in the order of tokens: 1 3 0 1 3 1
        choice_S      [2, 0, 3, 5, 1, 4]            the same slots sorted by expert:      0 1 1 1 3 3
        token_S       [1, 0, 1, 2, 0, 2]            the token of each, choice_S // K
        ends_N        [1, 4, 4, 6]                  int32: where each expert's slots end; expert 1 has the slots 1 to
                                                    3 of the sorted ones, expert 2 none
    """

    choice_S: Tensor
    token_S: Tensor
    ends_N: Tensor

    @classmethod
    def of(cls, indices_TK: Tensor, num_experts: int, partial: bool = False) -> HostSlots:
        expert_S, choice_S = indices_TK.flatten().sort(stable=True)
        ends_N = _ends(expert_S, num_experts)
        if partial:
            choice_S = choice_S[: ends_N[-1]]
        return cls(choice_S, choice_S // indices_TK.shape[1], ends_N.to(torch.int32))

    def gather(self, x_TD: Tensor, w_NRD: Tensor, mask: Mask | None) -> Tensor:
        z_SR, drop = w_NRD.new_empty(len(self.token_S), w_NRD.shape[1]), _dropper(mask, x_TD)
        for slots, experts, ends in self._chunks(w_NRD):
            rows = _rows(x_TD, self.token_S[slots], w_NRD.dtype, drop)
            z_SR[slots] = _grouped_mm(rows, w_NRD[experts].transpose(1, 2), ends)
        return z_SR

    def scatter(self, z_SR: Tensor, w_NRD: Tensor, num_tokens: int, mask: Mask | None) -> Tensor:
        y_TD, drop = z_SR.new_zeros(num_tokens, w_NRD.shape[-1]), _dropper(mask, z_SR)
        for slots, experts, ends in self._chunks(w_NRD):
            rows = _grouped_mm(z_SR[slots], w_NRD[experts], ends)
            y_TD.index_add_(0, self.token_S[slots], rows if drop is None else drop(rows))
        return y_TD

    def outer(self, z_SR: Tensor, x_TD: Tensor, num_experts: int, mask: Mask | None) -> Tensor:
        grad_NRD, drop = z_SR.new_zeros(num_experts, z_SR.shape[1], x_TD.shape[1]), _dropper(mask, x_TD)
        for slots, experts, ends in self._chunks(grad_NRD):
            rows = _rows(x_TD, self.token_S[slots], z_SR.dtype, drop)
            grad_NRD[experts] += _grouped_mm(z_SR[slots].t(), rows, ends)
        return grad_NRD

    def _chunks(self, w_NRD: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Slots, the experts they belong to, and where those experts end within the slots."""
        step = max(1, _CPU_CHUNK_BYTES // (w_NRD.shape[-1] * w_NRD.element_size()))
        ends = self.ends_N.tolist()
        for start in range(0, len(self.token_S), step):
            stop = min(start + step, len(self.token_S))
            first, last = bisect_right(ends, start), bisect_left(ends, stop)
            chunk_ends = torch.tensor([min(end, stop) - start for end in ends[first : last + 1]], dtype=torch.int32)
            yield slice(start, stop), slice(first, last + 1), chunk_ends


class GroupedSlots(NamedTuple):
    """Where `F.grouped_mm` is one kernel: the fields of HostSlots, in one chunk.

    Choices of no expert are the last slots, as their number is not known without waiting for it; grouped products end
    before them.
    """

    choice_S: Tensor
    token_S: Tensor
    ends_N: Tensor
    of_none_S1: Tensor  # bool; empty where every choice is of an expert

    @classmethod
    def of(cls, indices_TK: Tensor, num_experts: int, partial: bool = False) -> GroupedSlots:
        expert_S, choice_S = indices_TK.flatten().sort(stable=True)
        ends_N = _ends(expert_S, num_experts).to(torch.int32)
        return cls(choice_S, choice_S // indices_TK.shape[1], ends_N, _of_none(expert_S, num_experts, partial))

    def gather(self, x_TD: Tensor, w_NRD: Tensor, mask: Mask | None) -> Tensor:
        rows = _rows(x_TD, self.token_S, w_NRD.dtype, _dropper(mask, x_TD))
        return _blank(F.grouped_mm(rows, w_NRD.transpose(1, 2), offs=self.ends_N), self.of_none_S1)

    def scatter(self, z_SR: Tensor, w_NRD: Tensor, num_tokens: int, mask: Mask | None) -> Tensor:
        rows, drop = _blank(F.grouped_mm(z_SR, w_NRD, offs=self.ends_N), self.of_none_S1), _dropper(mask, z_SR)
        # index_add_ adds in no fixed order: sort back and sum over K, or recomputation may route differently
        y_SD = torch.empty_like(rows)
        y_SD[self.choice_S] = rows if drop is None else drop(rows)
        return _sum_of_choices(y_SD, num_tokens)

    def outer(self, z_SR: Tensor, x_TD: Tensor, num_experts: int, mask: Mask | None) -> Tensor:
        rows = _rows(x_TD, self.token_S, z_SR.dtype, _dropper(mask, x_TD))
        return F.grouped_mm(z_SR.t(), rows, offs=self.ends_N)


class BlockedSlots(NamedTuple):
    """On every other device: blocks of B slots of one expert, the last of each padded, and batched products of them.

    Their number is one that no routing exceeds, so that nobody waits for a count. With B = 2 the choices of HostSlots'
    example give

        choice_S      [2 6  0 3  5 6  1 4  6 6 ...]     6 is padding
        expert_G      [0    1    1    3    3 ...]
        slot_TK       [[2, 6], [0, 3], [7, 4]]          where each choice went; any slot for one of no expert
    """

    choice_S: Tensor
    token_S: Tensor
    expert_G: Tensor
    slot_TK: Tensor
    of_none_C1: Tensor  # bool, of the unsorted choices; empty where every choice is of an expert

    @classmethod
    def of(cls, indices_TK: Tensor, num_experts: int, partial: bool = False) -> BlockedSlots:
        num_choices = indices_TK.numel()
        expert_S, choice_S = indices_TK.flatten().sort(stable=True)
        positions_S = torch.arange(num_choices, device=indices_TK.device)
        ends_N = _ends(expert_S, num_experts)
        starts_N = F.pad(ends_N[:-1], (1, 0))
        blocks_N = (ends_N - starts_N + _BLOCK - 1) // _BLOCK
        first_block_N = blocks_N.cumsum(0) - blocks_N
        num_blocks = min(num_choices, num_choices // _BLOCK + num_experts)
        num_slots = num_blocks * _BLOCK
        first_slot_N = first_block_N * _BLOCK - starts_N
        if partial:  # the choices of no expert share a place behind the last slot
            first_slot_N = F.pad(first_slot_N, (0, 1))
        slot_S = first_slot_N[expert_S] + positions_S
        if partial:
            slot_S = torch.where(expert_S < num_experts, slot_S, num_slots)
        padded_S = choice_S.new_full((num_slots + partial,), num_choices).index_copy(0, slot_S, choice_S)[:num_slots]
        block_G = torch.arange(num_blocks, device=indices_TK.device)
        expert_G = torch.searchsorted(first_block_N + blocks_N, block_G, right=True).clamp(max=num_experts - 1)
        token_S = (padded_S // indices_TK.shape[1]).clamp(max=max(len(indices_TK) - 1, 0))
        slot_TK = torch.empty_like(choice_S).index_copy(0, choice_S, slot_S).view(indices_TK.shape)
        if partial:
            slot_TK = slot_TK.clamp(max=num_slots - 1)
        return cls(padded_S, token_S, expert_G, slot_TK, _of_none(indices_TK.flatten(), num_experts, partial))

    def gather(self, x_TD: Tensor, w_NRD: Tensor, mask: Mask | None) -> Tensor:
        rows = _rows(x_TD, self.token_S, w_NRD.dtype, _dropper(mask, x_TD))
        return torch.bmm(self._blocks(rows), w_NRD[self.expert_G].transpose(1, 2)).flatten(0, 1)

    def scatter(self, z_SR: Tensor, w_NRD: Tensor, num_tokens: int, mask: Mask | None) -> Tensor:
        rows, drop = torch.bmm(self._blocks(z_SR), w_NRD[self.expert_G]).flatten(0, 1), _dropper(mask, z_SR)
        rows = rows if drop is None else drop(rows)
        return _sum_of_choices(_blank(rows.index_select(0, self.slot_TK.flatten()), self.of_none_C1), num_tokens)

    def outer(self, z_SR: Tensor, x_TD: Tensor, num_experts: int, mask: Mask | None) -> Tensor:
        rows = _rows(x_TD, self.token_S, z_SR.dtype, _dropper(mask, x_TD))
        z_SR = torch.where((self.choice_S < self.slot_TK.numel()).unsqueeze(1), z_SR, 0)  # but for padding
        products_GRD = torch.bmm(self._blocks(z_SR).transpose(1, 2), self._blocks(rows))
        experts_N1 = torch.arange(num_experts, device=z_SR.device).unsqueeze(1)
        # not index_add_, which adds in no fixed order
        sums = (self.expert_G == experts_N1).to(z_SR.dtype) @ products_GRD.flatten(1)
        return sums.unflatten(1, products_GRD.shape[1:])

    def _blocks(self, x_SD: Tensor) -> Tensor:
        return x_SD.view(len(self.expert_G), _BLOCK, x_SD.shape[1])


def pad_rank(w_NRD: Tensor) -> Tensor:
    """Pad R with zeros to what grouped_mm can take; products with the padded weight are exactly the same."""
    missing = -w_NRD.shape[1] % _ALIGNED_ELEMENTS
    return F.pad(w_NRD, (0, 0, 0, missing)) if missing else w_NRD


def _ends(expert_S: Tensor, num_experts: int) -> Tensor:
    return torch.searchsorted(expert_S, torch.arange(num_experts, device=expert_S.device), right=True)


def _of_none(expert_C: Tensor, num_experts: int, partial: bool) -> Tensor:
    """Which choices are of no expert: bool (C, 1), or (0,) where there can be none."""
    return (expert_C == num_experts).unsqueeze(1) if partial else expert_C.new_empty(0, dtype=torch.bool)


def _blank(rows: Tensor, where: Tensor) -> Tensor:
    """Zero rows of a fresh tensor, whatever is in them."""
    return rows.masked_fill_(where, 0) if where.numel() else rows


def _dropper(mask: Mask | None, like: Tensor) -> Drop | None:
    return None if mask is None else mask.dropper(like.device)


def _rows(x_TD: Tensor, token_S: Tensor, dtype: torch.dtype, drop: Drop | None) -> Tensor:
    rows = x_TD.index_select(0, token_S).to(dtype)
    return rows if drop is None else drop(rows)


def _sum_of_choices(y_SD: Tensor, num_tokens: int) -> Tensor:
    y_TKD = y_SD.view(num_tokens, len(y_SD) // max(num_tokens, 1), y_SD.shape[1])
    return y_TKD.sum(1, dtype=y_SD.dtype)  # autocast makes sums float32


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Products of the groups that end at `ends`: (S, I) by (N, I, O) is (S, O); (I, S) by (S, O) is (N, I, O)."""
    aligned = (a.shape[1] if b.dim() == 3 else a.shape[0]) % _ALIGNED_ELEMENTS == b.shape[-1] % _ALIGNED_ELEMENTS == 0
    if aligned and a.dtype in _CPU_GROUPED_MM_DTYPES:
        return F.grouped_mm(a, b, offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    if b.dim() == 3:
        return torch.cat([rows @ w for rows, w in zip(a.split(sizes), b)])
    return torch.stack([rows @ cols for rows, cols in zip(a.split(sizes, dim=1), b.split(sizes))])
