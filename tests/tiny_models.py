"""Tiny random models of the real families, and batches for them."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
VOCAB_SIZE = 128
PAD, EOS, BOS = 0, 1, 2

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}


def tiny_config(family: str, **overrides):
    """Two layers, width 32; four experts (Mixtral) or eight, top-2, or none (Llama, GPT-2)."""
    common = _COMMON | overrides
    if family == "llama":
        return LlamaConfig(intermediate_size=24, **common)
    if family == "gpt2":
        return GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common)
    if family == "mixtral":
        return MixtralConfig(intermediate_size=24, num_local_experts=4, **common)
    if family == "olmoe":
        return OlmoeConfig(intermediate_size=24, num_experts=8, **common)
    return Qwen3MoeConfig(
        moe_intermediate_size=24, intermediate_size=48, num_experts=8, head_dim=8, norm_topk_prob=True, **common
    )


def tiny_model(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A model of `tiny_config`, in eval mode; the same for the same seed."""
    torch.manual_seed(seed)
    classes = {
        "mixtral": MixtralForCausalLM,
        "olmoe": OlmoeForCausalLM,
        "qwen3_moe": Qwen3MoeForCausalLM,
        "llama": LlamaForCausalLM,
        "gpt2": GPT2LMHeadModel,
    }
    model = classes[family](tiny_config(family, **overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj")):
                parameter.normal_(std=0.2)  # routers that decide, experts that matter
    return model.eval()


def randomise_adapters(model: torch.nn.Module, seed: int = 1, std: float = 0.1) -> None:
    """Give every adapter parameter a value, as training would: up-projections start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "perft_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, length) without special tokens."""
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
