"""Tiny random models of every causal language model of transformers that can be made tiny: two layers, width 32."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .moe_families import _SIZES, FAMILIES, tiny_family_config
from .tiny_models import random_ids

_MOST_PARAMETERS = 4_000_000
# beside the names of moe_families; a name that a configuration does not know is left out
_MORE_SIZES = {
    "ffn_dim": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "d_kv": 8,
    "attention_hidden_size": 32,
    "embedding_size": 32,
    "layer_types": ["full_attention", "full_attention"],
    "state_size": 8,
    "expand": 2,
    "n_groups": 1,
    "num_heads": 4,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
# what some need in another way
_OWN: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": 2},
    "opt": {"ffn_dim": 48},
}


def causal_model_types() -> list[str]:
    """Every model type that AutoModelForCausalLM knows here."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_causal_config(model_type: str) -> PreTrainedConfig:
    if model_type in FAMILIES:
        return tiny_family_config(model_type)
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class()
    known = set(defaults.to_dict()) | set(defaults.attribute_map)
    sizes = {name: value for name, value in {**_SIZES, **_MORE_SIZES}.items() if name in known}
    return config_class(**{**sizes, **_OWN.get(model_type, {})})


@cache
def is_tiny(model_type: str) -> bool:
    """Whether a model of this type can be made tiny by the names of sizes that are usual, and then runs."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_causal_config(model_type))
        if sum(p.numel() for p in model.parameters()) > _MOST_PARAMETERS:
            return False
        with torch.no_grad():
            tiny_causal_model(model_type)(input_ids=random_ids(2, 5))
    except Exception:  # whatever a model does with sizes that it does not expect
        return False
    return True


def tiny_causal_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model of the type in eval mode; the same for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_causal_config(model_type))
    return model.eval()
