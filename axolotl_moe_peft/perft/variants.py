"""The paper's variants: how many units a block gets, and what they add to it.

A variant adds to the output of the block, or inside it to that of the experts; x_TD is what the block, or the
experts, read. Shape suffixes: T tokens, D model width, N units, K units per token. E, k: the base block's experts and
experts per token.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ..shared.routing import Routing, router_logits, top_k_routing
from .block import FeedForward
from .config import PerftConfig, num_kept
from .moe_families import BaseRouting, Family
from .probe import base_weights_per_tok, embedded_sizes
from .units import Units


class Sizes(NamedTuple):
    """Of an adapter in one block.

    Attributes:
        num_experts: N.
        num_active: how many of them a token passes through at most.
        width: of what they read.
        unit_of_expert: where only some of the base's experts have a unit: of each expert its unit, N for none.
    """

    num_experts: int
    num_active: int
    width: int
    unit_of_expert: list[int] | None = None


class BlockAdapter(NamedTuple):
    """An adapter in one block.

    Attributes:
        units: its N units.
        router_ND: its own router, float32; None where the variant has none.
        norm_topk_prob: whether the weights of that router's K choices sum to one.
        family: of the block.
        unit_of_expert_E: int64, `Sizes.unit_of_expert`; None where every base expert has a unit.
    """

    units: Units
    router_ND: Tensor | None
    norm_topk_prob: bool
    family: Family
    unit_of_expert_E: Tensor | None = None

    @property
    def config(self) -> PerftConfig:
        return self.units.config


class Addition(NamedTuple):
    """What an adapter adds to a block.

    Attributes:
        delta_TD: (T, D); None where it has been added inside the block.
        routing: what the adapter's own router decided, if it has one.
    """

    delta_TD: Tensor | None
    routing: Routing | None = None


class Variant(Protocol):
    """One of the paper's variants."""

    def sizes(self, config: PerftConfig, block: FeedForward) -> Sizes:
        """The adapter's sizes in a block.

        Raises:
            ValueError: the block does not go with the configuration.
        """

    def add_to_block(self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting) -> Addition:
        """What is added to the block's output."""

    def add_to_experts(self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting) -> Tensor | None:
        """What is added to the experts' output, (T, width); None for nothing."""


class AlwaysOn:
    """PERFT-D and PERFT-S: the sum of all units, whatever the token."""

    def sizes(self, config: PerftConfig, block: FeedForward) -> Sizes:
        num_experts = config.num_experts or 1
        return Sizes(num_experts, num_experts, block.hidden_size)

    def add_to_block(self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting) -> Addition:
        return Addition(adapter.units.always_on(x_TD))

    def add_to_experts(self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting) -> None:
        return None


class Routed:
    """PERFT-R: a router of the adapter's own chooses K of its N units."""

    def sizes(self, config: PerftConfig, block: FeedForward) -> Sizes:
        if config.gate_weights == "base":
            base_top_k = base_weights_per_tok(block)
            if config.num_experts_per_tok > base_top_k:
                raise ValueError(
                    f"perft.gate_weights: base lends each token the base router's {base_top_k} weights, but "
                    f"num_experts_per_tok is {config.num_experts_per_tok}. Use at most {base_top_k}, or "
                    "`gate_weights: own`."
                )
        return Sizes(config.num_experts, config.num_experts_per_tok, block.hidden_size)

    def add_to_block(self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting) -> Addition:
        logits_TN = router_logits(x_TD, adapter.router_ND)
        num_active = adapter.config.num_experts_per_tok
        weights_TK, indices_TK = top_k_routing(logits_TN, num_active, adapter.norm_topk_prob)
        if adapter.config.gate_weights == "base":
            # 0 *: the own router stays in the graph, as DDP demands, with the gradient 0 of the authors' code
            ranked_TK = routing.weights_TK.sort(dim=-1, descending=True).values
            weights_TK = ranked_TK[:, :num_active] + 0 * weights_TK
        delta_TD = adapter.units.routed(x_TD, weights_TK, indices_TK)
        return Addition(delta_TD, Routing(logits_TN, indices_TK))

    def add_to_experts(self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting) -> None:
        return None


class Embedded:
    """PERFT-E: one unit inside each of the E base experts, with the weight that the base router gives the expert.

    Or inside those that `expert_ids` names: a token's other experts are as they are in the base.
    """

    def sizes(self, config: PerftConfig, block: FeedForward) -> Sizes:
        num_experts, num_active, width = embedded_sizes(block)
        if config.rank_allocation is not None and config.num_slots > width:
            raise ValueError(
                f"perft.rank_allocation.max_rank: {config.num_slots} directions cannot be orthogonal in {block.name}, "
                f"whose experts read vectors of {width} numbers. Use at most {width}."
            )
        ids = adapted_experts(config, block.name, num_experts)
        if ids is None:
            return Sizes(num_experts, num_active, width)
        return Sizes(len(ids), min(num_active, len(ids)), width, units_of_experts(ids, num_experts))

    def add_to_block(self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting) -> Addition:
        if adapter.family.routing is None:
            return Addition(None)  # the experts' call has them
        return Addition(self._add(adapter, x_TD, routing, adapter.family.weights_scale_inputs))

    def add_to_experts(self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting) -> Tensor:
        return self._add(adapter, x_TD, routing)

    def _add(
        self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting, weights_scale_inputs: bool = False
    ) -> Tensor:
        indices_TK, unit_of_expert_E = routing.indices_TK, adapter.unit_of_expert_E
        if unit_of_expert_E is not None:
            indices_TK = unit_of_expert_E[indices_TK]
        partial = unit_of_expert_E is not None
        return adapter.units.routed(x_TD, routing.weights_TK, indices_TK, weights_scale_inputs, partial)


def adapted_experts(config: PerftConfig, block_name: str, num_experts: int) -> list[int] | None:
    """The experts of a block that have a unit, in the order of the units; None for all.

    Args:
        config: of the adapter.
        block_name: of the block.
        num_experts: E.

    Raises:
        ValueError: it is not said which, or they are not the block's, or not as many as `experts.keep` says.
    """
    if config.expert_ids is None:
        if config.experts is None:
            return None
        raise ValueError(
            f"perft.experts: {config.experts} says how many experts are adapted and not which. Without Axolotl count "
            "what the base router chooses, `axolotl_moe_peft.calibrate_experts(base, batches, keep)`, and give what "
            "that returns as `expert_ids`."
        )
    ids = config.expert_ids.get(block_name)
    if ids is None:
        raise ValueError(
            f"perft.expert_ids has no experts of {block_name}, only of {', '.join(config.expert_ids)}. Name some for "
            "every block, or leave its layer out with `layers_to_transform`."
        )
    if max(ids) >= num_experts:
        raise ValueError(
            f"perft.expert_ids: {max(ids)} is no expert of {block_name}, which has {num_experts}: 0 to "
            f"{num_experts - 1}."
        )
    if config.experts is not None and len(ids) != (kept := num_kept(config.experts["keep"], num_experts)):
        raise ValueError(
            f"perft.expert_ids: {len(ids)} experts of {block_name}, of whose {num_experts} `experts.keep: "
            f"{config.experts['keep']}` keeps {kept}. Leave one of the two out."
        )
    return None if ids == list(range(num_experts)) else ids


def units_of_experts(adapted: list[int], num_experts: int) -> list[int]:
    """Of each of E experts its unit, `len(adapted)` for none."""
    units = [len(adapted)] * num_experts
    for unit, expert in enumerate(adapted):
        units[expert] = unit
    return units


VARIANTS: dict[str, Variant] = {
    "routed": Routed(),
    "embedded": Embedded(),
    "dense": AlwaysOn(),
    "single": AlwaysOn(),
}
