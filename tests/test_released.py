"""A saved adapter of a released version loads for ever after, and computes what it did then."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import MixtralForCausalLM

from tests.tiny_models import random_ids

RELEASED = Path(__file__).parent / "released"
# each has a folder of every adapter, and what each adapter and the base computed: the last two positions' logits
VERSIONS = sorted(folder.name for folder in RELEASED.iterdir() if folder.name != "base")
ADAPTERS = [(version, f.name) for version in VERSIONS for f in sorted((RELEASED / version).iterdir()) if f.is_dir()]
IDS = random_ids(3, 11)


def base() -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(RELEASED / "base").eval()


@torch.no_grad()
def last_logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits[:, -2:]


@pytest.mark.parametrize(("version", "adapter"), ADAPTERS)
def test_tensors_load_bit_equal_and_compute_the_same(version: str, adapter: str) -> None:
    folder = RELEASED / version / adapter
    expected = load_file(RELEASED / version / "logits.safetensors")
    model = PeftModel.from_pretrained(base(), folder)
    saved = load_file(folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype, name
    # another CPU adds in another order
    torch.testing.assert_close(last_logits(base()), expected["base"], atol=1e-5, rtol=0)
    torch.testing.assert_close(last_logits(model), expected[adapter], atol=1e-5, rtol=0)
    assert (expected[adapter] - expected["base"]).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(last_logits(model), last_logits(base()))


@pytest.mark.parametrize(("version", "adapter"), ADAPTERS)
def test_it_is_saved_as_it_was(version: str, adapter: str, tmp_path: Path) -> None:
    folder = RELEASED / version / adapter
    PeftModel.from_pretrained(base(), folder).save_pretrained(tmp_path)
    saved = load_file(folder / "adapter_model.safetensors")
    again = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items())
