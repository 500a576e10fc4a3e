"""PerftModel through PEFT's public API: saving, several adapters, switching off, generation, refusals."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer
from axolotl_moe_peft.shared.summary import format_table
from tests.tiny_models import FAMILIES, PAD, random_ids, randomise_adapters, tiny_model

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_logits_are_bit_equal(tmp_path, family, variant, dtype):
    model = perft(tiny_model(family).to(dtype), variant).to(dtype)
    ids = random_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family).to(dtype), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


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


def rewrite(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_a_folder_that_lacks_a_tensor_raises_and_names_it(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "layers.1.mlp.perft_up" not in k})
    with pytest.raises(RuntimeError, match=r"adapter tensors missing: base_model.*layers\.1\.mlp\.perft_up"):
        PeftModel.from_pretrained(tiny_model("mixtral"), folder)


def test_a_folder_with_a_foreign_tensor_raises_and_names_it(folder):
    rewrite(folder, lambda t: {**t, "base_model.model.model.layers.0.mlp.perft_extra": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"does not have: base_model.*perft_extra"):
        PeftModel.from_pretrained(tiny_model("mixtral"), folder)


def test_a_folder_of_another_method_raises(folder, tmp_path):
    lora = get_peft_model(tiny_model("mixtral"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    (folder / "adapter_model.safetensors").write_bytes((tmp_path / "lora/adapter_model.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match=r"no tensor of a PERFT adapter(.|\n)*lora_A"):
        PeftModel.from_pretrained(tiny_model("mixtral"), folder)


def test_an_empty_file_raises(folder):
    rewrite(folder, lambda t: {})
    with pytest.raises(RuntimeError, match="no tensor of a PERFT adapter"):
        PeftModel.from_pretrained(tiny_model("mixtral"), folder)


def test_a_truncated_file_raises(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(Exception, match="(?i)incomplete|deserializing|header"):
        PeftModel.from_pretrained(tiny_model("mixtral"), folder)


def test_wrong_shapes_raise_and_name_the_tensor(folder):
    rewrite(folder, lambda t: {k: v[:3].contiguous() if "layers.0.mlp.perft_down" in k else v for k, v in t.items()})
    with pytest.raises(RuntimeError, match=r"size mismatch for .*layers\.0\.mlp\.perft_down"):
        PeftModel.from_pretrained(tiny_model("mixtral"), folder)


def test_a_base_with_more_layers_raises(folder):
    with pytest.raises(RuntimeError, match=r"missing: base_model.*layers\.2\.mlp\.perft_down"):
        PeftModel.from_pretrained(tiny_model("mixtral", num_hidden_layers=3), folder)


def test_a_full_state_dict_loads_as_well():
    model, other = perft(tiny_model("mixtral")), perft(tiny_model("mixtral"), seed=9)
    other.load_state_dict(model.state_dict())
    ids = random_ids(1, 5)
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_low_cpu_mem_usage_loads_the_same(folder):
    ids = random_ids(1, 5)
    usual = PeftModel.from_pretrained(tiny_model("mixtral"), folder)
    low = PeftModel.from_pretrained(tiny_model("mixtral"), folder, low_cpu_mem_usage=True)
    assert torch.equal(low(ids).logits, usual(ids).logits)


# ------------------------------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("variant", VARIANTS)
def test_disabled_adapters_equal_the_base(variant):
    base, ids = tiny_model("olmoe"), random_ids(2, 7)
    expected = base(ids).logits
    model = perft(base, variant)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, adapted)


def test_adapters_of_different_variants_switch_and_delete(tmp_path):
    ids = random_ids(1, 7)
    alone = {}
    for i, variant in enumerate(VARIANTS):
        model = perft(tiny_model("mixtral"), variant, seed=i)
        model.save_pretrained(tmp_path / variant)
        alone[variant] = model(ids).logits
    names = list(VARIANTS)
    model = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(tmp_path / name, adapter_name=name)
    for name in reversed(names):
        model.set_adapter(name)
        assert torch.equal(model(ids).logits, alone[name])
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable and all(n.endswith(f".{name}") for n in trainable)
    model.delete_adapter("embedded")
    assert not any("embedded" in n for n, _ in model.named_parameters())
    model.set_adapter("dense")
    assert torch.equal(model(ids).logits, alone["dense"])
    model.save_pretrained(tmp_path / "again", selected_adapters=["dense"])
    again = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "again/dense")
    assert torch.equal(again(ids).logits, alone["dense"])


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


def test_unload_gives_the_base_back_without_a_hook():
    base, ids = tiny_model("mixtral"), random_ids(1, 7)
    names, expected = [n for n, _ in base.named_parameters()], base(ids).logits
    model = perft(base, "embedded")
    unloaded = model.unload()
    assert [n for n, _ in unloaded.named_parameters()] == names
    assert torch.equal(unloaded(ids).logits, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())
    assert torch.equal(perft(unloaded, "routed", seed=3)(ids).logits, perft(tiny_model("mixtral"), seed=3)(ids).logits)


def test_a_deep_copy_is_independent():
    model = perft(tiny_model("mixtral"), "embedded")
    twin = copy.deepcopy(model)
    randomise_adapters(twin, seed=5)
    ids = random_ids(1, 7)
    assert not torch.allclose(twin(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, perft(tiny_model("mixtral"), "embedded")(ids).logits)


def test_autocast_adapter_dtype_false_takes_the_bases_dtype_and_warns():
    with pytest.warns(UserWarning, match="rates most updates of a router then round away"):
        model = get_peft_model(tiny_model("mixtral").bfloat16(), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_injection_without_a_peft_model_has_its_router_losses():
    model = inject_adapter_in_model(config(router_aux_loss_coef=1.0), tiny_model("mixtral")).train()
    ids = random_ids(1, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    routers = [p.grad for n, p in model.named_parameters() if "perft_router" in n]
    assert all(g.abs().sum() > 0 for g in routers)  # up-projections are 0: only the router losses reach them


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(method):
    with pytest.raises(ValueError, match="cannot be merged: they run in parallel with the MoE block"):
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


# --------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached(family, variant):
    model = perft(tiny_model(family), variant)
    ids = random_ids(2, 6)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    cached = model.generate(input_ids=ids, use_cache=True, **kwargs)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **kwargs))


def test_batched_generation_equals_single():
    model = perft(tiny_model("mixtral"))
    short, long = random_ids(1, 4, seed=2), random_ids(1, 9, seed=3)
    ids = torch.cat([torch.nn.functional.pad(short, (5, 0), value=PAD), long])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(input_ids=ids, attention_mask=mask, **kwargs)
    for row, prompt in ((0, short), (1, long)):
        alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **kwargs)
        assert torch.equal(together[row, -8:], alone[0, -8:])


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_equals_right_padded_equals_single(family):
    model, row = perft(tiny_model(family)), random_ids(1, 6)
    single = model(row).logits[0]
    for pad in ((3, 0), (0, 3)):
        ids = torch.nn.functional.pad(row, pad, value=PAD)
        mask = torch.nn.functional.pad(torch.ones_like(row), pad)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, pad[0] : pad[0] + 6]
        torch.testing.assert_close(logits, single, rtol=1e-4, atol=1e-5)
