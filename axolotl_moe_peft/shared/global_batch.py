"""The load of routers over an optimiser step, for a balance loss that lets a micro-batch be of one kind."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.distributed as dist
from torch import Tensor

from .routing import Routing, expert_counts
from .trainer_step import TrainerStep


class GlobalBatch:
    """How the experts were chosen in an optimiser step: in its micro-batches so far, and in all processes.

    Later micro-batches are not known when the gradient of an earlier one is computed (Qiu et al., arXiv 2501.11873,
    section 3, do the same). Outside a Trainer a forward pass is a step.
    """

    def __init__(self) -> None:
        self._step: tuple[int, int] | None = None
        self._counts: dict[Hashable, Tensor] = {}  # by router: choices per expert, and tokens, (N + 1,)

    def load(
        self, router: Hashable, step: TrainerStep | None, routing: Routing, token_mask_T: Tensor | None
    ) -> Tensor:
        """Add a router's choices in one micro-batch; every process must call.

        Returns:
            Choices per token of each expert in the global batch so far, float32 (N,).
        """
        number = None if step is None else (id(step.trainer), step.trainer.state.global_step)
        if number is None or number != self._step:
            self._step, self._counts = number, {}
        num_experts, logits_TN = routing.logits_TN.shape[-1], routing.logits_TN
        tokens = logits_TN.new_full((1,), len(logits_TN), dtype=torch.float32)
        if token_mask_T is not None:
            tokens = token_mask_T.sum(0, keepdim=True, dtype=torch.float32)
        counts = torch.cat([expert_counts(routing.indices_TK, num_experts, token_mask_T), tokens])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        counts = self._counts[router] = self._counts.get(router, 0) + counts
        return counts[:-1] / counts[-1].clamp(min=1)
