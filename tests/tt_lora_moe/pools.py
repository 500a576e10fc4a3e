"""Trained experts on disk, TT-LoRAs and plain LoRAs, and pools of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from axolotl_moe_peft import TTLoraConfig, TTLoraMoeConfig
from tests.tiny_models import tiny_model

# ranks, factors and alphas that differ, large enough for the tiny base to answer differently
EXPERTS: dict[str, dict[str, Any]] = {
    "gsm8k": {"rank": 2, "alpha": 300},
    "boolq": {"rank": 5, "alpha": 900, "num_cores": 4},
    "rte": {"rank": 3, "alpha": 500, "factors": {"q_proj": {"in": [4, 8], "out": [8, 2, 2]}}},
}


def save_experts(
    folder: Path, family: str = "llama", names: Sequence[str] = tuple(EXPERTS), num_hidden_layers: int = 2, **keys: Any
) -> list[dict]:
    """Save one random tt_lora adapter for each name; the entries for `experts`."""
    for name in names:
        torch.manual_seed(sum(map(ord, name)))
        config = TTLoraConfig(**(EXPERTS.get(name, {"alpha": 700}) | keys), task_type="CAUSAL_LM")
        base = tiny_model(family, num_hidden_layers=num_hidden_layers)
        peft.get_peft_model(base, config).save_pretrained(folder / name)
    return [{"name": name, "path": str(folder / name)} for name in names]


def save_lora(folder: Path, name: str = "lora", family: str = "llama", **keys: Any) -> dict[str, str]:
    """Save a LoRA with random A and B, each a good part of what a layer adds; its entry for `experts`."""
    torch.manual_seed(sum(map(ord, name)))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny_model(family), LoraConfig(**(settings | keys)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder / name)
    return {"name": name, "path": str(folder / name)}


def pool_of(entries: list[dict], family: str = "llama", base: PreTrainedModel | None = None, **keys: Any):
    """A new pool on the tiny base, its router the same each time; in eval mode."""
    base = tiny_model(family) if base is None else base
    torch.manual_seed(7)
    model = peft.get_peft_model(base, TTLoraMoeConfig(experts=entries, task_type="CAUSAL_LM", **keys))
    with torch.no_grad():  # as it is initialised, one expert wins everywhere: tiny embeddings are near zero
        for name, parameter in model.named_parameters():
            if name.endswith(("ttmoe_weight.default", "ttmoe_hidden_weight.default")):
                parameter.normal_(std=2)
            if name.endswith(("ttmoe_bias.default", "ttmoe_hidden_bias.default")):
                parameter.zero_()
    return model.eval()


def expert_model(entry: dict, family: str = "llama"):
    """The base with one expert's own adapter."""
    return peft.PeftModel.from_pretrained(tiny_model(family), entry["path"]).eval()
