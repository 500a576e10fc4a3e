"""Tiny random models of every MoE family of transformers: two layers (more where kinds of layers differ), width 32.

A family that the installed transformers does not have is left out of `FAMILIES`.
"""

import re
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from .tiny_models import BOS, EOS, PAD, VOCAB_SIZE

_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_ROTARY_BY_LAYER_TYPE = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_INDEXER = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}

# a name that a family's configuration does not know is left out
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}

_KIMI_LINEAR = {
    **_MLA,
    "num_key_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["sparse", "sparse"],
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
_INKLING2 = {
    "num_hidden_layers": 3,
    "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "unpadded_vocab_size": VOCAB_SIZE,
    "sliding_window_size": 64,
    "n_layers_per_attn_res_block": 1,
}

# what each family needs beside `_SIZES`; its layers with MoE blocks
_TABLE: dict[str, tuple[dict[str, Any], list[int]]] = {
    "afmoe": ({}, [1]),
    "aria_text": ({}, [0, 1]),
    "axk1": ({**_MLA, "num_key_value_heads": 4}, [1]),
    "axk2": ({**_MLA, **_INDEXER, **_DENSE_THEN_SPARSE, "num_key_value_heads": 4, "gated_norm_rank": 4}, [1]),
    "cohere2_moe": ({"mlp_layer_types": ["sparse", "sparse"]}, [0, 1]),
    "dbrx": (
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
        [0, 1],
    ),
    "deepseek_v2": ({**_MLA, "num_key_value_heads": 4}, [1]),
    "deepseek_v3": ({**_MLA, "num_key_value_heads": 4}, [1]),
    "deepseek_v32": ({**_MLA, **_INDEXER, **_DENSE_THEN_SPARSE, "num_key_value_heads": 4}, [1]),
    "deepseek_v4": (
        {
            "q_lora_rank": 16,
            "o_lora_rank": 16,
            "o_groups": 2,
            "head_dim": 16,
            "num_key_value_heads": 1,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "sliding_attention"],
            "mlp_layer_types": ["hash_moe", "moe"],
            "hc_mult": 2,
            "hc_sinkhorn_iters": 2,
            **_INDEXER,
        },
        [0, 1],
    ),
    "dots1": ({}, [1]),
    "ernie4_5_moe": ({"moe_layer_end_index": 1}, [1]),
    "exaone_moe": ({**_DENSE_THEN_SPARSE, "layer_types": ["sliding_attention", "full_attention"]}, [1]),
    "flex_olmo": ({}, [0, 1]),
    "gemma4_text": (
        {
            "enable_moe_block": True,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "top_k_experts": 2,
            "global_head_dim": 16,
        },
        [0, 1],
    ),
    "glm4_moe": ({}, [1]),
    "glm4_moe_lite": ({**_MLA, **_DENSE_THEN_SPARSE, "num_key_value_heads": 4}, [1]),
    "glm_moe_dsa": ({**_MLA, **_INDEXER, **_DENSE_THEN_SPARSE, "num_key_value_heads": 4}, [1]),
    "gpt_oss": ({}, [0, 1]),
    "granitemoe": ({}, [0, 1]),
    "granitemoe_swa": ({}, [0, 1]),
    "granitemoehybrid": ({**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 24}, [0, 1]),
    "granitemoeshared": ({"shared_intermediate_size": 24}, [0, 1]),
    "hunyuan_v1_moe": ({}, [0, 1]),
    "hy_v3": ({}, [1]),
    "inkling_text": ({}, [0, 1]),
    "jamba": (
        {
            "mamba_dt_rank": 4,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
        },
        [1],
    ),
    "jetmoe": ({"kv_channels": 8}, [0, 1]),
    "laguna": ({**_DENSE_THEN_SPARSE, "num_attention_heads_per_layer": [4, 4]}, [1]),
    "lfm2_moe": ({"layer_types": ["conv", "full_attention"]}, [1]),
    "llama4_text": ({"intermediate_size_mlp": 24, "attention_chunk_size": 64}, [0, 1]),
    "longcat_flash": (
        {
            **_MLA,
            "num_layers": 2,
            "num_key_value_heads": 4,
            "ffn_hidden_size": 24,
            "expert_ffn_hidden_size": 24,
            "zero_expert_num": 2,
        },
        [0, 1],
    ),
    "mellum": ({}, [0, 1]),
    "mimo_v2_flash": (_DENSE_THEN_SPARSE, [1]),
    "minimax": ({"layer_types": ["full_attention", "linear_attention"], "block_size": 16}, [0, 1]),
    "minimax_m2": ({}, [0, 1]),
    "minimax_m3_vl_text": ({"dense_intermediate_size": 24, "shared_intermediate_size": 24, "rotary_dim": 4}, [0, 1]),
    "mixtral": ({}, [0, 1]),
    "nemotron_h": (
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention"],
            "num_hidden_layers": None,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "moe_shared_expert_intermediate_size": 24,
            "moe_latent_size": 16,
        },
        [1],
    ),
    "olmoe": ({}, [0, 1]),
    "phimoe": ({"router_jitter_noise": 0.0}, [0, 1]),
    "qwen2_moe": ({}, [0, 1]),
    "qwen3_5_moe_text": (_LINEAR_ATTENTION, [0, 1]),
    "qwen3_moe": ({}, [0, 1]),
    "qwen3_next": (_LINEAR_ATTENTION, [0, 1]),
    "qwen4_exp_text": (
        {
            **_LINEAR_ATTENTION,
            "layer_types": ["linear_attention", "qwen_sparse_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 32,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 8,
            "hc_count": 2,
        },
        [0, 1],
    ),
    "solar_open": ({}, [0, 1]),
    "zaya": ({"num_experts_per_tok": 1, "router_hidden_size": 48}, [0, 1]),
    # transformers 5.17
    "hy_v4": (
        {
            **_MLA,
            **_INDEXER,
            **_DENSE_THEN_SPARSE,
            "num_key_value_heads": 4,
            "layer_types": ["indexed_attention", "indexed_attention"],
            "indexer_types": ["full", "full"],
            "hc_mult": 2,
        },
        [1],
    ),
    "kimi_linear": (_KIMI_LINEAR, [0, 1]),
    # 5.20
    "bailing_hybrid": (_KIMI_LINEAR, [0, 1]),
    "beam": ({**_DENSE_THEN_SPARSE, "layer_types": ["sliding_attention", "full_attention"]}, [1]),
    "kolibri1": ({"layer_types": ["sliding_attention", "full_attention"]}, [0, 1]),
    # 5.21
    "flint": ({"mlp_only_layers": [], "layer_types": ["full_attention", "sliding_attention"]}, [0, 1]),
    # 5.23
    "dots3_note_text": (
        {
            **_MLA,
            **_INDEXER,
            **_DENSE_THEN_SPARSE,
            "layer_types": ["indexed_attention", "sliding_attention"],
            "num_key_value_heads": 4,
            "shared_experts_intermediate_size": 24,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
        [1],
    ),
    "inkling2_text": (_INKLING2, [0, 1, 2]),
    # 5.24
    "inkling2_loop_text": (
        {
            **_INKLING2,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 2,
            "loop_num_passes": 2,
            "loop_gate_rank": 4,
        },
        [0, 1, 2],
    ),
    "lara_mini": (_LINEAR_ATTENTION, [0, 1]),
    "sarvam_mla": ({**_MLA, "num_key_value_heads": 4}, [1]),
    "sarvam_moe": ({}, [1]),
}
FAMILIES = {family: entry for family, entry in _TABLE.items() if family in CONFIG_MAPPING}


def tiny_family_config(family: str, **overrides: Any) -> Any:
    """The configuration of the family's tiny model."""
    known = _known_fields(family)
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    given = {k: v for k, v in {**sizes, **FAMILIES[family][0], **overrides}.items() if v is not None}
    return CONFIG_MAPPING[family](**given)


def tiny_family_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A causal language model of the family with routers that decide, in eval mode; the same for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_family_config(family, **overrides))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if re.search(r"\.(gate|router)\.", name) and tensor.dim() == 2 and tensor.is_floating_point():
                tensor.normal_(std=0.2)
            elif re.search(r"(correction|expert|balancing)_bias(es)?$", name):
                tensor.normal_(std=0.05)
            elif name.endswith("tid2eid"):
                tensor.copy_(torch.stack([torch.randperm(4)[: tensor.shape[1]] for _ in tensor]))
    return model.eval()


@cache
def _known_fields(family: str) -> frozenset[str]:
    config = CONFIG_MAPPING[family]()
    return frozenset(config.to_dict()) | frozenset(config.attribute_map)
