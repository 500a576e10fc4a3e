"""What the tuners of all methods share."""

import peft
import pytest
import torch

from tests.shared.methods import METHODS, config_of
from tests.tiny_models import random_ids, tiny_model


@pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")
@pytest.mark.parametrize("method", METHODS)
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
