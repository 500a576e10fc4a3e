"""TTLoraModel through PEFT's public API: saving, several adapters, training, generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.shared.summary import format_table
from axolotl_moe_peft.tt_lora import TTLoraLinear
from tests.tiny_models import PAD, random_ids, tiny_model

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_logits_are_bit_equal(tmp_path, family, dtype):
    model, ids = tt_lora(family, dtype=dtype), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(tiny_model(family).to(dtype), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(model(ids).logits, tiny_model(family).to(dtype)(ids).logits)
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


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


def rewrite(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_a_folder_that_lacks_a_core_raises_and_names_it(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.v_proj.ttcore_out_0" not in k})
    with pytest.raises(RuntimeError, match=r"adapter tensors missing: base_model.*layers\.1.*v_proj\.ttcore_out_0"):
        PeftModel.from_pretrained(tiny_model("llama"), folder)


def test_a_folder_with_a_foreign_tensor_raises_and_names_it(folder):
    rewrite(folder, lambda t: {**t, "base_model.model.model.layers.0.self_attn.q_proj.ttcore_in_9": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"does not have: base_model.*ttcore_in_9"):
        PeftModel.from_pretrained(tiny_model("llama"), folder)


def test_a_folder_of_another_method_raises(folder, tmp_path):
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    (folder / "adapter_model.safetensors").write_bytes((tmp_path / "lora/adapter_model.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match=r"no tensor of a TT_LORA adapter(.|\n)*lora_A"):
        PeftModel.from_pretrained(tiny_model("llama"), folder)


def test_a_truncated_file_raises(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(Exception, match="(?i)incomplete|deserializing|header"):
        PeftModel.from_pretrained(tiny_model("llama"), folder)


def test_another_rank_raises_and_names_the_tensor(folder):
    with pytest.raises(RuntimeError, match=r"size mismatch for .*q_proj\.ttcore_in_0"):
        PeftModel.from_pretrained(tiny_model("llama"), folder, config=config(rank=4))


def test_low_cpu_mem_usage_loads_the_same(folder):
    ids = random_ids(1, 5)
    low = PeftModel.from_pretrained(tiny_model("llama"), folder, low_cpu_mem_usage=True)
    assert torch.equal(low(ids).logits, tt_lora()(ids).logits)


# ---------------------------------------------------------------------------------- several adapters, switching off


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_init_equals_the_base_exactly(family):
    ids = random_ids(2, 7)
    assert torch.equal(tt_lora(family, init="zero")(ids).logits, tiny_model(family)(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_adapters_equal_the_base(family):
    model, ids = tt_lora(family), random_ids(2, 7)
    adapted, expected = model(ids).logits, tiny_model(family)(ids).logits
    assert not torch.allclose(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, adapted)


VARIANTS = {
    "short": {"factors": {"q_proj": {"in": [32], "out": [32]}}, "rank": 2},
    "long": {"num_cores": 10, "alpha": 200},
    "other": {"target_modules": ["o_proj"], "rank": 7},
}


def test_adapters_of_different_shapes_switch_and_delete(tmp_path):
    ids, alone = random_ids(1, 7), {}
    for seed, (name, settings) in enumerate(VARIANTS.items()):
        model = tt_lora(seed=seed, **settings)
        model.save_pretrained(tmp_path / name)
        alone[name] = model(ids).logits
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "short", adapter_name="short")
    for name in ("long", "other"):
        model.load_adapter(tmp_path / name, adapter_name=name)
    for name in reversed(VARIANTS):
        model.set_adapter(name)
        assert torch.equal(model(ids).logits, alone[name])
        assert trainable(model) and all(n.endswith(f".{name}") for n in trainable(model))
    model.delete_adapter("short")
    assert not any(n.endswith(".short") for n, _ in model.named_parameters())
    model.set_adapter("long")
    assert torch.equal(model(ids).logits, alone["long"])
    model.save_pretrained(tmp_path / "again", selected_adapters=["long"])
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "again/long")
    assert torch.equal(again(ids).logits, alone["long"])


def test_unload_gives_the_base_back():
    model, base, ids = tt_lora("gpt2"), tiny_model("gpt2"), random_ids(1, 7)
    unloaded = model.unload()
    assert [n for n, _ in unloaded.named_parameters()] == [n for n, _ in base.named_parameters()]
    assert torch.equal(unloaded(ids).logits, base(ids).logits)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_every_core_and_nothing_else(family):
    model, ids = tt_lora(family).train(), random_ids(2, 9)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("ttcore_" not in name), name
    assert all("ttcore_" in name for name in trainable(model))


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


# ---------------------------------------------------------------------------------------------- batches and generation


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached(family):
    model, ids = tt_lora(family), random_ids(2, 6)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    cached = model.generate(input_ids=ids, use_cache=True, **kwargs)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **kwargs))


def test_batched_generation_equals_single():
    model = tt_lora()
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
    model, row = tt_lora(family), random_ids(1, 6)
    single = model(row).logits[0]
    for pad in ((3, 0), (0, 3)):
        ids = torch.nn.functional.pad(row, pad, value=PAD)
        mask = torch.nn.functional.pad(torch.ones_like(row), pad)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, pad[0] : pad[0] + 6]
        torch.testing.assert_close(logits, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_packed_equals_unpacked(family):
    model, rows = tt_lora(family), [random_ids(1, 5, seed=1), random_ids(1, 8, seed=2)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = model(input_ids=torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    expected = torch.cat([model(input_ids=row).logits for row in rows], 1)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
