"""Rows without a prompt, found in the prepared datasets and not at the step that comes to them."""

from __future__ import annotations

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..shared.batches import IGNORE_INDEX

_SHOWN = 5
_ROWS_AT_A_TIME = 10_000
_LENGTH = 60


def check_rows_have_prompts(name: str, rows: object, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that no row begins with a supervised token, where a router reads what comes before the first one.

    Args:
        name: what the rows are, for the message.
        rows: the prepared rows; only a Dataset with labels can be looked through before training.
        tokenizer: shows how the rows begin.

    Raises:
        ValueError: some do; with their numbers and beginnings.
    """
    if not isinstance(rows, Dataset) or "labels" not in rows.column_names:
        return
    found = _rows_without_prompt(rows)
    if not found:
        return
    beginnings = (f"row {i}: {tokenizer.decode(rows[i]['input_ids'])[:_LENGTH]!r}" for i in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise ValueError(
        f"{len(found)} of {len(rows)} {name} begin with a supervised token, so that there is no prompt that the "
        f"router could read (`router_input: prompt`): {'; '.join(beginnings)}{more} (numbers of the prepared rows). "
        "Take them out of their datasets, or mask their prompts, or let the router read whole sequences with "
        "`router_input: sequence`, in training and at inference."
    )


def _rows_without_prompt(rows: Dataset) -> list[int]:
    found: list[int] = []
    labels = rows.select_columns("labels").with_format("arrow")
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        column = labels[start : start + _ROWS_AT_A_TIME]["labels"].combine_chunks()
        filled = pc.greater(pc.list_value_length(column), 0)
        numbers = pc.indices_nonzero(filled)
        first = pc.list_element(column.filter(filled), 0)
        supervised = pc.indices_nonzero(pc.not_equal(first, IGNORE_INDEX))
        found += [start + i for i in numbers.take(supervised).to_pylist()]
    return found
