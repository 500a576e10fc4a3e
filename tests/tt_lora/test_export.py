"""A TT-LoRA is a low-rank update: it merges into the base, and exports to a plain LoRA that stock PEFT loads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.tt_lora import TTLoraLinear
from axolotl_moe_peft.tt_lora.export import export_to_lora
from axolotl_moe_peft_commands import export_tt_lora
from tests.tiny_models import random_ids, tiny_model

TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],  # Conv1D with bias
    "mixtral": ["q_proj", "v_proj"],
}
FAMILIES = tuple(TARGETS)


def config(family: str = "llama", **kwargs) -> TTLoraConfig:
    return TTLoraConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS[family], **kwargs})


def tt_lora(family: str = "llama", seed: int = 1, dtype: torch.dtype = torch.float32, **kwargs) -> PeftModel:
    base = tiny_model(family).to(dtype)
    torch.manual_seed(seed)
    return get_peft_model(base, config(family, **kwargs)).eval()


def layers_of(model: nn.Module) -> list[TTLoraLinear]:
    return [m for m in model.modules() if isinstance(m, TTLoraLinear)]


# ------------------------------------------------------------------------------------------------------------- merging

# float32 logits of order 1 after two layers; merged, the update is added to the weight before the product
MERGED = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_the_logits_and_leaves_a_plain_model(family, safe_merge):
    model, ids = tt_lora(family), random_ids(2, 7)
    expected = model(ids).logits
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is type(tiny_model(family)) and not layers_of(merged)
    torch.testing.assert_close(merged(ids).logits, expected, **MERGED)
    assert not torch.allclose(expected, tiny_model(family)(ids).logits, **MERGED)


@pytest.mark.parametrize("family", FAMILIES)
def test_unmerging_restores_the_base_but_for_rounding(family):
    model, base, ids = tt_lora(family), tiny_model(family), random_ids(2, 7)
    adapted = model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, adapted, **MERGED)
    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers_of(model))
    restored = {name.replace(".base_layer", ""): w for name, w in model.get_base_model().state_dict().items()}
    for name, weight in base.state_dict().items():  # one rounding each way, of weights and updates below 1
        torch.testing.assert_close(restored[name], weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(ids).logits, adapted, **MERGED)


def test_two_adapters_merge_to_their_sum_and_disabling_unmerges():
    model, ids = tt_lora(), random_ids(1, 7)
    model.add_adapter("second", config(rank=3, target_modules=["q_proj", "o_proj"]))
    model.base_model.set_adapter(["default", "second"])
    both = model(ids).logits
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(adapter_names=["default", "second"])
    torch.testing.assert_close(model(ids).logits, both, **MERGED)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, tiny_model("llama")(ids).logits, **MERGED)
    torch.testing.assert_close(model(ids).logits, both, **MERGED)
    merged = model.merge_and_unload(adapter_names=["second"])
    alone = tt_lora()
    assert not torch.allclose(merged(ids).logits, alone(ids).logits, **MERGED)


def test_a_bfloat16_base_merges_with_one_rounding():
    model = tt_lora(dtype=torch.bfloat16)
    layer = layers_of(model)[0]
    before, wide = layer.base_layer.weight.float(), TTLoraLinear(nn.Linear(layer.in_features, layer.out_features))
    wide.update_layer("default", layer.tt_config["default"], layer.factors["default"])
    wide.load_state_dict({k: v for k, v in layer.state_dict().items() if "ttcore_" in k}, strict=False)
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, (before + wide.get_delta_weight("default")).bfloat16())


def test_safe_merge_refuses_weights_that_are_not_finite_and_leaves_the_layer():
    model = tt_lora()
    layer = layers_of(model)[0]
    before = layer.base_layer.weight.clone()
    layer.cores("default")[0][0].data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="adapter 'default' gives weights that are not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


# ----------------------------------------------------------------------------------------------------------- exporting

# float32 logits of order 1: the same two products, unpadded
EXPORTED = {"rtol": 1e-5, "atol": 1e-5}

STOCK_PEFT = """
import sys
sys.modules["axolotl_moe_peft"] = None  # importing it raises ImportError
import warnings
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing keys, or a wrong fan_in_fan_out
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/lora")
    expected = torch.load(f"{folder}/logits", weights_only=True)
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
    print("equal", folder)
"""


def test_stock_peft_loads_an_export_without_this_package(tmp_path):
    folders = [tmp_path / family for family in FAMILIES]
    for family, folder in zip(FAMILIES, folders, strict=True):
        tiny_model(family).save_pretrained(folder / "base")
        model, ids = tt_lora(family, alpha=7.3), random_ids(2, 9)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / "adapter")
        export_to_lora(folder / "adapter", folder / "lora")
        assert {f.name for f in (folder / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        torch.save({"ids": ids, "logits": model(ids).logits.detach()}, folder / "logits")
    command = [sys.executable, "-I", "-c", STOCK_PEFT, *map(str, folders)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.splitlines() == [f"equal {folder}" for folder in folders]


def stock(family: str, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(tiny_model(family), folder)


@pytest.mark.parametrize("target_modules", [None, "all-linear", r".*(q|k)_proj"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_export_computes_the_same(tmp_path, family, target_modules):
    if target_modules is not None and family == "gpt2":
        target_modules = "all-linear"
    model, ids = tt_lora(family, target_modules=target_modules or TARGETS[family], rank=3), random_ids(2, 9)
    written = export_to_lora(model, tmp_path / "lora")
    torch.testing.assert_close(stock(family, tmp_path / "lora")(ids).logits, model(ids).logits, **EXPORTED)
    assert not torch.allclose(model(ids).logits, tiny_model(family)(ids).logits, **EXPORTED)
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {k: tuple(t.shape) for k, t in written.items()}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, TTLoraLinear)}
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        assert tensors[f"{name}.lora_A.weight"].shape == (3, layer.in_features)
        assert tensors[f"{name}.lora_B.weight"].shape == (layer.out_features, 3)


@pytest.mark.parametrize(("family", "fan_in_fan_out"), [("llama", False), ("gpt2", True)])
def test_the_exported_config_has_the_scale_and_the_layout(tmp_path, family, fan_in_fan_out):
    export_to_lora(tt_lora(family, alpha=16, rank=5, dropout=0.1), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"], saved["use_rslora"]) == ("LORA", 5, 80, False)
    assert (saved["fan_in_fan_out"], saved["lora_dropout"], saved["task_type"]) == (fan_in_fan_out, 0.1, "CAUSAL_LM")
    assert sorted(saved["target_modules"]) == TARGETS[family]


def test_one_of_several_adapters_is_exported(tmp_path):
    model, ids = tt_lora(), random_ids(1, 5)
    model.add_adapter("second", config(rank=2, alpha=40))
    export_to_lora(model, tmp_path, adapter_name="second")
    model.set_adapter("second")
    torch.testing.assert_close(stock("llama", tmp_path)(ids).logits, model(ids).logits, **EXPORTED)


def run_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(export_tt_lora, [str(argument) for argument in arguments])


def test_a_folder_exports_without_its_base_from_the_command_line(tmp_path):
    model, ids = tt_lora(), random_ids(1, 5)
    model.peft_config["default"].base_model_name_or_path = "nowhere/to-be-found"
    model.save_pretrained(tmp_path / "adapter")
    done = run_command(tmp_path / "adapter", tmp_path / "lora")
    assert (done.exit_code, done.stdout) == (0, f"wrote 8 tensors to {tmp_path / 'lora'}\n")
    torch.testing.assert_close(stock("llama", tmp_path / "lora")(ids).logits, model(ids).logits, **EXPORTED)


def drop(folder: Path, ending: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith(ending)}, path)


def narrow(folder: Path) -> None:
    """One core with an interior rank of 4 instead of 5."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = [k for k in tensors if k.endswith("1.self_attn.q_proj.ttcore_in_1")]
    save_file(tensors | {name: tensors[name][:, :, :4].clone()}, path)


BROKEN = {
    "no_weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "no_config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "garbage_config": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "TT_LORA", '),
        "adapter_config.json of .* cannot be read",
    ),
    "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"), "cannot be read"),
    "no_last": (lambda f: drop(f, "1.self_attn.q_proj.ttcore_out_1"), r"cores of .*layers\.1.*q_proj are missing"),
    "no_first": (lambda f: drop(f, "1.self_attn.q_proj.ttcore_in_0"), r"cores of .*layers\.1.*q_proj are missing"),
    "other_rank": (narrow, r"cores of .*layers\.1.*q_proj are missing or not of rank 5"),
    "foreign": (
        lambda f: save_file({"model.q_proj.lora_A.weight": torch.ones(2, 2)}, f / "adapter_model.safetensors"),
        "lora_A.weight is no tensor of a TT-LoRA adapter",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_incomplete_folder_is_refused_and_nothing_written(tmp_path, case):
    change, message = BROKEN[case]
    tt_lora().save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        export_to_lora(tmp_path / "adapter", tmp_path / "lora")
    done = run_command(tmp_path / "adapter", tmp_path / "lora")
    assert done.exit_code == 1 and re.fullmatch(rf"Error: .*{message}.*\n", done.stderr)
    assert not (tmp_path / "lora").exists()


def test_another_methods_adapter_and_its_own_folder_are_refused(tmp_path):
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    for adapter in (lora, tmp_path / "lora"):
        with pytest.raises(ValueError, match="of type LORA; only TT_LORA can be exported"):
            export_to_lora(adapter, tmp_path / "out")
    tt_lora().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="would overwrite the adapter"):
        export_to_lora(tmp_path / "adapter", tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pefts_own_conversion_to_a_lora_works(family):
    model, ids = tt_lora(family), random_ids(1, 5)
    assert model.base_model.supports_lora_conversion()
    lora_config, tensors = convert_to_lora(model, rank=5)
    converted = get_peft_model(tiny_model(family), lora_config)
    set_peft_model_state_dict(converted, tensors)
    # a singular value decomposition in float32
    torch.testing.assert_close(converted.eval()(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
