"""The table of what is trained, printed once an adapter is attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_HEADER = ("part", "tensors", "parameters", "per token", "dtype")


@dataclass(frozen=True)
class ParameterRow:
    """Trainable parameters of one part of an adapter.

    Attributes:
        part: experts, shared, router, cores or other.
        tensors, parameters: how many.
        activated: parameters that one token passes through; a router counts whole.
        dtype: e.g. float32.
    """

    part: str
    tensors: int
    parameters: int
    activated: int
    dtype: str


def parameter_row(part: str, parameters: Sequence[Tensor], activated: int | None = None) -> ParameterRow:
    """The row of these parameters; all of them are activated unless said otherwise."""
    count = sum(p.numel() for p in parameters)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    return ParameterRow(part, len(parameters), count, count if activated is None else activated, ", ".join(dtypes))


def format_table(rows: list[ParameterRow]) -> str:
    """A table of the rows and their total, one line each."""
    cells = [(r.part, str(r.tensors), f"{r.parameters:,}", f"{r.activated:,}", r.dtype) for r in rows]
    total = [sum(column) for column in zip(*((r.tensors, r.parameters, r.activated) for r in rows))]
    cells.append(("total", str(total[0]), f"{total[1]:,}", f"{total[2]:,}", ""))
    widths = [max(len(row[i]) for row in [_HEADER, *cells]) for i in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, 4) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [_HEADER, *cells]
    )
