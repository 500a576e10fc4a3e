"""Counts of what routers chose, by the dataset that a token or a sequence is from, and by the token.

Shape suffixes: T tokens of a batch (B * S), K experts per token, N experts, D datasets, V tokens of the vocabulary
that are looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokensOfBatch:
    """Where a batch's tokens are from.

    Attributes:
        datasets_T: int64 (T,), number of each token's dataset; -1 for padding.
        words_T: int64 (T,), place of each token among those that are looked at; -1 for the others and padding.
    """

    datasets_T: Tensor
    words_T: Tensor


class TokenCounts:
    """How often tokens of each dataset, and certain tokens, were sent to each expert of one layer's router.

    Args:
        num_datasets, num_words: D and V.
    """

    def __init__(self, num_datasets: int, num_words: int) -> None:
        self._sizes = (num_datasets, num_words)
        self.by_dataset_DN: Tensor | None = None
        self.by_word_VN: Tensor | None = None
        self.num_active = 0

    def add(
        self, tokens: TokensOfBatch, indices_TK: Tensor, num_experts: int, chosen_TK: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            tokens: of the batch.
            indices_TK: the experts that the router chose, int64 (T, K).
            num_experts: N.
            chosen_TK: bool (T, K), false where a choice is none; None: all are.
        """
        self.num_active = indices_TK.shape[1]
        counts = []
        for places_T, size in zip((tokens.datasets_T, tokens.words_T), self._sizes):
            places_T1 = torch.where(places_T < 0, size, places_T).to(indices_TK.device).unsqueeze(1)
            cells_TK = places_T1 * num_experts + indices_TK
            if chosen_TK is not None:
                cells_TK = torch.where(chosen_TK, cells_TK, size * num_experts)
            flat = torch.bincount(cells_TK.flatten(), minlength=(size + 1) * num_experts)
            counts.append(flat.view(size + 1, num_experts)[:size])
        by_dataset_DN, by_word_VN = counts
        self.by_dataset_DN = by_dataset_DN if self.by_dataset_DN is None else self.by_dataset_DN + by_dataset_DN
        self.by_word_VN = by_word_VN if self.by_word_VN is None else self.by_word_VN + by_word_VN


def typical_words(counts_VN: Tensor, expert: int, most: int) -> list[tuple[int, int, float]]:
    """The rows that say most of an expert: those with the largest part in the information of row about expert.

    A row's part is n log(p(expert | row) / p(expert)) with n, how often the expert was chosen for it: large for what
    is both frequent and sent to this expert more than other rows are.

    Args:
        counts_VN: how often each expert was chosen for each row, (V, N).
        expert: which one.
        most: of them.

    Returns:
        (row, how often it was sent to the expert, share of its choices), the most typical first.
    """
    counts_VN = counts_VN.double()
    chosen_V, all_V = counts_VN[:, expert], counts_VN.sum(1)
    total = all_V.sum().clamp(min=1)
    lift_V = (chosen_V / all_V.clamp(min=1)) / (chosen_V.sum() / total).clamp(min=1e-12)
    parts_V = torch.where(chosen_V > 0, chosen_V * lift_V.clamp(min=1e-12).log(), 0.0)
    best = parts_V.topk(min(most, len(parts_V)))
    return [
        (row, int(chosen_V[row]), (chosen_V[row] / all_V[row]).item())
        for part, row in zip(best.values.tolist(), best.indices.tolist())
        if part > 0
    ]


def divergence(counts_DN: Tensor) -> float:
    """How far apart datasets are in their use of experts: 0, all alike, to 1, no two share an expert.

    The Jensen-Shannon divergence of their usage, each dataset with the same weight, by its largest value: log of the
    number of datasets, or of experts if these are fewer. 0 with fewer than two of either.
    """
    used_DN = counts_DN[counts_DN.sum(1) > 0].double()
    most = math.log(max(min(used_DN.shape), 1))
    if most == 0:
        return 0.0
    share_DN = used_DN / used_DN.sum(1, keepdim=True)
    of_mean = torch.special.entr(share_DN.mean(0)).sum()
    return max(0.0, ((of_mean - torch.special.entr(share_DN).sum(1).mean()) / most).item())


def rounded(value: Any) -> Any:
    """Numbers of a nested list with six digits."""
    return [rounded(v) for v in value] if isinstance(value, list) else round(value, 6)
