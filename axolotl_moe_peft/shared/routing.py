"""A router, whatever it routes: float32 logits, top-k, and the router losses.

A new router loss is a function in ROUTER_LOSSES, the field of a config that is called as it is with `_coef` behind,
and a row of the README.

Shape suffixes: T tokens (or sequences, where a router chooses for a whole one), N experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .linear import linear
from .precision import without_autocast

_P, _R = ParamSpec("_P"), TypeVar("_R")


def in_float32(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function without autocast, which would compute its matrix products in bf16 or fp16.

    In bf16 a router at the usual learning rates hardly moves, near ties flip, and its losses are off by 1 %; in fp16
    sums over a batch are infinite.
    """

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = (x[0] if isinstance(x, (list, tuple)) else x for x in (*args, *kwargs.values()))
        device = next(x.device for x in given if isinstance(x, Tensor))
        with without_autocast(device):
            return function(*args, **kwargs)

    return wrapper


@in_float32
def router_logits(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Score the experts for each token: float32 (T, N), whatever the dtypes and autocast say."""
    return linear(x_TD, weight_ND.float(), None if bias_N is None else bias_N.float())


@in_float32
def top_k_routing(logits_TN: Tensor, num_experts_per_tok: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Choose K experts for each token: softmax over all N, then top-k.

    Args:
        logits_TN: raw router logits, (T, N).
        num_experts_per_tok: K.
        norm_topk_prob: divide the K weights by their sum.

    Returns:
        weights (T, K), float32 and sorted descending, and expert indices (T, K), int64.
    """
    # float32: bf16 probabilities tie, and then the choice depends on the kernel
    probs_TN = logits_TN.float().softmax(dim=-1)
    weights_TK, indices_TK = probs_TN.topk(num_experts_per_tok, dim=-1)
    if norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, indices_TK


@in_float32
def balance_loss(
    scores_TN: Tensor, indices_TK: Tensor, token_mask_T: Tensor | None = None, load_N: Tensor | None = None
) -> Tensor:
    """Load-balancing loss N * sum_e f_e p_e of a router that chose these experts by these scores.

    f_e is the number of choices of expert e per token (no gradient), p_e its mean share of a token's scores. Switch
    Transformer, eq. 4, for a softmax; DeepSeek-V3, eq. 17 to 20 (times K), for a sigmoid with or without groups and a
    correction bias, over the whole batch. The value is K when the load is balanced, and the constant K when K = N.

    Args:
        scores_TN: (T, N), at least 0, each token's with a sum above 0.
        indices_TK: int64 (T, K).
        token_mask_T: bool (T,), true for real tokens; None counts every token.
        load_N: f, (N,), where it is not that of these tokens.

    Returns:
        0-dim float32 tensor; 0 if no token is real.
    """
    num_tokens, num_experts = scores_TN.shape
    scores_TN = scores_TN.float()
    shares_TN = scores_TN / scores_TN.sum(dim=-1, keepdim=True)
    if token_mask_T is None:
        num_tokens, shares_N = max(num_tokens, 1), shares_TN.sum(0)
    else:
        mask_T = token_mask_T.float()
        num_tokens, shares_N = mask_T.sum().clamp(min=1), mask_T @ shares_TN
    if load_N is None:
        load_N = expert_counts(indices_TK, num_experts, token_mask_T) / num_tokens
    return num_experts * (load_N @ shares_N) / num_tokens


@in_float32
def load_balancing_loss(
    layers_logits: Sequence[Tensor], num_experts_per_tok: int, token_mask_T: Tensor | None = None
) -> Tensor:
    """`balance_loss` of softmax routers with top-k.

    Several layers' logits are pooled before the product, as transformers and PERFT's authors do; hand over one layer
    at a time for a loss in which layers cannot cancel.

    Args:
        layers_logits: raw router logits of one or more layers over the same tokens, each (T, N).
        num_experts_per_tok: K.
        token_mask_T: bool (T,), true for real tokens; None counts every token.

    Returns:
        0-dim float32 tensor; 0 if no token is real.
    """
    probs_TN = torch.cat(list(layers_logits)).float().softmax(dim=-1)
    indices_TK = probs_TN.topk(num_experts_per_tok, dim=-1).indices
    mask_T = None if token_mask_T is None else token_mask_T.repeat(len(layers_logits))
    return balance_loss(probs_TN, indices_TK, mask_T)


@in_float32
def router_z_loss(logits_TN: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Mean over the real tokens of logsumexp(logits)^2 (ST-MoE, eq. 5).

    Args:
        logits_TN: raw router logits, (T, N).
        token_mask_T: bool (T,), true for real tokens; None counts every token.

    Returns:
        0-dim float32 tensor; 0 if no token is real.
    """
    z_T = logits_TN.float().logsumexp(dim=-1).square()
    if token_mask_T is None:
        return z_T.sum() / max(len(z_T), 1)
    mask_T = token_mask_T.to(z_T.dtype)
    return (mask_T @ z_T) / mask_T.sum().clamp(min=1)


@dataclass(frozen=True)
class Routing:
    """What a router made of a batch.

    Attributes:
        logits_TN: raw logits, (T, N).
        indices_TK: the experts that it chose, int64 (T, K).
        scores_TN: what it chose by, (T, N), at least 0; None for a softmax of the logits.
        load_N: choices of each expert per token of a larger batch that this is a part of, (N,); None: it is the batch.
    """

    logits_TN: Tensor
    indices_TK: Tensor
    scores_TN: Tensor | None = None
    load_N: Tensor | None = None

    def balance_loss(self, token_mask_T: Tensor | None) -> Tensor:
        scores_TN = self.logits_TN.float().softmax(-1) if self.scores_TN is None else self.scores_TN
        return balance_loss(scores_TN, self.indices_TK, token_mask_T, self.load_N)

    def z_loss(self, token_mask_T: Tensor | None) -> Tensor:
        return router_z_loss(self.logits_TN, token_mask_T)


# The losses that act on a router, by their names: of a config's field, without `_coef`, and of the figure in the log.
ROUTER_LOSSES: dict[str, Callable[[Routing, Tensor | None], Tensor]] = {
    "router_aux_loss": Routing.balance_loss,
    "router_z_loss": Routing.z_loss,
}

# What the balance loss is over: a field of every config that has one, its values and its help.
SCOPES = ("micro_batch", "global_batch")
ROUTER_AUX_LOSS_SCOPE = (
    "What is to be balanced: every micro_batch for itself; or the global_batch, all micro-batches of an optimiser "
    "step so far in all processes, in which a micro-batch may be of one kind."
)


def acting_losses(config: Any, prefix: str = "") -> dict[str, float]:
    """The router losses whose coefficient in a method's config is not 0, by name, and the coefficients.

    Args:
        config: the method's config.
        prefix: `base_` for those on the base model's router.
    """
    coefs = {name: getattr(config, f"{prefix}{name}_coef", 0.0) for name in ROUTER_LOSSES}
    return {name: coef for name, coef in coefs.items() if coef}


def expert_counts(indices_TK: Tensor, num_experts: int, token_mask_T: Tensor | None = None) -> Tensor:
    """How often each expert was chosen by a real token: float32 (N,)."""
    weights_TK = torch.ones_like(indices_TK, dtype=torch.float32)
    if token_mask_T is not None:
        weights_TK = weights_TK * token_mask_T.unsqueeze(-1)
    counts_N = weights_TK.new_zeros(num_experts)
    return counts_N.index_add_(0, indices_TK.flatten(), weights_TK.flatten())
