"""The methods that are compared, on the MoE and on the dense model, and their sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TASK = {"task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Method:
    """A row of the page.

    Attributes:
        base: `model`, the MoE, or `dense`.
        attach: makes the trained model of a base; None: it stays frozen.
        learning_rate_of: the method whose learning rate it takes; None: it has one of its own.
        loss: what is added to the loss of a row, if the method does not do it itself.
    """

    base: str
    attach: Callable[[PreTrainedModel], nn.Module] | None = None
    learning_rate_of: str | None = None
    loss: Callable[[nn.Module], Tensor] | None = None


def peft(make_config: Callable[..., PeftConfig], **settings: Any) -> Callable[[PreTrainedModel], nn.Module]:
    return lambda base: get_peft_model(base, make_config(**settings, **TASK))


def lora(rank: int, **settings: Any) -> Callable[[PreTrainedModel], nn.Module]:
    return peft(LoraConfig, r=rank, lora_alpha=2 * rank, **settings)


def perft(rank: int, **settings: Any) -> Callable[[PreTrainedModel], nn.Module]:
    return peft(PerftConfig, rank=rank, alpha=2 * rank, **settings)


def pt_moe(**settings: Any) -> Callable[[PreTrainedModel], nn.Module]:
    return peft(PTMoeConfig, **settings)


def mixlora(base: PreTrainedModel) -> nn.Module:
    from axolotl.integrations.mixlora.patching import patch_model_with_mixlora
    from axolotl.utils.dict import DictDefault

    keys = {"mixlora_num_experts": 8, "mixlora_top_k": 2, "lora_r": 4, "lora_alpha": 8}
    patch_model_with_mixlora(base.requires_grad_(False), DictDefault(keys))
    return base


def mixlora_loss(model: nn.Module) -> Tensor:
    from axolotl.integrations.mixlora.loss import collect_mixlora_aux_loss

    return collect_mixlora_aux_loss(model, 0.01)


EXPERT_WEIGHTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
PAPER = {"center_router_input": False, "top_k": 1}
ROUTED = {"num_experts": 8, "num_experts_per_tok": 2}
METHODS = {
    "frozen MoE": Method("model"),
    # at about the trainable parameters of PERFT-R
    "PERFT-R": Method("model", perft(16, **ROUTED)),
    "PERFT-E": Method("model", perft(32, variant="embedded")),
    "PERFT-D": Method("model", perft(16, variant="dense", num_experts=8)),
    "PERFT-S": Method("model", perft(128, variant="single")),
    "LoRA, attention": Method("model", lora(38, target_modules=ATTENTION)),
    "LoRA, experts": Method("model", lora(6, **EXPERT_WEIGHTS)),
    # by how much its routers are balanced; 0.01 above
    "PERFT-R, coefficient 0": Method("model", perft(16, **ROUTED, router_aux_loss_coef=0.0), "PERFT-R"),
    "PERFT-R, coefficient 0.001": Method("model", perft(16, **ROUTED, router_aux_loss_coef=1e-3), "PERFT-R"),
    "PERFT-R, coefficient 0.1": Method("model", perft(16, **ROUTED, router_aux_loss_coef=0.1), "PERFT-R"),
    # at about its activated ones; PERFT-D's two adapters of rank 16, which have no gate, are PERFT-S's one of 32
    "PERFT-E, activated": Method("model", perft(16, variant="embedded"), "PERFT-E"),
    "PERFT-S, activated": Method("model", perft(32, variant="single"), "PERFT-S"),
    "LoRA, attention, activated": Method("model", lora(10, target_modules=ATTENTION), "LoRA, attention"),
    "LoRA, experts, activated": Method("model", lora(3, **EXPERT_WEIGHTS), "LoRA, experts"),
    "frozen dense": Method("dense"),
    "LoRA r1, q and v": Method("dense", lora(1, target_modules=["q_proj", "v_proj"])),
    "LoRA r16, q and v": Method("dense", lora(16, target_modules=["q_proj", "v_proj"])),
    "TT-LoRA": Method("dense", peft(TTLoraConfig, rank=10)),
    "PT": Method("dense", pt_moe(num_virtual_tokens=36, num_experts=1, rank=None)),
    "DPT": Method("dense", pt_moe(num_virtual_tokens=36, num_experts=1, rank=34)),
    "SMoP": Method("dense", pt_moe(num_virtual_tokens=17, num_experts=2, rank=None, **PAPER)),
    "PT-MoE": Method("dense", pt_moe(num_virtual_tokens=36, num_experts=2, rank=30)),
    "PT-MoE, 3 experts": Method("dense", pt_moe(num_virtual_tokens=36, num_experts=3, rank=28)),
    "PT-MoE, the paper's router": Method("dense", pt_moe(num_virtual_tokens=36, num_experts=2, rank=30, **PAPER)),
    "PERFT-R beside MLPs": Method("dense", perft(16, target_modules="mlp", **ROUTED)),
    "MixLoRA": Method("dense", mixlora, loss=mixlora_loss),
}
