"""Dropout whose masks are drawn again in backward instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# A 64-bit random number decides for four elements: 16 bits each, so that the probability is exact to 2^-17.
_LEVELS = 2**16


class Mask(NamedTuple):
    """Which elements of a tensor's rows are dropped.

    Attributes:
        level: out of 2^16, the probability.
        seed: of the random numbers.
    """

    level: int
    seed: int

    @classmethod
    def draw(cls, probability: float) -> Mask:
        """A new mask; reproducible by `torch.manual_seed`, and under checkpointing, which restores that generator."""
        # on the CPU: a seed that was drawn on an accelerator would have to be waited for
        level = min(round(probability * _LEVELS), _LEVELS - 1)
        return cls(level, int(torch.randint(2**63 - 1, (), device="cpu")))

    @property
    def scale(self) -> float:
        """What the kept elements have to be multiplied by, for the mean to stay."""
        return 1 / (1 - self.level / _LEVELS)

    def dropper(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function that zeroes what is dropped, in place.

        It is to be called with the rows in order, in chunks of the same sizes each time, and masks them alike each
        time that one is made on the same kind of device.
        """
        # tensors on the meta device have no elements, and no generator
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(self.seed)

        def drop(rows: Tensor) -> Tensor:
            numbers = torch.empty(-(-rows.numel() // 4), dtype=torch.int64, device=device)
            numbers.random_(-(2**63), None, generator=generator)
            kept = numbers.view(torch.int16)[: rows.numel()] >= self.level - _LEVELS // 2
            return rows.mul_(kept.view(rows.shape))

        return drop
