"""The table of what is trained, printed once an adapter is attached, and the memory it takes to train it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
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
        bytes: that the parameters take.
    """

    part: str
    tensors: int
    parameters: int
    activated: int
    dtype: str
    bytes: int


def parameter_row(part: str, parameters: Sequence[Tensor], activated: int | None = None) -> ParameterRow:
    """The row of these parameters; all of them are activated unless said otherwise."""
    count = sum(p.numel() for p in parameters)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    size = sum(p.numel() * p.element_size() for p in parameters)
    activated = count if activated is None else activated
    return ParameterRow(part, len(parameters), count, activated, ", ".join(dtypes), size)


def format_table(rows: list[ParameterRow]) -> str:
    """A table of the rows and their total, one line each."""
    cells = [(r.part, str(r.tensors), f"{r.parameters:,}", f"{r.activated:,}", r.dtype) for r in rows]
    total = [sum(column) for column in zip(*((r.tensors, r.parameters, r.activated) for r in rows))]
    cells.append(("total", str(total[0]), f"{total[1]:,}", f"{total[2]:,}", ""))
    return format_columns([_HEADER, *cells], right=(1, 2, 3))


def format_columns(rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """Rows of text in columns, those of the numbers in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


def format_memory(rows: Sequence[ParameterRow], optimizer: torch.optim.Optimizer) -> str:
    """A line on the memory of parameters, gradients and what the optimiser keeps, once it has made a step.

    It is that of one process: parameters and gradients whole, though FSDP divides them, the optimiser's states as they
    are here. Activations are not in it.
    """
    size = sum(row.bytes for row in rows)
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    states = sum(_on_this_process(value).nbytes for value in values)
    parts = {"parameters": size, "gradients": size, "states of the optimiser": states}
    line = " + ".join(f"{name} {format_size(value)}" for name, value in parts.items())
    return f"{line} = {format_size(sum(parts.values()))}"


def _on_this_process(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def format_size(size: int) -> str:
    """Bytes in MiB, or from 10 GiB on in GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.2f} MiB"
