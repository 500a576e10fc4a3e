"""Choosing the experts that get an adapter by what the base router chooses (MoE-Sieve, arXiv 2603.24044; ESFT).

Shape suffixes: T tokens (batch and sequence flattened), E base experts, k of them per token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..shared.precision import autocast_as_in_training
from .base_choices import BaseChoices, BaseRouters
from .block import MoeBlock
from .config import check_keep, num_kept
from .probe import embedded_sizes
from .selection import select_blocks

LOG = logging.getLogger(__name__)


def calibrate_experts(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    keep: float,
    target_modules: Sequence[str] | str | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
) -> dict[str, list[int]]:
    """The experts of each MoE block that the base router chooses most: `PerftConfig.expert_ids`.

    Args:
        model: the base model, without an adapter. It reads the batches once, in evaluation mode and without gradients.
        batches: what its decoder is called with: input_ids (B, S) and, where rows are padded, attention_mask (B, S).
            Padding does not count; labels are left out.
        keep: share of a block's experts, above 0 and up to 1; rounded up.
        target_modules, layers_to_transform: the blocks, as in PerftConfig.

    Returns:
        ceil(keep * E) experts for each block's name, in order; of equally used ones the first.

    Raises:
        ValueError: `keep` is out of range, the choices of a block's router cannot be seen, or no token has reached it.
    """
    check_keep(keep)
    blocks = select_blocks(model, target_modules, layers_to_transform)
    counts = count_choices(model, batches, blocks)
    for name, counts_E in counts.items():
        if not counts_E.any():
            raise ValueError(
                f"perft.experts: no token has reached {name} in calibration, so that its experts cannot be told "
                "apart. Give rows that are not empty, or leave such layers out with `layers_to_transform`."
            )
    ids = {name: _most_used(counts_E, keep) for name, counts_E in counts.items()}
    shares = {name: (counts[name][ids[name]].sum() / counts[name].sum()).item() for name in ids}
    least = min(shares, key=shares.__getitem__)
    LOG.info(
        "perft: the %s most used experts of each of %d blocks are adapted; they have %.1f %% of the base router's "
        "choices on average, %.1f %% in %s, where they have least",
        " to ".join(map(str, sorted({len(chosen) for chosen in ids.values()}))),
        len(ids),
        100 * sum(shares.values()) / len(shares),
        100 * shares[least],
        least,
    )
    return ids


def first_experts(
    model: nn.Module,
    keep: float,
    target_modules: Sequence[str] | str | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
) -> dict[str, list[int]]:
    """As many experts of each block as `calibrate_experts` would name, for a model without weights."""
    blocks = select_blocks(model, target_modules, layers_to_transform)
    return {block.name: _most_used(torch.zeros(embedded_sizes(block)[0]), keep) for block in blocks}


def _most_used(counts_E: Tensor, keep: float) -> list[int]:
    kept = num_kept(keep, len(counts_E))
    return sorted(counts_E.sort(descending=True, stable=True).indices[:kept].tolist())


@torch.no_grad()
def count_choices(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], blocks: Sequence[MoeBlock]
) -> dict[str, Tensor]:
    """How often the router of each block chooses each expert for a real token: int64 (E,) on the CPU, by name.

    Raises:
        ValueError: the choices of a block's router cannot be seen.
    """
    embeddings, routers = model.get_input_embeddings().weight, BaseRouters(model)
    counts = {block.name: torch.zeros(embedded_sizes(block)[0], dtype=torch.int64) for block in blocks}
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with routers.watch():
            for batch in batches:
                given = {name: value.to(embeddings.device) for name, value in batch.items() if name != "labels"}
                with autocast_as_in_training(embeddings):
                    model.get_decoder()(**given, use_cache=False)
                for name, choices in routers.read().items():
                    if name in counts and choices is not None:
                        counts[name] = counts[name] + _count(choices, given.get("attention_mask"))
    finally:
        for module, training in was_training.items():
            module.training = training
    return counts


def _count(choices: BaseChoices, attention_mask: Tensor | None) -> Tensor:
    counted_TK = torch.ones_like(choices.indices_TK, dtype=torch.int64)
    if choices.chosen_TK is not None:
        counted_TK = counted_TK * choices.chosen_TK
    if attention_mask is not None:
        counted_TK = counted_TK * (attention_mask.to(counted_TK.device).flatten() > 0).unsqueeze(-1)
    counts_E = counted_TK.new_zeros(choices.num_experts)
    return counts_E.index_add(0, choices.indices_TK.flatten(), counted_TK.flatten()).cpu()
