"""Tiny adapters of every method, in every way that is computed differently. A new method is a row of BLOCKS."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel

import axolotl_moe_peft  # noqa: F401  registers the methods

N, K, RANK, ALPHA = 8, 2, 4, 8
# large enough to be a good part of the gradient
AUX, Z = 0.5, 0.1
TT_LORA = {
    "rank": RANK,
    "alpha": ALPHA,
    "target_modules": ["q_proj", "v_proj"],
    "factors": {"q_proj": {"in": [8, 2, 2], "out": [4, 8]}},
}
# the method and its block, without what is random (noise, dropout); a balance coefficient where there is one
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "perft": (
        "perft",
        {"num_experts": N, "num_experts_per_tok": K, "rank": RANK, "alpha": ALPHA}
        | {"router_aux_loss_coef": AUX, "router_z_loss_coef": Z},
    ),
    "perft embedded": ("perft", {"variant": "embedded", "rank": RANK, "base_router_aux_loss_coef": AUX}),
    "perft in some experts": (
        "perft",
        {"variant": "embedded", "rank": RANK, "expert_ids": {f"model.layers.{i}.mlp": [2, 0] for i in range(2)}}
        | {"rank_allocation": {"max_rank": RANK + 2}},
    ),
    "perft dense": ("perft", {"variant": "dense", "num_experts": 2, "rank": RANK}),
    "perft single": ("perft", {"variant": "single", "expert_type": "parallel_adapter", "rank": RANK}),
    "perft beside MLPs": (
        "perft",
        {"target_modules": "mlp", "num_experts": N, "num_experts_per_tok": K, "rank": RANK, "alpha": ALPHA}
        | {"router_aux_loss_coef": AUX, "router_z_loss_coef": Z},
    ),
    "perft and attention": (
        "perft",
        {"target_modules": "mlp", "num_experts": N, "num_experts_per_tok": K, "rank": RANK, "alpha": ALPHA}
        | {"linear_target_modules": ["q_proj", "v_proj"], "linear_rank": 3, "linear_alpha": 5}
        | {"router_aux_loss_coef": AUX, "router_z_loss_coef": Z},
    ),
    "tt_lora": ("tt_lora", TT_LORA),
    "tt_lora all-linear": ("tt_lora", {"rank": 2, "alpha": ALPHA, "target_modules": "all-linear", "num_cores": 6}),
    "tt_lora Conv1D": ("tt_lora", {"rank": 3, "alpha": ALPHA, "target_modules": ["c_attn", "c_proj"]}),
    "tt_lora_moe": ("tt_lora_moe", {"router_noise": False}),
    "tt_lora_moe embeddings": ("tt_lora_moe", {"router": "embedding_mlp", "router_noise": False}),
    "pt_moe": (
        "pt_moe",
        {
            "num_virtual_tokens": 4,
            "num_experts": 3,
            "rank": 3,
            "center_router_input": False,  # the mean would depend on how rows are grouped
            "router_noise_std": 0.0,
            "router_aux_loss_coef": AUX,
        },
    ),
    "pt_moe top 2": (
        "pt_moe",
        {
            "num_virtual_tokens": 6,
            "num_experts": 3,
            "rank": 4,
            "top_k": 2,
            "center_router_input": False,
            "router_noise_std": 0.0,
        },
    ),
    "pt_moe centred": (
        "pt_moe",
        {
            "num_virtual_tokens": 4,
            "num_experts": 3,
            "rank": 3,
            "top_k": 3,
            "center_router_input": True,
            "router_noise_std": 0.0,
        },
    ),
    "pt_moe not factorised": (
        "pt_moe",
        {"num_virtual_tokens": 5, "num_experts": 2, "rank": None, "router_noise_std": 0.0},
    ),
    "pt_moe one prompt": ("pt_moe", {"num_virtual_tokens": 4, "num_experts": 1, "rank": 3}),
}
METHODS = tuple(dict.fromkeys(method for method, _ in BLOCKS.values()))
_FAMILIES = {
    "perft": ("mixtral", "olmoe", "qwen3_moe"),
    "pt_moe": ("llama", "mixtral", "gpt2"),
    "perft beside MLPs": ("llama", "gpt2"),
    "perft and attention": ("llama",),
    "tt_lora Conv1D": ("gpt2",),
}
# routers of whole sequences, of features that are small in a random model
_STD = {"ptmoe_router_weight": 40.0, "ttmoe_weight": 2.0, "ttmoe_hidden_weight": 2.0}


def families(kind: str) -> tuple[str, ...]:
    """The tiny models (tests.tiny_models) that an adapter of that kind is tried on."""
    return _FAMILIES.get(kind) or _FAMILIES.get(BLOCKS[kind][0], ("llama", "mixtral"))


def config_of(kind: str, experts: list[dict[str, str]], **changes: Any) -> PeftConfig:
    """The config of a row of BLOCKS.

    Args:
        experts: the entries of a pool, of which other methods have none.
        changes: fields of the config instead of, or beside, those of the row.
    """
    method, block = BLOCKS[kind]
    if method == "tt_lora_moe":
        block = block | {"experts": experts}
    return PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()](**{"task_type": "CAUSAL_LM", **block, **changes})


def trained(kind: str, base: PreTrainedModel, experts: list[dict[str, str]], seed: int = 1) -> PeftModel:
    """The base with an adapter whose parameters all act, as after training; in eval mode."""
    torch.manual_seed(seed)  # of what is not trained, too
    return randomised(get_peft_model(base, config_of(kind, experts)).eval(), seed)


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            std = next((std for part, std in _STD.items() if part in name), 0.3)
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model
