"""Tiny adapters as YAML keys, and the host's own LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.host.args import CONFIGS
from tests.tiny_adapters import ALPHA, BLOCKS, RANK, TT_LORA

LORA = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_target_modules": TT_LORA["target_modules"]}
TRITON_KERNELS = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
# those of the table that a run of the host could treat differently
ADAPTERS = ("lora", "perft", "perft embedded", "perft dense", "tt_lora", "tt_lora_moe", "pt_moe")
EXPERTS = ("a", "b")


def adapter_keys(adapter: str, experts: Path, balanced: bool = True) -> dict[str, Any]:
    """The YAML's keys for that adapter.

    Args:
        adapter: one of ADAPTERS.
        experts: the folder with the experts of a pool.
        balanced: with the balance losses, which are not linear in the batch.
    """
    if adapter == "lora":
        return {"adapter": "lora", "perft": None, **LORA, **TRITON_KERNELS}
    method, block = BLOCKS[adapter]
    if not balanced:
        block = {key: 0.0 if "aux_loss" in key else value for key, value in block.items()}
    if method == "tt_lora_moe":
        block = block | {"experts": [{"name": name, "path": str(experts / name)} for name in EXPERTS]}
    return {"adapter": method, "perft": None, method: block}


def dataset_keys(adapter: str, rows: Path) -> dict[str, Any]:
    """The YAML's keys for training on these rows."""
    dataset = {"path": str(rows), "type": "chat_template", "split": "train"}
    if adapter != "tt_lora_moe":
        return {"datasets": [dataset]}
    prepared = str(rows.with_suffix(".labelled.prepared"))
    return {"datasets": [dataset | {"expert": EXPERTS[0]}], "dataset_prepared_path": prepared}


def save_experts(base: Path, folder: Path) -> None:
    """The trained experts of a pool, a TT-LoRA and a plain LoRA."""
    lora = LoraConfig(r=RANK, target_modules=TT_LORA["target_modules"], init_lora_weights=False)
    for seed, (name, config) in enumerate(zip(EXPERTS, (TTLoraConfig(**TT_LORA), lora))):
        _save(config, base, folder / name, seed, spread=0.0)


def save_start(adapter: str, base: Path, experts: Path, folder: Path) -> None:
    """An adapter whose parameters all have gradients from the first step on: no up-projection is zero."""
    method, block = adapter_keys(adapter, experts)["adapter"], adapter_keys(adapter, experts)
    if adapter == "lora":
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LORA["lora_target_modules"])
    else:
        config = CONFIGS[method](**block[method])
    # with seed 3 the sequences of test_cli_equivalence.py get prompts of different experts
    _save(config, base, folder, seed=3, spread=0.1)


def _save(config: PeftConfig, base: Path, folder: Path, seed: int, spread: float) -> None:
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # embeddings of a random model are small: a router of prompts needs large weights to tell them apart
                alpha = 30 * spread if "ptmoe_router_weight" in name else spread
                parameter.add_(torch.randn_like(parameter), alpha=alpha)
    model.save_pretrained(folder)
