"""Parameters of TT-LoRA on the real models, on the meta device: the authors' shapes and the automatic ones."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, RobertaConfig, RobertaModel

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.shared.summary import format_table

# meta-llama/Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B, Llama-3.1-70B: width, heads, layers, inner width
LLAMAS = {
    "1b": (2048, 32, 16, 8192),
    "3b": (3072, 24, 28, 8192),
    "8b": (4096, 32, 32, 14336),
    "70b": (8192, 64, 80, 28672),
}
HEAD_DIM = {"1b": 64, "3b": 128, "8b": 128, "70b": 128}
# The authors' factors of q_proj (both sides) and v_proj (inputs, outputs); all of rank 5.
AUTHORS = {
    "1b": ([16, 8, 4, 4], [16, 16, 4, 2], [16, 16, 2]),
    "3b": ([16, 4, 4, 3, 2, 2], [16, 4, 4, 3, 2, 2], [16, 4, 4, 2, 2]),
    "8b": ([16, 4, 4, 4, 2, 2], [16, 4, 4, 4, 2, 2], [16, 4, 4, 2, 2]),
    "70b": ([16, 4, 4, 4, 2, 2, 2], [16, 4, 4, 4, 2, 2, 2], [16, 4, 4, 2, 2]),
}
TRAINABLE = {"1b": 33_920, "3b": 48_860, "8b": 58_240, "70b": 157_600}
LORA_16 = {"1b": 1_703_936, "3b": 4_587_520, "8b": 6_815_744, "70b": 32_768_000}
# By default, with at most 8 cores: layers times q_proj and v_proj, each r (ends) + r^2 (all others).
AUTO = {
    "1b": 16 * ((5 * 64 + 25 * 24) + (5 * 48 + 25 * 22)),
    "3b": 28 * ((5 * 64 + 25 * 28) + (5 * 48 + 25 * 26)),
    "8b": 32 * ((5 * 64 + 25 * 32) + (5 * 48 + 25 * 28)),
    "70b": 80 * ((5 * 64 + 25 * 40) + (5 * 64 + 25 * 28)),
}


@cache
def llama(size: str) -> PreTrainedModel:
    width, heads, layers, inner = LLAMAS[size]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=HEAD_DIM[size],
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@cache
def roberta() -> PreTrainedModel:
    with torch.device("meta"):
        return RobertaModel(RobertaConfig())  # its defaults have roberta-base's width and layers


def trainable(base: PreTrainedModel, config: PeftConfig) -> int:
    """Trainable parameters of the base with the adapter, which comes off again."""
    model = get_peft_model(base, config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if isinstance(config, TTLoraConfig):
        rows = {row.part: row for row in model.base_model.parameter_rows()}
        assert (rows["cores"].parameters, rows["cores"].activated, rows["other"].parameters) == (count, count, 0)
        assert f"{count:,}" in format_table(list(rows.values()))
    assert model.unload() is base
    return count


@pytest.mark.parametrize("size", LLAMAS)
def test_the_authors_shapes_have_the_published_number_of_parameters(size):
    q, v_in, v_out = AUTHORS[size]
    factors = {"q_proj": {"in": q, "out": q}, "v_proj": {"in": v_in, "out": v_out}}
    assert trainable(llama(size), TTLoraConfig(factors=factors)) == TRAINABLE[size]


@pytest.mark.parametrize("size", LLAMAS)
def test_a_lora_of_rank_16_has_some_fifty_to_two_hundred_times_as_many(size):
    lora = trainable(llama(size), LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    assert lora == LORA_16[size]
    assert 50 < lora / TRAINABLE[size] < 210


def test_roberta_with_the_authors_shapes():
    entry = {"in": [64, 4, 3], "out": [64, 4, 3]}
    config = TTLoraConfig(target_modules=["query", "value"], factors={"query": entry, "value": entry})
    assert trainable(roberta(), config) == 23_760
    assert trainable(roberta(), TTLoraConfig(target_modules=["query", "value"], num_cores=6)) == 19_680


@pytest.mark.parametrize("size", LLAMAS)
def test_auto_needs_no_more_at_the_authors_core_counts(size):
    q, v_in, v_out = AUTHORS[size]
    count = sum(
        trainable(llama(size), TTLoraConfig(target_modules=[target], num_cores=cores))
        for target, cores in (("q_proj", 2 * len(q)), ("v_proj", len(v_in) + len(v_out)))
    )
    assert count <= TRAINABLE[size]


@pytest.mark.parametrize("size", LLAMAS)
def test_the_default_stays_below_four_percent_of_a_lora(size):
    count = trainable(llama(size), TTLoraConfig())
    assert count == AUTO[size]
    assert count < 0.04 * LORA_16[size]


def test_the_closed_form_of_all_linear_layers():
    """Rank r and two cores a matrix: r (inputs + outputs), as many as a LoRA of that rank."""
    count = trainable(llama("1b"), TTLoraConfig(target_modules="all-linear", num_cores=2, rank=4))
    assert count == trainable(llama("1b"), LoraConfig(r=4, target_modules="all-linear"))
