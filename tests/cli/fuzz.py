"""Random YAMLs that a user could write: an adapter, its block, and keys of Axolotl beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.cli.adapters import EXPERTS

FAMILIES = {"perft": ("mixtral", "olmoe", "qwen3_moe", "llama"), "": ("llama", "mixtral", "olmoe")}

# values of a block's keys; None leaves the key out
_BLOCKS: dict[str, dict[str, tuple[Any, ...]]] = {
    "perft": {
        "variant": (None, "routed", "embedded", "dense", "single"),
        "num_experts": (None, None, 1, 3, 8),
        "num_experts_per_tok": (None, None, 1, 2),
        "experts": (None, None, {"keep": 0.25}, {"keep": 0.5, "calibrate": 2}, {"keep": 0}, {"calibrate": 3}),
        "rank_allocation": (
            *(None,) * 4,
            {"score": "gate"},
            {"score": "saliency", "warmup_steps": 1, "every_steps": 1},
            {"max_rank": 1},
        ),
        "expert_type": (None, None, "lora", "parallel_adapter"),
        "rank": (None, 1, 4, 7),
        "alpha": (None, None, 1, 0.5),
        "dropout": (None, 0.0, 0.3),
        "hidden_act": (None, None, None, "gelu"),
        "norm_topk_prob": (None, None, True, False),
        "gate_weights": (None, None, "own", "base"),
        "init": (None, "zero", "paper"),
        "router_aux_loss_coef": (None, None, 0.0, 0.1),
        "router_z_loss_coef": (None, None, 0.0, 0.001),
        "base_router_aux_loss_coef": (None, None, 0.0, 0.02),
        "target_modules": (None, None, "mlp", ["mlp"], r".*layers\.0\.mlp", "(", ["nothing"]),
        "layers_to_transform": (None, None, None, 0, [1], [7]),
        "linear_target_modules": (None, None, ["q_proj", "v_proj"], "all-linear", ["gate"], ["up_proj"]),
        "linear_rank": (None, None, 2, 0),
    },
    "tt_lora": {
        "rank": (None, 1, 3),
        "alpha": (None, 1, 0.5),
        "dropout": (None, 0.1),
        "target_modules": (None, None, ["q_proj", "o_proj"], "all-linear", r".*layers\.0\..*v_proj", "[", ["nothing"]),
        "num_cores": (None, None, 4, 5),
        "init": (None, "zero", "normalized"),
    },
    "tt_lora_moe": {
        "router": (None, "base_hidden", "embedding_linear", "embedding_mlp"),
        "router_noise": (None, True, False),
        "router_input": (None, "prompt", "sequence"),
    },
    "pt_moe": {
        "num_virtual_tokens": (4, 5, 200),
        "num_experts": (None, 1, 3),
        "rank": (2, 4, None),
        "top_k": (None, None, 1, 2),
        "router_noise_std": (None, 0.0),
        "scale_by_router_prob": (None, None, None, False),
        "init_text": (None, None, "be brief", ["a", "b", "c"]),
        "router_input": (None, "prompt", "sequence"),
        "router_aux_loss_coef": (None, None, 0.1),
    },
}
# keys of the host and their values
_HOST: dict[str, tuple[Any, ...]] = {
    "sample_packing": (True,),
    "eval_sample_packing": (False,),
    "pad_to_sequence_len": (True,),
    "gradient_checkpointing": (True, False),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {"use_reentrant": True}),
    "gradient_accumulation_steps": (2, 3),
    "micro_batch_size": (1, 2),
    "val_set_size": (2,),
    "train_on_inputs": (True,),
    "attn_implementation": ("eager",),
    "optimizer": (
        "sgd",
        "adafactor",
        "adamw_torch_fused",
        "muon",
        "galore_adamw",
        "schedule_free_adamw",
        "lion_pytorch",
    ),
    "lr_scheduler": ("cosine", "one_cycle", "rex"),
    "learning_rate": (0.0, 1e-3),
    "weight_decay": (0.1,),
    "max_grad_norm": (0.5,),
    "neftune_noise_alpha": (5,),
    "use_eaft": (True,),
    "group_by_length": (True,),
    "save_steps": (1,),
    "save_only_model": (True,),
    "eval_steps": (1,),
    "include_tokens_per_second": (True,),
    "lora_modules_to_save": (["lm_head"], ["embed_tokens"]),
    "peft_autocast_adapter_dtype": (False,),
    "unfrozen_parameters": ([".*lm_head.*"],),
    "lora_r": (8,),
    "lora_dropout": (0.1,),
    "load_in_4bit": (True,),
    "load_in_8bit": (True,),
    "rl": ("dpo", "orpo"),
    "reward_model": (True,),
    "process_reward_model": (True,),
    "context_parallel_size": (2,),
    "tensor_parallel_size": (2,),
    "dataset_processes": (1,),
    "excess_length_strategy": ("truncate",),
    "sequence_len": (16, 64),
    "torch_dtype": ("float32",),
    "loraplus_lr_ratio": (4,),
    "embedding_lr": (1e-4,),
    "lr_groups": ([{"name": "all", "modules": ["layers"], "lr": 1e-3}],),
    "special_tokens": ({"pad_token": "<pad>"},),
    "tokens": (["<new>"],),
    "strict": (False,),
    "resume_from_checkpoint": ("outputs/typo",),
    "lora_model_dir": ("outputs/typo",),
    "auto_resume_from_checkpoints": (True,),
}


def random_keys(seed: int, experts: Path) -> tuple[str, dict[str, Any]]:
    """The family of the base model and the YAML's keys of this seed.

    Args:
        seed: the same gives the same.
        experts: the folder of a pool's experts; the pool's base is Mixtral.
    """
    rng = random.Random(seed)
    adapter = rng.choice(sorted(_BLOCKS))
    family = "mixtral" if adapter == "tt_lora_moe" else rng.choice(FAMILIES.get(adapter, FAMILIES[""]))
    values = {key: rng.choice(choices) for key, choices in _BLOCKS[adapter].items()}
    # most blocks set a few keys only, as users do
    kept = rng.choice((2, 3, 4, len(values)))
    chosen = dict(rng.sample(sorted(values.items(), key=lambda item: item[0]), min(kept, len(values))))
    block = {key: value for key, value in chosen.items() if value is not None}
    keys: dict[str, Any] = {"perft": None, "adapter": adapter, adapter: block}
    if adapter == "tt_lora_moe":
        block["experts"] = [{"name": name, "path": str(experts / name)} for name in EXPERTS]
    for key in rng.sample(sorted(_HOST), rng.choice((0, 1, 2, 3, 4, 5))):
        keys[key] = rng.choice(_HOST[key])
    return family, keys
