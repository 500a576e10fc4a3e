"""What the tuners of all methods share."""

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig, TTLoraMoeConfig
from tests.tiny_models import random_ids, tiny_model
from tests.tt_lora_moe.pools import save_experts


def config_of(method: str, folder: Path) -> PeftConfig:
    if method == "tt_lora_moe":
        return TTLoraMoeConfig(experts=save_experts(folder, "mixtral"), task_type="CAUSAL_LM")
    configs = {
        "perft": PerftConfig(rank=4, init="paper", task_type="CAUSAL_LM"),
        "tt_lora": TTLoraConfig(alpha=500, task_type="CAUSAL_LM"),
        "pt_moe": PTMoeConfig(num_virtual_tokens=6, rank=4, task_type="CAUSAL_LM"),
    }
    return configs[method]


@pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")
@pytest.mark.parametrize("method", ["perft", "tt_lora", "tt_lora_moe", "pt_moe"])
def test_loading_with_low_cpu_mem_usage_keeps_float32_beside_a_bf16_base(method, tmp_path):
    def base() -> torch.nn.Module:
        return tiny_model("mixtral").to(torch.bfloat16)

    model = peft.get_peft_model(base(), config_of(method, tmp_path / "experts")).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter", low_cpu_mem_usage=True)
    own = [p for name, p in loaded.named_parameters() if model.base_model.prefix in name]
    assert own and all(p.dtype == torch.float32 for p in own)
    with torch.no_grad():
        assert torch.equal(model(input_ids=random_ids(2, 6)).logits, loaded(input_ids=random_ids(2, 6)).logits)
