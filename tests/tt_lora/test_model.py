"""TTLoraModel through PEFT's public API, beside what all adapters do (tests/test_adapters.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.shared.summary import format_table
from axolotl_moe_peft.tt_lora import TTLoraLinear
from tests.tiny_models import random_ids, tiny_model

TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],  # Conv1D with bias
    "mixtral": ["q_proj", "v_proj"],
}
FAMILIES = tuple(TARGETS)
CHECKPOINTING = {"off": None, "reentrant": {"use_reentrant": True}, "non_reentrant": {"use_reentrant": False}}


def config(family: str = "llama", **kwargs) -> TTLoraConfig:
    return TTLoraConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS[family], **kwargs})


def tt_lora(family: str = "llama", seed: int = 1, dtype: torch.dtype = torch.float32, **kwargs) -> PeftModel:
    base = tiny_model(family).to(dtype)
    torch.manual_seed(seed)
    return get_peft_model(base, config(family, **kwargs)).eval()


def layers_of(model: torch.nn.Module) -> list[TTLoraLinear]:
    return [m for m in model.modules() if isinstance(m, TTLoraLinear)]


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tt_lora().save_pretrained(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------- saving and loading


def test_keys_and_shapes_are_the_documented_ones(tmp_path):
    factors = {"q_proj": {"in": [8, 4], "out": [4, 4, 2]}, "v_proj": {"in": [32], "out": [16]}}
    tt_lora(rank=3, factors=factors).save_pretrained(tmp_path)
    expected = {}
    for i in range(2):
        attention = f"base_model.model.model.layers.{i}.self_attn"
        expected[f"{attention}.q_proj.ttcore_in_0"] = (1, 8, 3)
        expected[f"{attention}.q_proj.ttcore_in_1"] = (3, 4, 3)
        expected[f"{attention}.q_proj.ttcore_out_0"] = (3, 2, 3)
        expected[f"{attention}.q_proj.ttcore_out_1"] = (3, 4, 3)
        expected[f"{attention}.q_proj.ttcore_out_2"] = (3, 4, 1)
        expected[f"{attention}.v_proj.ttcore_in_0"] = (1, 32, 3)
        expected[f"{attention}.v_proj.ttcore_out_0"] = (3, 16, 1)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == expected
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["rank"], saved["factors"]) == ("TT_LORA", 3, factors)
    # what FSDP2 saving and Axolotl's default merge would take for a LoRA
    assert "r" not in saved and not any("lora_" in name for name, _ in tt_lora().named_parameters())


def test_all_linear_is_saved_as_it_was_given(tmp_path):
    model, ids = tt_lora(target_modules="all-linear"), random_ids(1, 5)
    assert {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")} == {"TTLoraLinear"}
    assert "lm_head" not in str(model.base_model.targeted_module_names)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "all-linear"
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.load_adapter(tmp_path, adapter_name="second")  # all linear layers are adapted by now
    assert len(layers_of(loaded)) == 14 and all("second" in layer.tt_config for layer in layers_of(loaded))


def test_another_rank_raises_and_names_the_tensor(folder):
    with pytest.raises(RuntimeError, match=r"size mismatch for .*q_proj\.ttcore_in_0"):
        PeftModel.from_pretrained(tiny_model("llama"), folder, config=config(rank=4))


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_init_equals_the_base_exactly(family):
    ids = random_ids(2, 7)
    assert torch.equal(tt_lora(family, init="zero")(ids).logits, tiny_model(family)(ids).logits)


# ------------------------------------------------------------------------------------------------------------ training


def gradients(family: str, checkpointing: str) -> dict[str, Tensor]:
    model, ids = tt_lora(family), random_ids(2, 9)
    model.enable_input_require_grads()
    if CHECKPOINTING[checkpointing]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in trainable(model).items()}


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, checkpointing):
    expected, found = gradients(family, "off"), gradients(family, checkpointing)
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)  # the same operations again


def test_the_table_has_the_cores_and_whatever_else_is_trainable():
    model = tt_lora()
    rows = {r.part: r for r in model.base_model.parameter_rows()}
    count = sum(p.numel() for p in trainable(model).values())
    assert (rows["cores"].parameters, rows["cores"].activated, rows["cores"].dtype) == (count, count, "float32")
    assert rows["cores"].tensors == len(trainable(model))
    assert (rows["other"].tensors, rows["other"].parameters) == (0, 0)
    assert f"{count:,}" in format_table(list(rows.values())).splitlines()[-1]
    model.get_base_model().lm_head.weight.requires_grad = True
    assert model.base_model.parameter_rows()[1].tensors == 1
