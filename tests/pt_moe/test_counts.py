"""Parameters of the paper's four methods on Llama-3.2-1B, on the meta device."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_moe_peft import PTMoeConfig
from axolotl_moe_peft.shared.summary import format_table

# meta-llama/Llama-3.2-1B
LLAMA = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
# num_virtual_tokens, num_experts, rank, then the table's figure and its parts: experts, shared, router
FIGURES = {
    "pt": (40, 1, None, 81_920, (40 * 2048, 0, 0)),
    "dpt": (40, 1, 39, 81_432, (40 * 39, 39 * 2048, 0)),
    "smop": (20, 2, None, 86_018, (2 * 20 * 2048, 0, 2 * 2048 + 2)),
    "pt_moe": (40, 2, 36, 80_706, (2 * 40 * 36, 36 * 2048, 2 * 2048 + 2)),
}


@pytest.mark.parametrize("method", FIGURES)
def test_the_model_has_the_papers_number_of_parameters(method):
    num_virtual_tokens, num_experts, rank, total, parts = FIGURES[method]
    with torch.device("meta"):
        base = LlamaForCausalLM(LLAMA)
    prompts = {"num_virtual_tokens": num_virtual_tokens, "num_experts": num_experts, "rank": rank}
    config = PTMoeConfig(**prompts, center_router_input=False, task_type="CAUSAL_LM")
    before = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, config)
    assert before == 1_235_814_400
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total
    assert sum(p.numel() for p in model.parameters()) == before + total
    rows = {row.part: row for row in model.base_model.parameter_rows()}
    assert tuple(rows[part].parameters for part in ("experts", "shared", "router")) == parts
    assert rows["experts"].activated == parts[0] // num_experts
    assert rows["other"].parameters == 0
    assert f"{total:,}" in format_table(list(rows.values())).splitlines()[-1]


def test_the_defaults_are_those_of_the_last_row():
    config = PTMoeConfig()
    assert (config.num_virtual_tokens, config.num_experts, config.rank) == FIGURES["pt_moe"][:3]


def test_two_of_three_experts_are_activated_with_top_2():
    with torch.device("meta"):
        base = LlamaForCausalLM(LLAMA)
    model = get_peft_model(base, PTMoeConfig(num_experts=3, top_k=2, task_type="CAUSAL_LM"))
    assert model.base_model.parameter_rows()[0].activated == 2 * 40 * 36
    model.get_base_model().lm_head.weight.requires_grad = True
    assert model.base_model.parameter_rows()[3].tensors == 1
