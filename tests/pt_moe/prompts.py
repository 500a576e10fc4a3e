"""Tiny models with PT-MoE adapters, and the plain reference: each prompt built by hand, the bare model called."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor

from axolotl_moe_peft import PTMoeConfig
from axolotl_moe_peft.pt_moe import PTMoeLayer
from axolotl_moe_peft.pt_moe.layer import MEAN_OF
from tests.tiny_models import tiny_model

FAMILIES = ("llama", "mixtral", "gpt2")
T = 5
PAPER, CENTERED = {"center_router_input": False, "top_k": 1}, {"center_router_input": True}
SETTINGS = {
    "centered": {"num_experts": 3, "rank": 4, "top_k": 1, **CENTERED},
    "centered_all": {"num_experts": 3, "rank": 4, "top_k": 3, **CENTERED},
    "pt_moe": {"num_experts": 3, "rank": 4, **PAPER},
    "top_2": {"num_experts": 3, "rank": 4, **PAPER, "top_k": 2},
    "smop": {"num_experts": 3, "rank": None, **PAPER},
    "dpt": {"num_experts": 1, "rank": 4},
    "pt": {"num_experts": 1, "rank": None},
    "unscaled": {"num_experts": 3, "rank": 4, "scale_by_router_prob": False, "router_aux_loss_coef": 0.1, **PAPER},
}


def config(setting: str = "pt_moe", **kwargs) -> PTMoeConfig:
    settings = {"num_virtual_tokens": T, "router_noise_std": 0.0, **SETTINGS[setting], **kwargs}
    return PTMoeConfig(task_type="CAUSAL_LM", **settings)


def randomise_prompts(model: torch.nn.Module, seed: int = 11) -> None:
    """Prompts that differ and routers that decide, as after training."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer_of(model)
    layer.without_text.clear()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            # embeddings of the tiny models have a std of 0.02, their means even less; centred inputs a length of 0.5
            centered = name.rpartition(".")[2] in layer.ptmoe_router_mean
            std = {"ptmoe_router_weight": 4.0 if centered else 40.0, "ptmoe_router_mean": 0.005}
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std.get(name.split(".")[0], 0.4))
            if "count" in name:
                parameter.fill_(MEAN_OF)


def layer_of(model: torch.nn.Module) -> PTMoeLayer:
    return next(m for m in model.modules() if isinstance(m, PTMoeLayer))


def pt_moe(family: str = "llama", setting: str = "pt_moe", seed: int = 11, base=None, **kwargs) -> PeftModel:
    model = get_peft_model(tiny_model(family) if base is None else base, config(setting, **kwargs)).eval()
    randomise_prompts(model, seed)
    return model


def adapter_tensors(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """experts, shared, router_weight, router_bias: copies that require gradients."""
    named = layer_of(model).named_parameters()
    suffix = f".{adapter_name}"
    return {
        n.removeprefix("ptmoe_").removesuffix(suffix): p.detach().clone().requires_grad_()
        for n, p in named
        if n.endswith(suffix)
    }


def reference_prompt(tensors: dict[str, Tensor], settings: PTMoeConfig, embeds: Tensor) -> tuple[Tensor, list[int]]:
    """The prompt (T, D) for a sequence whose readable tokens have these embeddings (S, D), and the chosen experts."""
    full = [e @ tensors["shared"] if "shared" in tensors else e for e in tensors["experts"]]
    if settings.num_experts == 1:
        return full[0], [0]
    x = embeds.mean(0)
    if settings.center_router_input:
        x = x - tensors["router_mean"]
        x = x / x.norm() / 2
    logits = tensors["router_weight"] @ x + tensors["router_bias"]
    probs = logits.softmax(0)
    chosen = probs.argsort(descending=True)[: settings.top_k].tolist()
    return sum((probs[i] if settings.scale_by_router_prob else 1.0) * full[i] for i in chosen), chosen


def reference_logits(
    base: torch.nn.Module, tensors: dict[str, Tensor], settings: PTMoeConfig, ids: Tensor, readable: int | None = None
) -> Tensor:
    """Logits (S, V) of one sequence (S,), whose first `readable` tokens choose the prompt."""
    embeds = base.get_input_embeddings()(ids)
    prompt, _ = reference_prompt(tensors, settings, embeds[:readable])
    return base(inputs_embeds=torch.cat([prompt, embeds])[None]).logits[0, len(prompt) :]


def reference_loss(
    base: torch.nn.Module, tensors: dict[str, Tensor], settings: PTMoeConfig, samples: list[tuple[Tensor, int]]
) -> Tensor:
    """Mean cross-entropy over the answer tokens of samples (ids, length of the prompt)."""
    losses = []
    for ids, prompt_length in samples:
        logits = reference_logits(base, tensors, settings, ids, prompt_length)
        losses.append(F.cross_entropy(logits[prompt_length - 1 : -1], ids[prompt_length:], reduction="none"))
    return torch.cat(losses).mean()
