"""Whether an adapter's weights are those that they were, told by a number."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprints:
    """Numbers for the bits of adapters' weights: the same in every process and on every device.

    A number is computed anew only where weights were written to or replaced, since that waits for the device. Writing
    through `.data` into the same memory is not seen.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[list[tuple[int, ...]], list[weakref.ref], int]] = {}

    def of(self, adapter_name: str, parameters: Iterable[nn.Parameter]) -> int | None:
        """The number for these parameters of an adapter; None where they are not here as a whole (sharded, meta)."""
        parameters = list(parameters)
        if any(type(p.data) is not Tensor or p.is_meta or hasattr(p, "ds_id") for p in parameters):
            return None
        state = [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        known = self._known.get(adapter_name)
        # a parameter that is gone may have left its place to another one
        if known is None or known[0] != state or any(reference() is None for reference in known[1]):
            known = (state, [weakref.ref(p) for p in parameters], _fingerprint(parameters))
            self._known[adapter_name] = known
        return known[2]

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()  # a copy has other tensors


@torch.no_grad()
def _fingerprint(parameters: list[nn.Parameter]) -> int:
    number = 0
    for parameter in parameters:
        bits = parameter.detach().flatten().view(_INTEGERS[parameter.element_size()]).long()
        position = torch.arange(1, len(bits) + 1, device=bits.device)
        number = (number * 1_000_003 + int((bits * position).sum())) % 2**64
    return number
