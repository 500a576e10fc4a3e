"""Rows whose first token is supervised are found before training, with their numbers."""

import pytest
from datasets import Dataset, IterableDataset

from axolotl_moe_peft.host.rows import check_rows_have_prompts, drop_rows_without_prompt
from tests.pt_moe.test_trainers import tokenizer


def rows(labels: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": [[5 + i] * len(row) for i, row in enumerate(labels)], "labels": labels})


def test_rows_with_prompts_pass_and_empty_ones_too():
    check_rows_have_prompts("rows", rows([[-100, 3], [-100, -100], [], [-100]]), tokenizer())


def test_the_rows_are_numbered_as_they_are_prepared():
    prepared = rows([[-100, 3], [], [7, 3], [-100], [4]]).select([4, 3, 2, 1, 0, 2])
    with pytest.raises(ValueError, match=r"rows: 3 of 6 rows .*row 0: 'w9'; row 2: 'w7 ?w7'; row 5: 'w7 ?w7'\. Leave"):
        check_rows_have_prompts("rows", prepared, tokenizer())


def test_many_are_counted_and_some_shown(monkeypatch):
    monkeypatch.setattr("axolotl_moe_peft.host.rows._ROWS_AT_A_TIME", 3)
    with pytest.raises(ValueError, match=r"8 of 9 rows .*row 5: .* and 3 more"):
        check_rows_have_prompts("rows", rows([[-100, 1]] + [[1]] * 8), tokenizer())


def test_a_stream_is_not_looked_through():
    check_rows_have_prompts("rows", IterableDataset.from_generator(lambda: iter(())), tokenizer())
    check_rows_have_prompts("rows", None, tokenizer())


def test_rows_without_prompts_are_left_out():
    kept = drop_rows_without_prompt("rows", rows([[-100, 3], [7, 3], [], [-100], [4]]))
    assert kept["input_ids"] == [[5, 5], [], [8]]
    with pytest.raises(ValueError, match="rows: all 2 rows begin with a supervised token"):
        drop_rows_without_prompt("rows", rows([[1], [2]]))
