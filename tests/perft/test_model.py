"""PerftModel through PEFT's public API, beside what all adapters do (tests/test_adapters.py)."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer
from axolotl_moe_peft.shared.summary import format_table
from tests.tiny_models import random_ids, randomise_adapters, tiny_model

VARIANTS = {
    "routed": {"num_experts": 5, "num_experts_per_tok": 2},
    "embedded": {},
    "dense": {"num_experts": 3},
    "single": {},
}


def config(variant: str = "routed", **kwargs) -> PerftConfig:
    return PerftConfig(variant=variant, task_type="CAUSAL_LM", **{"rank": 4, **VARIANTS[variant], **kwargs})


def perft(base, variant: str = "routed", seed: int = 1, **kwargs) -> PeftModel:
    model = get_peft_model(base, config(variant, **kwargs)).eval()
    randomise_adapters(model, seed)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    perft(tiny_model("mixtral")).save_pretrained(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_and_shapes_are_the_documented_ones(tmp_path, variant):
    perft(tiny_model("mixtral"), variant).save_pretrained(tmp_path)
    num_experts = {"routed": 5, "embedded": 4, "dense": 3, "single": 1}[variant]
    expected = {}
    for i in range(2):
        block = f"base_model.model.model.layers.{i}.mlp"
        expected[f"{block}.perft_down"] = (num_experts, 4, 32)
        expected[f"{block}.perft_up"] = (num_experts, 32, 4)
        if variant == "routed":
            expected[f"{block}.perft_router"] = (num_experts, 32)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == expected
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PERFT"


def test_a_base_with_more_layers_raises(folder):
    with pytest.raises(RuntimeError, match=r"missing: base_model.*layers\.2\.mlp\.perft_down"):
        PeftModel.from_pretrained(tiny_model("mixtral", num_hidden_layers=3), folder)


# ------------------------------------------------------------------------------------------------- several adapters


def test_two_active_adapters_add_up():
    model = perft(tiny_model("mixtral"), "single")
    model.add_adapter("other", config("dense"))
    randomise_adapters(model)
    layer = next(m for m in model.modules() if isinstance(m, PerftLayer))
    hidden = torch.randn(1, 3, 32)
    out = {}
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        out[str(active)] = layer(hidden)
    layer.enable_adapters(False)
    base = layer(hidden)
    torch.testing.assert_close(out["['default', 'other']"], out["default"] + out["other"] - base)


def test_injection_without_a_peft_model_has_its_router_losses():
    model = inject_adapter_in_model(config(router_aux_loss_coef=1.0), tiny_model("mixtral")).train()
    ids = random_ids(1, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    routers = [p.grad for n, p in model.named_parameters() if "perft_router" in n]
    assert all(g.abs().sum() > 0 for g in routers)  # up-projections are 0: only the router losses reach them


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(method):
    with pytest.raises(ValueError, match="cannot be merged: it runs in parallel with the MoE block or MLP"):
        getattr(perft(tiny_model("mixtral")), method)()


# ---------------------------------------------------------------------------------------------------- what is adapted


def test_layers_to_transform_leaves_the_others_alone():
    model = perft(tiny_model("olmoe"), layers_to_transform=[1])
    assert model.base_model.targeted_module_names == ["model.layers.1.mlp"]
    assert [n for n, m in model.named_modules() if isinstance(m, PerftLayer)] == [
        "base_model.model.model.layers.1.mlp"
    ]


def test_dense_layers_of_a_mixed_model_are_left_alone():
    model = perft(tiny_model("qwen3_moe", mlp_only_layers=[0]))
    assert model.base_model.targeted_module_names == ["model.layers.1.mlp"]


def test_only_the_adapter_is_trainable_and_the_table_says_so():
    model = perft(tiny_model("mixtral"))
    rows = {r.part: r for r in model.base_model.parameter_rows()}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert rows["experts"].parameters + rows["router"].parameters == trainable == 2 * (2 * 5 * 4 * 32 + 5 * 32)
    assert rows["experts"].activated == 2 * 2 * 2 * 4 * 32
    assert (rows["other"].tensors, rows["other"].parameters) == (0, 0)
    assert f"{trainable:,}" in format_table(list(rows.values())).splitlines()[-1]
    next(model.get_base_model().lm_head.parameters()).requires_grad = True
    assert model.base_model.parameter_rows()[2].tensors == 1
