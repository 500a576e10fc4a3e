"""The recipes of example_yamls: what they say, and what their adapters hold on the real architectures."""

from __future__ import annotations

import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from axolotl.utils.dict import DictDefault
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from axolotl_moe_peft.host.args import CONFIGS
from axolotl_moe_peft.host.memory import base_size

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "example_yamls"
# by their path in example_yamls; the quick start has tests of its own
RECIPES = sorted(
    str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml") if path.parent != FOLDER / "quickstart"
)


def load(name: str) -> dict[str, Any]:
    """The recipe as a dict."""
    return yaml.safe_load((FOLDER / name).read_text())


def header(name: str) -> str:
    """The comment at the recipe's top, in one line."""
    comment = re.match(r"(#.*\n)+", (FOLDER / name).read_text())
    return " ".join(line.removeprefix("#").strip() for line in comment[0].splitlines()) if comment else ""


def real_config(recipe: dict[str, Any], **overrides: Any) -> PretrainedConfig:
    """The configuration of the recipe's base model, from `configs/`."""
    base = recipe["base_model"].rpartition("/")[2]
    sizes = json.loads((Path(__file__).parent / "configs" / f"{base}.json").read_text())
    return CONFIG_MAPPING[sizes["model_type"]](**sizes | overrides)


def real_architecture(recipe: dict[str, Any], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The recipe's base model, without weights."""
    auto_class = AutoModelForImageTextToText if "processor_type" in recipe else AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(real_config(recipe), dtype=dtype)


def expert_recipes(recipe: dict[str, Any]) -> dict[str, str]:
    """For each expert of a pool, the recipe that trains it: the one whose `output_dir` is the expert's path."""
    experts = recipe.get("tt_lora_moe", {}).get("experts", [])
    by_output = {load(name)["output_dir"]: name for name in RECIPES} if experts else {}
    return {expert["name"]: by_output[expert["path"]] for expert in experts}


def with_experts(recipe: dict[str, Any], folders: dict[str, Path]) -> dict[str, Any]:
    """The recipe, its pool's experts in these folders."""
    if not folders:
        return recipe
    experts = [{"name": name, "path": str(folder)} for name, folder in folders.items()]
    return recipe | {"tt_lora_moe": recipe["tt_lora_moe"] | {"experts": experts}}


def save_untrained_experts(recipe: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Save an untrained adapter of the real sizes for each expert of the recipe's pool; their folders by name."""
    folders = {}
    for expert, name in expert_recipes(recipe).items():
        model = attach(load(name))
        own = {key: t for key, t in model.state_dict().items() if "ttcore_" in key or "lora_" in key}
        zeros = {key: torch.zeros(tensor.shape) for key, tensor in own.items()}
        model.save_pretrained(folder / expert, state_dict=zeros)
        folders[expert] = folder / expert
    return folders


def attach(recipe: dict[str, Any]) -> PeftModel:
    """The recipe's adapter on the real architecture, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = with_experts(recipe, save_untrained_experts(recipe, Path(folder)))
        model, config = real_architecture(recipe), adapter_config(recipe)
        if getattr(config, "calibration_rows", 0):  # a LoRA's has none
            config = config.calibrated(model, None)
        return get_peft_model(model, config)


def adapter_config(recipe: dict[str, Any]) -> PeftConfig:
    """The recipe's adapter; a LoRA is the host's own."""
    adapter = recipe["adapter"]
    if adapter == "lora":
        names = {"r": "lora_r", "lora_alpha": "lora_alpha", "target_modules": "lora_target_modules"}
        return LoraConfig(**{name: recipe[key] for name, key in names.items()}, task_type="CAUSAL_LM")
    return CONFIGS[adapter](**recipe[adapter], task_type="CAUSAL_LM")


@cache
def counts(name: str) -> tuple[int, int]:
    """(trainable, of these a token passes through) of the recipe's adapter on the real architecture."""
    model = attach(load(name))
    if load(name)["adapter"] == "lora":
        return (model.get_nb_trainable_parameters()[0],) * 2
    rows = model.base_model.parameter_rows()
    trainable = sum(row.parameters for row in rows)
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(row.activated for row in rows)


@cache
def weights_bytes(name: str) -> int:
    """Of the recipe's base model as it is loaded, all processes together if it is sharded."""
    recipe = load(name)
    return base_size(real_architecture(recipe, torch.bfloat16), DictDefault(recipe))[0]
