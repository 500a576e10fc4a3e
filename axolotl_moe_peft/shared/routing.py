"""Top-k routing and the router losses, shared by every method of the package.

Shape suffixes: T tokens, N experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def load_balancing_loss(
    layers_logits: Sequence[Tensor], num_experts_per_tok: int, token_mask_T: Tensor | None = None
) -> Tensor:
    """Load-balancing loss N * sum_e f_e p_e (Switch Transformer, eq. 4, for top-k).

    f_e is the number of choices of expert e per token (no gradient), p_e its mean probability. The value is K when
    the load is balanced, and the constant K when K = N. Several layers' logits are pooled before the product, as
    transformers and PERFT's authors do; hand over one layer at a time for a loss in which layers cannot cancel.

    Args:
        layers_logits: raw router logits of one or more layers over the same tokens, each (T, N).
        num_experts_per_tok: K.
        token_mask_T: bool (T,), true for real tokens; None counts every token.

    Returns:
        0-dim float32 tensor; 0 if no token is real.
    """
    logits_TN = torch.cat(list(layers_logits)).float()
    num_tokens, num_experts = logits_TN.shape
    probs_TN = logits_TN.softmax(dim=-1)
    chosen_TN = torch.zeros_like(probs_TN).scatter_(-1, probs_TN.topk(num_experts_per_tok, dim=-1).indices, 1.0)
    if token_mask_T is None:
        return num_experts * (chosen_TN.sum(0) @ probs_TN.sum(0)) / num_tokens**2
    mask_T = token_mask_T.to(probs_TN.dtype).repeat(len(layers_logits))
    return num_experts * ((mask_T @ chosen_TN) @ (mask_T @ probs_TN)) / mask_T.sum().clamp(min=1) ** 2


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
        return z_T.mean()
    mask_T = token_mask_T.to(z_T.dtype)
    return (mask_T @ z_T) / mask_T.sum().clamp(min=1)


def expert_counts(indices_TK: Tensor, num_experts: int, token_mask_T: Tensor | None = None) -> Tensor:
    """How often each expert was chosen by a real token: float32 (N,)."""
    weights_TK = torch.ones_like(indices_TK, dtype=torch.float32)
    if token_mask_T is not None:
        weights_TK = weights_TK * token_mask_T.unsqueeze(-1)
    counts_N = weights_TK.new_zeros(num_experts)
    return counts_N.index_add_(0, indices_TK.flatten(), weights_TK.flatten())


def usage_figures(counts_LN: Tensor) -> dict[str, float]:
    """Three bounded figures of how the experts were used, averaged over L layers.

    Args:
        counts_LN: choices per expert, (L, N).

    Returns:
        `expert_entropy` (1 = uniform, 0 = one expert; 1 where N is 1), `expert_max_share` (1/N .. 1) and
        `expert_used_fraction` (0 .. 1).
    """
    share_LN = counts_LN / counts_LN.sum(-1, keepdim=True).clamp(min=1)
    num_experts = counts_LN.shape[-1]
    if num_experts == 1:
        entropy_L = torch.ones(len(counts_LN))
    else:
        entropy_L = torch.special.entr(share_LN).sum(-1) / torch.tensor(float(num_experts)).log()
    return {
        "expert_entropy": entropy_L.mean().item(),
        "expert_max_share": share_LN.amax(-1).mean().item(),
        "expert_used_fraction": (counts_LN > 0).float().mean().item(),
    }
