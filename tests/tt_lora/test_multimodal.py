"""TT-LoRA on models of text and images: the text part learns from rows with images, other parts if they are named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.tt_lora import TTLoraLinear
from tests.multimodal_models import MULTIMODAL, image_batch, tiny_multimodal_model
from tests.tt_lora.test_targets import saved_by_version_0_1

TARGETS = {"all-linear": "all-linear", "default": ["q_proj", "v_proj"]}
every_family = pytest.mark.parametrize("family", sorted(MULTIMODAL))


def adapted(family: str, targets: str | list[str], **kwargs) -> PeftModel:
    config = TTLoraConfig(rank=2, alpha=50, target_modules=targets, task_type="CAUSAL_LM", **kwargs)
    return get_peft_model(tiny_multimodal_model(family), config)


def layers(model: PeftModel) -> dict[str, TTLoraLinear]:
    found = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, TTLoraLinear)}
    assert found
    return found


@every_family
@pytest.mark.parametrize("targets", TARGETS)
def test_the_text_part_learns_from_rows_with_images(family, targets):
    if family == "dots3_note" and targets == "default":
        targets = "all-linear"  # its layers have other names
    model, batch = adapted(family, TARGETS[targets]), image_batch(family)
    assert all("language_model." in name for name in layers(model))
    merged = tiny_multimodal_model(family)
    with torch.no_grad():
        for name, layer in layers(model).items():
            merged.get_submodule(name).weight += layer.get_delta_weight("default")
        logits = merged(**batch).logits
    loss = model.train()(**batch).loss
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    loss.backward()
    for name, layer in layers(model).items():
        assert all(core.grad.any() for side in layer.cores("default") for core in side), name


@every_family
def test_padding_is_no_token_of_a_row_with_an_image(family):
    model = adapted(family, "all-linear").eval()
    batch = image_batch(family)
    longer = {
        name: F.pad(tensor, (0, 4), value=-100 if name == "labels" else 0) if tensor.shape[:2] == (2, 12) else tensor
        for name, tensor in batch.items()
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**longer).loss, model(**batch).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", [["qkv"], r".*visual\..*\.attn\.qkv"])
def test_another_part_is_adapted_where_it_is_named(target):
    model = adapted("qwen3_vl_moe", target)
    assert set(layers(model)) == {f"model.visual.blocks.{i}.attn.qkv" for i in range(2)}
    model.train()(**image_batch("qwen3_vl_moe")).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("target", ["all-linear", ["qkv", "q_proj"]])
def test_an_adapter_of_version_0_1_keeps_its_parts_elsewhere(target, tmp_path):
    merged, batch = tiny_multimodal_model("qwen3_vl_moe"), image_batch("qwen3_vl_moe")
    deltas = saved_by_version_0_1(tiny_multimodal_model("qwen3_vl_moe"), tmp_path / "old", target)
    assert any("visual" in name for name in deltas)
    for name, delta in deltas.items():
        merged.get_submodule(name).weight += delta
    model = PeftModel.from_pretrained(tiny_multimodal_model("qwen3_vl_moe"), tmp_path / "old").eval()
    torch.testing.assert_close(model(**batch).logits, merged(**batch).logits, rtol=1e-2, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    old, again = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("old", "again"))
    assert again.keys() == old.keys() and all(torch.equal(again[key], old[key]) for key in old)
