"""What is special about some MoE families; everything else is read off a block's structure (block.py, probe.py).

Shape suffixes: T tokens, E base experts, k of them per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class BaseRouting(NamedTuple):
    """What is known of a base router's decisions about T tokens.

    Attributes:
        logits_TE: raw logits, (T, E) or wider where the router also chooses among outputs that are no experts.
        weights_TK: (T, k), as they are applied to the experts' outputs (or inputs: `Family.weights_scale_inputs`).
        indices_TK: (T, k), int64.
    """

    logits_TE: Tensor | None = None
    weights_TK: Tensor | None = None
    indices_TK: Tensor | None = None


@dataclass(frozen=True)
class Family:
    """How a family's MoE block departs from the standard interface.

    Attributes:
        routing: (block, what its router returned) to BaseRouting, where the experts are not called with indices and
            weights. Nothing but a sum comes between such experts and the block's output.
        weights_scale_inputs: the weights are applied to what goes into the experts.
        num_experts: number of experts behind the router's first outputs, where its last outputs are no experts.
        norm_topk_prob: whether a token's weights sum to one, where the configuration has no field of that name and
            they do not, or not always.
    """

    routing: Callable[[nn.Module, Any], BaseRouting] | None = None
    weights_scale_inputs: bool = False
    num_experts: Callable[[nn.Module], int] | None = None
    norm_topk_prob: Callable[[nn.Module], bool] | None = None


def _routed_by_experts(block: nn.Module, logits_TE: Tensor) -> BaseRouting:
    indices_TK, weights_TK = block.experts.route_tokens_to_experts(logits_TE)
    return BaseRouting(logits_TE, weights_TK, indices_TK)


def _jetmoe(block: nn.Module, output: tuple[Tensor, Tensor, Tensor, list[int], Tensor]) -> BaseRouting:
    order_S, _, weights_S, counts, logits_TE = output  # choices sorted by expert
    experts_S = torch.arange(len(counts), device=order_S.device).repeat_interleave(
        torch.tensor(counts, device=order_S.device)
    )
    unsorted = order_S.argsort()
    shape = (len(logits_TE), -1)
    return BaseRouting(logits_TE, weights_S[unsorted].view(shape), experts_S[unsorted].view(shape))


def _llama4(block: nn.Module, output: tuple[Tensor, Tensor]) -> BaseRouting:
    scores_TE, logits_TE = output  # scores are 0 but for the k chosen
    weights_TK, indices_TK = scores_TE.topk(block.router.top_k, dim=-1)
    return BaseRouting(logits_TE, weights_TK, indices_TK)


# functions with names, not lambdas: a model with adapters can be pickled where the bare one can
def _never(block: nn.Module) -> bool:
    return False


def _dbrx_norm_topk_prob(block: nn.Module) -> bool:
    return block.moe_normalize_expert_weights == 1


def _longcat_num_experts(block: nn.Module) -> int:
    return block.experts.num_routed_experts


def _zaya_num_experts(block: nn.Module) -> int:
    return block.experts.num_experts


STANDARD = Family()

# by the class name of the block
FAMILIES = {
    "DbrxFFN": Family(norm_topk_prob=_dbrx_norm_topk_prob),
    "InklingMoE": Family(norm_topk_prob=_never),  # they sum to one together with the shared experts' weights
    "JambaSparseMoeBlock": Family(norm_topk_prob=_never),
    "JetMoeMoE": Family(routing=_jetmoe),
    "Llama4TextMoe": Family(routing=_llama4, weights_scale_inputs=True, norm_topk_prob=_never),
    # "zero" experts return their input
    "LongcatFlashMoE": Family(num_experts=_longcat_num_experts, norm_topk_prob=_never),
    "PhimoeSparseMoeBlock": Family(norm_topk_prob=_never),
    # the last output skips the experts
    "ZayaSparseMoeBlock": Family(num_experts=_zaya_num_experts, norm_topk_prob=_never),
}
# experts that are called with logits and choose themselves: Aria, until transformers 5.18 gave it a standard router
ROUTED_BY_EXPERTS = Family(routing=_routed_by_experts)


def family_of(block: nn.Module) -> Family:
    """The table's entry for a block; subclasses share it."""
    if hasattr(getattr(block, "experts", None), "route_tokens_to_experts"):
        return ROUTED_BY_EXPERTS
    return next((FAMILIES[cls.__name__] for cls in type(block).__mro__ if cls.__name__ in FAMILIES), STANDARD)
