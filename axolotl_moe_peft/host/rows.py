"""Rows without a prompt, found while datasets are prepared and not at the step that comes to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow.compute as pc
import torch
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..shared.batches import IGNORE_INDEX

LOG = get_logger(__name__)

KEY = "rows_without_prompt"
_SHOWN = 5
_ROWS_AT_A_TIME = 10_000
_LENGTH = 60
_OF_TOKENS = ("input_ids", "labels", "attention_mask", "position_ids")


def check_rows_have_prompts(name: str, rows: object, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that no row begins with a supervised token, where a router reads what comes before the first one.

    Args:
        name: what the rows are, for the message.
        rows: tokenised rows; only a Dataset with labels can be looked through before training.
        tokenizer: shows how the rows begin.

    Raises:
        ValueError: some do; with their numbers and beginnings.
    """
    if found := _rows_without_prompt(rows):
        beginnings = (f"row {i}: {tokenizer.decode(rows[i]['input_ids'])[:_LENGTH]!r}" for i in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"{name}: {len(found)} of {len(rows)} rows begin with a supervised token, so that there is no prompt that "
            f"the router could read (`router_input: prompt`): {'; '.join(beginnings)}{more}. Leave them out with "
            f"`{KEY}: drop` in the adapter's block, or mask their prompts, or let the router read whole sequences "
            "with `router_input: sequence`, in training and at inference."
        )


def drop_rows_without_prompt(name: str, rows: Dataset) -> Dataset:
    """The rows that do not begin with a supervised token.

    Raises:
        ValueError: there are none.
    """
    found = _rows_without_prompt(rows)
    if not found:
        return rows
    if len(found) == len(rows):
        raise ValueError(f"{name}: all {len(rows)} rows begin with a supervised token; `{KEY}: drop` leaves none.")
    LOG.info("%s: %d of %d rows have no prompt and are left out: %s", name, len(found), len(rows), _some(found))
    without = set(found)
    return rows.select([i for i in range(len(rows)) if i not in without])


def spread_rows(rows: object, with_labels: bool, most: int = 256) -> Iterator[dict[str, Tensor]]:
    """Some of the training rows, spread over all of them, as batches of one row; of a stream the first.

    Args:
        rows: tokenised rows; None, or rows of pairs, are none.
        with_labels: whether their labels are of tokens.
        most: of them.
    """
    if isinstance(rows, Dataset):
        rows = rows.select(range(0, len(rows), -(-len(rows) // most) or 1))
    for row in itertools.islice(rows or (), most):
        if "input_ids" in row:
            names = [name for name in _OF_TOKENS if row.get(name) is not None and (with_labels or name != "labels")]
            yield {name: torch.tensor([row[name]]) for name in names}


def _some(numbers: list[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return ", ".join(map(str, numbers[:_SHOWN])) + more


def _rows_without_prompt(rows: object) -> list[int]:
    if not isinstance(rows, Dataset) or "labels" not in rows.column_names:
        return []
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
