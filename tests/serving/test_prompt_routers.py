"""What stands before an engine decides as the model does that it was trained in; experts of a pool as plain LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from axolotl_moe_peft import PTMoeConfig
from axolotl_moe_peft.serving.prompt_routers import ExpertRouter, PromptMixer, input_embeddings
from axolotl_moe_peft.tt_lora_moe.export import export_experts
from tests.serving.served_models import prompts, save_adapter
from tests.tiny_models import tiny_model
from tests.tt_lora_moe.pools import expert_model, pool_of, save_experts

pytestmark = pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")


def save_base(folder: Path, family: str) -> torch.nn.Module:
    tiny_model(family).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_pool(folder: Path, router: str) -> PeftModel:
    model = pool_of(save_experts(folder), base=save_base(folder / "base", "llama"), router=router)
    model.save_pretrained(folder / "pool")
    return model


@pytest.mark.parametrize("router", ["base_hidden", "embedding_linear", "embedding_mlp"])
def test_a_pool_chooses_alone_as_in_its_model(router: str, tmp_path: Path) -> None:
    model = save_pool(tmp_path, router)
    alone = ExpertRouter(str(tmp_path / "pool"), str(tmp_path / "base"), torch.float32)
    expected = []
    for prompt in prompts():
        model(input_ids=torch.tensor([prompt]))
        expected.append(alone.expert_names[model.chosen_experts["default"].item()])
    assert [alone.choose(prompt) for prompt in prompts()] == expected
    assert len(set(expected)) > 1


def test_an_expert_as_a_lora_computes_the_same(tmp_path: Path) -> None:
    """One that adapts other layers than the others among them."""
    entries = save_experts(tmp_path, names=["gsm8k", "boolq"]) + save_experts(
        tmp_path, names=["rte"], target_modules=["k_proj"], factors="auto"
    )
    pool_of(entries, base=save_base(tmp_path / "base", "llama")).save_pretrained(tmp_path / "pool")
    folders = export_experts(tmp_path / "pool", tmp_path / "loras")
    ids = torch.tensor([prompts()[1]])
    for name, folder in folders.items():
        lora = PeftModel.from_pretrained(save_base(tmp_path / "base", "llama"), str(folder)).eval()
        expected = expert_model({"path": str(tmp_path / name)})(input_ids=ids).logits
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("num_experts", "rank"), [(3, 4), (2, None), (1, 3)])
def test_a_prompt_is_mixed_alone_as_in_its_model(
    family: str, num_experts: int, rank: int | None, tmp_path: Path
) -> None:
    config = PTMoeConfig(num_virtual_tokens=5, num_experts=num_experts, rank=rank, task_type="CAUSAL_LM")
    model = save_adapter(save_base(tmp_path / "base", family), config, tmp_path / "pt")
    alone = PromptMixer(str(tmp_path / "pt"), str(tmp_path / "base"), torch.float32)
    decoder = model.get_base_model().get_decoder() if family == "llama" else model.get_base_model().transformer
    seen = []
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for prompt in prompts(8):
        model(input_ids=torch.tensor([prompt]))
        assert torch.equal(alone.mix(prompt), seen.pop()[0, :5])


def test_a_base_without_its_embeddings_in_safetensors_is_named(tmp_path: Path) -> None:
    save_base(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.embed_tokens.weight"):
        input_embeddings(str(tmp_path), None, torch.float32)
