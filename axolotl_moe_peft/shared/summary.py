"""The table of what is trained, printed once an adapter is attached, and the memory it takes to train it."""

from __future__ import annotations

from collections.abc import Sequence
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
    widths = [max(len(row[i]) for row in [_HEADER, *cells]) for i in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, 4) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [_HEADER, *cells]
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
    line = " + ".join(f"{name} {_mebibytes(value)}" for name, value in parts.items())
    return f"{line} = {_mebibytes(sum(parts.values()))}"


def _on_this_process(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"
