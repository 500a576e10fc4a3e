"""Real tokens and padding, as the host's collators lay them out."""

import torch

from axolotl_moe_peft.batches import real_token_mask


def mask_of(**batch) -> list[int]:
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    mask = real_token_mask(*(torch.tensor([batch[n]]) if n in batch else None for n in names))
    return None if mask is None else mask[0].int().tolist()


def test_attention_mask_decides_on_either_side_and_with_segment_numbers():
    assert mask_of(input_ids=[0, 0, 5], attention_mask=[0, 0, 1]) == [0, 0, 1]
    assert mask_of(input_ids=[5, 6, 0], attention_mask=[1, 2, 0]) == [1, 1, 0]


def test_without_mask_and_positions_every_token_is_real():
    assert mask_of(input_ids=[5, 0, 0], labels=[5, -100, -100]) is None


def test_packed_row_ends_with_a_segment_of_padding():
    row = {"input_ids": [5, 6, 7, 5, 8, 0, 0, 0], "position_ids": [0, 1, 2, 0, 1, 0, 1, 2]}
    assert mask_of(**row, labels=[-100, 6, 7, -100, 8, -100, -100, -100]) == [1, 1, 1, 1, 1, 0, 0, 0]


def test_packed_row_may_begin_with_the_padding():
    row = {"input_ids": [0, 0, 5, 6], "position_ids": [0, 1, 0, 1], "labels": [-100, -100, -100, 6]}
    assert mask_of(**row) == [0, 0, 1, 1]


def test_a_single_position_of_padding_is_found():
    assert mask_of(input_ids=[5, 6, 0], position_ids=[0, 1, 0], labels=[-100, 6, -100]) == [1, 1, 0]


def test_unlabelled_text_and_repeated_labelled_tokens_are_real():
    assert mask_of(input_ids=[5, 6, 7, 8], position_ids=[0, 1, 0, 1], labels=[5, 6, -100, -100]) == [1, 1, 1, 1]
    assert mask_of(input_ids=[5, 6, 7, 7], position_ids=[0, 1, 0, 1], labels=[5, 6, 7, 7]) == [1, 1, 1, 1]


def test_a_row_of_nothing_but_padding_has_no_real_token():
    assert mask_of(input_ids=[0, 0, 0], position_ids=[0, 1, 2], labels=[-100, -100, -100]) == [0, 0, 0]


def test_rows_differ_and_block_masks_do_not_confuse():
    mask = real_token_mask(
        torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8]]),
        torch.ones(2, 1, 4, 4),
        torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]),
        torch.tensor([[5, 6, -100, -100], [-100, 6, 7, 8]]),
    )
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
