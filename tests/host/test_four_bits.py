"""A base in 4 bits on a CPU: what an evaluation leaves of the gradients that come through it."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig
from tests.tiny_models import random_ids, tiny_model

CONFIGS = {
    "perft": lambda: PerftConfig(rank=4, init="paper", task_type="CAUSAL_LM"),
    "tt_lora": lambda: TTLoraConfig(rank=2, init="normalized", target_modules=["v_proj"], task_type="CAUSAL_LM"),
    "pt_moe": lambda: PTMoeConfig(num_virtual_tokens=4, rank=3, router_noise_std=0.0, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module", params=[32, 64])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers as wide as one of bitsandbytes' blocks, which it packs, and narrower ones, on which it fails."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("mixtral", hidden_size=request.param).save_pretrained(folder)
    return folder


def in_4_bits(folder: Path) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    ids = random_ids(2, 9)
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    labels = torch.cat([torch.full((2, 3), -100), ids[:, 3:]], 1)
    model(input_ids=ids, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", CONFIGS)
def test_an_evaluation_changes_no_gradient_after_it(adapter: str, folder: Path) -> None:
    model = get_peft_model(in_4_bits(folder), CONFIGS[adapter]())
    before = gradients(model)
    with torch.no_grad():
        model.eval()(input_ids=random_ids(2, 9))
    after = gradients(model)
    assert before and all(torch.equal(after[name], gradient) for name, gradient in before.items())


def test_neither_does_one_before_the_adapter_came(folder: Path) -> None:
    base = in_4_bits(folder)
    before = gradients(get_peft_model(in_4_bits(folder), CONFIGS["tt_lora"]()))
    if base.config.hidden_size == 64:
        with torch.no_grad():
            base.eval()(random_ids(2, 9))
        packed = base.model.layers[0].self_attn.q_proj.weight.quant_state
        assert getattr(packed, "packing_format_for_cpu", False) == bool(has_avx512bf16())
    torch.manual_seed(0)
    after = gradients(get_peft_model(base, CONFIGS["tt_lora"]()))
    for name, gradient in before.items():  # packing rounds the scales of blocks to bf16
        torch.testing.assert_close(after[name], gradient, rtol=0.05, atol=0.02 * gradient.abs().max().item())
