"""The table of what is trained and the memory it takes, printed once an adapter is attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_HEADER = ("part", "tensors", "parameters", "per token", "dtype")

# what an optimiser keeps, in bytes for each byte of float32 parameter: Adam two moments, Lion and RMSprop one, SGD
# without momentum none; others keep what depends on their settings or on the shapes
_OPTIMIZER_STATES = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "paged_adamw_32bit": 2.0,
    "adamw_bnb_8bit": 0.5,
    "adamw_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
    "lion_32bit": 1.0,
    "paged_lion_32bit": 1.0,
    "lion_8bit": 0.25,
    "paged_lion_8bit": 0.25,
    "adagrad": 1.0,
    "rmsprop": 1.0,
    "sgd": 0.0,
}


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


def format_memory(rows: list[ParameterRow], optimizer: str) -> str:
    """A line on the memory of parameters, gradients and the optimiser's states (a name of TrainingArguments.optim).

    It is that of one process; FSDP divides it among its processes. Activations are not in it.
    """
    size = sum(row.bytes for row in rows)
    parts = {"parameters": size, "gradients": size}
    if optimizer in _OPTIMIZER_STATES:
        parts[f"states of {optimizer}"] = int(size * _OPTIMIZER_STATES[optimizer])
        total = f" = {_mebibytes(sum(parts.values()))}"
    else:
        total = f", and the states of {optimizer}"
    return " + ".join(f"{name} {_mebibytes(value)}" for name, value in parts.items()) + total


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"
