"""Tiny bases as they are published quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.moe_families import tiny_family_model
from tests.tiny_models import tiny_model

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def save_mxfp4(folder: Path) -> dict[str, Tensor]:
    """A tiny GPT-OSS with random packed experts, as OpenAI publishes it; returns these experts in full."""
    tiny_family_model("gpt_oss", hidden_size=64, intermediate_size=64).bfloat16().save_pretrained(folder)
    tensors, experts = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, inputs, outputs = tensors.pop(name).shape
        size = (num_experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, size, dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = _E2M1[torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()]
        experts[name] = (values * 2.0 ** (scales.float() - 127).unsqueeze(-1)).flatten(-2).transpose(1, 2)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return experts


def save_fp8(folder: Path) -> None:
    """A tiny Qwen3-MoE with one scale a matrix, as Qwen publishes it with one a block of 128 x 128."""
    tiny_model("qwen3_moe", hidden_size=64).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.view(1, 1)
    _rewrite(
        folder,
        tensors,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    )


def save_bitsandbytes(folder: Path) -> None:
    tiny_model("mixtral", hidden_size=64).save_pretrained(folder / "full")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        folder / "full", quantization_config=quantization, device_map={"": "cpu"}
    ).save_pretrained(folder)
