"""Generation: the prompt is chosen once, by the input, and stays in the cache."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from tests.pt_moe.prompts import FAMILIES, SETTINGS, adapter_tensors, config, pt_moe, reference_logits
from tests.tiny_models import PAD, random_ids, tiny_model

NEW = 8


def generate(model: PeftModel, ids: Tensor, **kwargs) -> Tensor:
    """The new tokens, (B, NEW)."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **kwargs}
    torch.manual_seed(0)
    return model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), **settings)[:, ids.shape[1] :]


def different_lengths() -> Tensor:
    """Three inputs, left-padded."""
    rows = [random_ids(1, length, seed=length)[0] for length in (4, 9, 6)]
    return torch.stack([torch.nn.functional.pad(row, (9 - len(row), 0), value=PAD) for row in rows])


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached(family, way):
    model, ids = pt_moe(family), different_lengths()
    cached = generate(model, ids, use_cache=True, **WAYS[way])
    assert torch.equal(cached, generate(model, ids, use_cache=False, **WAYS[way]))
    if way == "greedy":
        assert not torch.equal(cached, generate(tiny_model(family), ids))


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_generation_equals_a_loop_over_the_bare_model(setting):
    model, bare, ids = pt_moe("llama", setting), tiny_model("llama"), random_ids(1, 6)
    expected = ids[0]
    for _ in range(NEW):
        logits = reference_logits(bare, adapter_tensors(model), config(setting), expected, readable=6)
        expected = torch.cat([expected, logits[-1:].argmax(-1)])
    assert torch.equal(generate(model, ids)[0], expected[6:])


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_generation_equals_single(family):
    model, ids = pt_moe(family), different_lengths()
    together = generate(model, ids)
    for row, new in zip(ids, together, strict=True):
        assert torch.equal(generate(model, row[row != PAD][None])[0], new)


def step(model: PeftModel, ids: Tensor, cache: DynamicCache, **kwargs) -> Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_keep_their_prompts_while_calls_alternate(family):
    model, ids = pt_moe(family), [random_ids(2, 9, seed=s) for s in range(2)]
    caches = [DynamicCache(config=model.config) for _ in ids]
    found = [[step(model, i[:, :5], c)] for i, c in zip(ids, caches)]
    for start, stop in ((5, 6), (6, 9)):  # one token, and several at a time
        for row, cache, logits in zip(ids, caches, found):
            logits.append(step(model, row[:, start:stop], cache))
    tensors, bare = adapter_tensors(model), tiny_model(family)
    for rows, logits in zip(ids, found, strict=True):
        for row, row_logits in zip(rows, torch.cat(logits, 1), strict=True):
            expected = reference_logits(bare, tensors, config(), row, readable=5)
            torch.testing.assert_close(row_logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_continue_from_a_cache(side):
    """Without position_ids, too: the padding's side must not matter."""
    model, row, new = pt_moe(), random_ids(1, 4, seed=1), random_ids(1, 3, seed=2)
    padding = (2, 0) if side == "left" else (0, 2)
    ids, mask = (torch.nn.functional.pad(x, padding) for x in (row, torch.ones_like(row)))
    cache = DynamicCache(config=model.config)
    step(model, ids, cache, attention_mask=mask)
    mask = torch.cat([mask, torch.ones_like(new)], 1)
    inner = model.get_base_model()
    states = inner.model(input_ids=new, past_key_values=cache, attention_mask=mask).last_hidden_state
    found = inner.lm_head(states)[0]
    expected = reference_logits(tiny_model("llama"), adapter_tensors(model), config(), torch.cat([row, new], 1)[0], 4)
    torch.testing.assert_close(found, expected[4:], rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_cache_continues_like_it():
    model, ids, cache = pt_moe(), random_ids(1, 6), DynamicCache()
    with torch.no_grad():
        step(model, ids[:, :4], cache)
        twin = copy.deepcopy(cache)
        assert torch.equal(step(model, ids[:, 4:], cache), step(model, ids[:, 4:], twin))


def test_generation_continues_from_a_cache_with_the_new_tokens():
    model, ids = pt_moe(setting="pt"), random_ids(1, 6)  # one prompt, whatever is read
    first = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    new = torch.cat([first.sequences[:, -1:], random_ids(1, 2, seed=5)], 1)
    everything = torch.cat([first.sequences, random_ids(1, 2, seed=5)], 1)
    continued = model.generate(
        new,
        attention_mask=torch.ones_like(everything),
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(continued[:, -4:], generate(model, everything)[:, :4])


def test_generation_continues_from_a_cache_with_all_tokens():
    model, ids = pt_moe(setting="pt"), random_ids(1, 12)
    first = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    everything = torch.cat([first.sequences, random_ids(1, 8, seed=5)], 1)
    assert torch.equal(generate(model, everything, past_key_values=first.past_key_values), generate(model, everything))


def test_lookup_and_assisted_generation_equal_greedy():
    model = pt_moe()
    ids = random_ids(1, 4).repeat(1, 3)
    expected = generate(model, ids, max_new_tokens=16)
    assert torch.equal(generate(model, ids, max_new_tokens=16, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generate(model, ids, max_new_tokens=16, assistant_model=tiny_model("llama")), expected)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_cache_without_the_prompt_is_refused():
    model, ids, cache = pt_moe(), random_ids(1, 5), DynamicCache()
    with model.disable_adapter():
        step(model, ids, cache)
    with pytest.raises(ValueError, match="filled with no prompt, but now it is the prompt of adapter 'default'"):
        step(model, ids[:, :1], cache)


def test_a_cache_with_the_prompt_is_refused_without_the_adapter():
    model, ids, cache = pt_moe(), random_ids(1, 5), DynamicCache()
    step(model, ids, cache)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"adapter 'default' \(5 virtual.*it is no prompt"):
        step(model, ids[:, :1], cache)
    model.add_adapter("other", config(num_virtual_tokens=4))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="filled with the prompt of adapter 'default'.*now.*'other'"):
        step(model, ids[:, :1], cache)


def test_a_static_cache_is_refused():
    with pytest.raises(ValueError, match="StaticCache has its length.*cache_implementation"):
        generate(pt_moe(), random_ids(1, 5), cache_implementation="static")


def test_a_prefill_in_chunks_is_refused():
    with pytest.raises(ValueError, match="prefill_chunk_size.*read all of the input"):
        generate(pt_moe(), random_ids(1, 9), prefill_chunk_size=4)


def test_an_assistant_with_a_prompt_of_its_own_is_refused():
    """transformers crops its cache as if only tokens were in it."""
    with pytest.raises(ValueError, match="only the new ones|cuts off the prompt"):
        generate(pt_moe(), random_ids(1, 5), max_new_tokens=16, assistant_model=pt_moe(seed=3))


def test_generation_past_the_models_positions_is_refused():
    model = pt_moe("gpt2", base=tiny_model("gpt2", max_position_embeddings=16))
    assert generate(model, random_ids(1, 5), max_new_tokens=7).shape == (1, 7)
    with pytest.raises(ValueError, match="take 17 positions, but the model has 16"):
        generate(model, random_ids(1, 5), max_new_tokens=8)
    padded = torch.nn.functional.pad(random_ids(1, 5), (6, 0), value=PAD)
    assert generate(model, padded, max_new_tokens=7).shape == (1, 7)  # padding takes none


def test_packed_rows_cannot_be_continued():
    model, ids = pt_moe(), random_ids(1, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="packed rows cannot be continued"):
        step(model, ids, DynamicCache(), position_ids=positions)
