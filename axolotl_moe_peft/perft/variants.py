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
from .config import PerftConfig
from .moe_families import BaseRouting, Family
from .probe import base_weights_per_tok, embedded_sizes
from .units import Units


class Sizes(NamedTuple):
    """Of an adapter in one block: N, how many of them a token passes through, and the width of what they read."""

    num_experts: int
    num_active: int
    width: int


class BlockAdapter(NamedTuple):
    """An adapter in one block.

    Attributes:
        units: its N units.
        router_ND: its own router, float32; None where the variant has none.
        norm_topk_prob: whether the weights of that router's K choices sum to one.
        family: of the block.
    """

    units: Units
    router_ND: Tensor | None
    norm_topk_prob: bool
    family: Family

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
    """PERFT-E: one unit inside each of the E base experts, with the weight that the base router gives the expert."""

    def sizes(self, config: PerftConfig, block: FeedForward) -> Sizes:
        return Sizes(*embedded_sizes(block))

    def add_to_block(self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting) -> Addition:
        if adapter.family.routing is None:
            return Addition(None)  # the experts' call has them
        _, weights_TK, indices_TK = routing
        return Addition(adapter.units.routed(x_TD, weights_TK, indices_TK, adapter.family.weights_scale_inputs))

    def add_to_experts(self, adapter: BlockAdapter, x_TD: Tensor, routing: BaseRouting) -> Tensor:
        return adapter.units.routed(x_TD, routing.weights_TK, routing.indices_TK)


VARIANTS: dict[str, Variant] = {
    "routed": Routed(),
    "embedded": Embedded(),
    "dense": AlwaysOn(),
    "single": AlwaysOn(),
}
