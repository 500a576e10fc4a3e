"""Real tokens and padding, as the host's collators lay them out."""

import pytest
import torch

from axolotl_moe_peft.shared.batches import Sequences, find_sequences, real_token_mask


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


def test_padding_whose_positions_are_all_0_is_found():
    row = {"input_ids": [5, 6, 0, 0, 0], "position_ids": [0, 1, 0, 0, 0], "labels": [-100, 6, -100, -100, -100]}
    assert mask_of(**row) == [1, 1, 0, 0, 0]


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


def sequences_of(router_input: str = "prompt", **batch) -> Sequences:
    return find_sequences({name: torch.tensor(value) for name, value in batch.items()}, router_input)


def test_rows_are_sequences_and_the_prompt_ends_before_the_first_label():
    found = sequences_of(
        input_ids=[[5, 6, 7, 8, 0, 0], [0, 0, 5, 6, 7, 8]],
        attention_mask=[[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]],
        labels=[[-100, -100, 7, -100, -100, -100], [-100, -100, -100, -100, -100, 8]],
    )
    assert found.count == 2
    assert found.index_BS.tolist() == [[0, 0, 0, 0, -1, -1], [-1, -1, 1, 1, 1, 1]]
    # the label-free token after the first label (an end of turn, say) is answer, not prompt
    assert found.prompt_BS.int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert found.last_prompt_token().tolist() == [1, 10]


def test_packed_segments_are_sequences_and_the_filling_is_none():
    found = sequences_of(
        input_ids=[[5, 6, 7, 5, 8, 0, 0], [5, 6, 5, 6, 7, 8, 9]],
        position_ids=[[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4]],
        labels=[[-100, -100, 7, -100, 8, -100, -100], [-100, 6, -100, -100, -100, 8, 9]],
    )
    assert found.count == 4
    assert found.index_BS.tolist() == [[0, 0, 0, 1, 1, -1, -1], [2, 2, 3, 3, 3, 3, 3]]
    assert found.last_prompt_token().tolist() == [1, 3, 7, 11]


def test_numbers_in_the_attention_mask_tell_segments():
    found = sequences_of(input_ids=[[5, 6, 5, 6, 0]], attention_mask=[[1, 1, 2, 2, 0]])
    assert found.index_BS.tolist() == [[0, 0, 1, 1, -1]]


def test_without_labels_everything_real_is_prompt_whatever_generation_gives_padding_as_positions():
    found = sequences_of(
        input_ids=[[0, 0, 5, 6], [5, 6, 7, 8]],
        attention_mask=[[0, 0, 1, 1], [1, 1, 1, 1]],
        position_ids=[[0, 0, 0, 1], [0, 1, 2, 3]],
    )
    assert found.index_BS.tolist() == [[-1, -1, 0, 0], [1, 1, 1, 1]]
    assert found.last_prompt_token().tolist() == [3, 7]
    assert sequences_of(input_ids=[[5, 6], [7, 8]]).index_BS.tolist() == [[0, 0], [1, 1]]


def test_a_row_of_padding_has_no_sequence():
    found = sequences_of(input_ids=[[0, 0], [5, 6]], attention_mask=[[0, 0], [1, 1]])
    assert found.count == 1
    assert found.last_prompt_token().tolist() == [3]


def test_prompt_mean_is_that_of_each_sequences_prompt():
    found = sequences_of(
        input_ids=[[5, 6, 7, 5, 8, 9]], position_ids=[[0, 1, 2, 0, 1, 2]], labels=[[-100, -100, 7, -100, 8, 9]]
    )
    x = torch.randn(1, 6, 4, dtype=torch.bfloat16)
    expected = torch.stack([x[0, 0:2].float().mean(0), x[0, 3].float()])
    torch.testing.assert_close(found.prompt_mean(x), expected)


def test_a_sequence_without_prompt_is_an_error_that_names_the_way_out():
    row = {"input_ids": [[5, 6, 5, 6]], "position_ids": [[0, 1, 0, 1]], "labels": [[-100, 6, 5, 6]]}
    with pytest.raises(ValueError, match="1 of 2 sequences .*train_on_inputs: false.*router_input: sequence"):
        sequences_of(**row)
    whole = sequences_of("sequence", **row)
    assert whole.last_prompt_token().tolist() == [1, 3]


@pytest.mark.parametrize("kinds", [3, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_found_by_positions_of_several_kinds(kinds, side):
    """As vision-language models have them: time stands still in an image, whose tokens all look the same."""
    image, text = [7] * 4, [11, 12, 13]
    ids = torch.tensor([5, *image, *text, *text])
    labels = torch.tensor([-100] * 5 + text + [-100] + text[1:])
    time = torch.tensor([0, 1, 1, 1, 1, 3, 4, 5, 0, 1, 2])
    height = torch.tensor([0, 1, 1, 2, 2, 3, 4, 5, 0, 1, 2])
    width = torch.tensor([0, 1, 2, 1, 2, 3, 4, 5, 0, 1, 2])
    plain = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2])
    positions = torch.stack([plain, time, height, width][-kinds:])
    filler = {"ids": torch.zeros(3, dtype=ids.dtype), "labels": torch.full((3,), -100)}
    pad = torch.arange(3).expand(kinds, 3)
    if side == "left":
        order = [filler["ids"], ids], [filler["labels"], labels], [pad, positions]
    else:
        order = [ids, filler["ids"]], [labels, filler["labels"]], [positions, pad]
    ids_BS, labels_BS = torch.cat(order[0])[None], torch.cat(order[1])[None]
    positions = torch.cat(order[2], dim=1)[:, None]
    mask = real_token_mask(ids_BS, None, positions, labels_BS)
    real = [False] * 3 + [True] * 11 if side == "left" else [True] * 11 + [False] * 3
    assert mask[0].tolist() == real
    found = find_sequences({"input_ids": ids_BS, "position_ids": positions, "labels": labels_BS})
    assert found.count == 2


def test_labels_of_another_shape_say_nothing_of_padding():
    ids = torch.tensor([[5, 6, 7, 7]])
    assert real_token_mask(ids, None, torch.tensor([[0, 1, 0, 1]]), torch.tensor([2])) is None
