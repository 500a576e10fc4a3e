"""The paper's variants: how many units a block gets, and what they add to it.

A variant adds to the output of the block, or inside it to that of the experts; x_TD is what the block, or the
experts, read. Shape suffixes: T tokens, D model width, N units, K units per token. E, k: the base block's experts and
experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from ..shared.routing import Routing, router_logits, top_k_routing
from .block import MoeBlock
from .config import PerftConfig
from .moe_families import BaseRouting
from .probe import base_weights_per_tok, embedded_sizes

if TYPE_CHECKING:
    from .layer import PerftLayer


class Sizes(NamedTuple):
    """Of an adapter in one block: N, how many of them a token passes through, and the width of what they read."""

    num_experts: int
    num_active: int
    width: int


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

    def sizes(self, config: PerftConfig, block: MoeBlock) -> Sizes:
        """The adapter's sizes in a block.

        Raises:
            ValueError: the block does not go with the configuration.
        """

    def add_to_block(self, layer: PerftLayer, adapter_name: str, x_TD: Tensor, routing: BaseRouting) -> Addition:
        """What is added to the block's output."""

    def add_to_experts(
        self, layer: PerftLayer, adapter_name: str, x_TD: Tensor, routing: BaseRouting
    ) -> Tensor | None:
        """What is added to the experts' output, (T, width); None for nothing."""


class AlwaysOn:
    """PERFT-D and PERFT-S: the sum of all units, whatever the token."""

    def sizes(self, config: PerftConfig, block: MoeBlock) -> Sizes:
        num_experts = config.num_experts or 1
        return Sizes(num_experts, num_experts, block.hidden_size)

    def add_to_block(self, layer: PerftLayer, adapter_name: str, x_TD: Tensor, routing: BaseRouting) -> Addition:
        return Addition(layer.units(adapter_name).always_on(x_TD))

    def add_to_experts(self, layer: PerftLayer, adapter_name: str, x_TD: Tensor, routing: BaseRouting) -> None:
        return None


class Routed:
    """PERFT-R: a router of the adapter's own chooses K of its N units."""

    def sizes(self, config: PerftConfig, block: MoeBlock) -> Sizes:
        if config.gate_weights == "base":
            base_top_k = base_weights_per_tok(block)
            if config.num_experts_per_tok > base_top_k:
                raise ValueError(
                    f"perft.gate_weights: base lends each token the base router's {base_top_k} weights, but "
                    f"num_experts_per_tok is {config.num_experts_per_tok}. Use at most {base_top_k}, or "
                    "`gate_weights: own`."
                )
        return Sizes(config.num_experts, config.num_experts_per_tok, block.hidden_size)

    def add_to_block(self, layer: PerftLayer, adapter_name: str, x_TD: Tensor, routing: BaseRouting) -> Addition:
        config = layer.perft_config[adapter_name]
        logits_TN = router_logits(x_TD, layer.perft_router[adapter_name])
        num_active = config.num_experts_per_tok
        weights_TK, indices_TK = top_k_routing(logits_TN, num_active, layer.norm_topk_prob[adapter_name])
        if config.gate_weights == "base":
            # 0 *: the own router stays in the graph, as DDP demands, with the gradient 0 of the authors' code
            ranked_TK = routing.weights_TK.sort(dim=-1, descending=True).values
            weights_TK = ranked_TK[:, :num_active] + 0 * weights_TK
        delta_TD = layer.units(adapter_name).routed(x_TD, weights_TK, indices_TK)
        return Addition(delta_TD, Routing(logits_TN, indices_TK))

    def add_to_experts(self, layer: PerftLayer, adapter_name: str, x_TD: Tensor, routing: BaseRouting) -> None:
        return None


class Embedded:
    """PERFT-E: one unit inside each of the E base experts, with the weight that the base router gives the expert."""

    def sizes(self, config: PerftConfig, block: MoeBlock) -> Sizes:
        return Sizes(*embedded_sizes(block))

    def add_to_block(self, layer: PerftLayer, adapter_name: str, x_TD: Tensor, routing: BaseRouting) -> Addition:
        family = layer.block.family
        if family.routing is None:
            return Addition(None)  # the experts' call has them
        units, (_, weights_TK, indices_TK) = layer.units(adapter_name), routing
        return Addition(units.routed(x_TD, weights_TK, indices_TK, family.weights_scale_inputs))

    def add_to_experts(self, layer: PerftLayer, adapter_name: str, x_TD: Tensor, routing: BaseRouting) -> Tensor:
        return layer.units(adapter_name).routed(x_TD, routing.weights_TK, routing.indices_TK)


VARIANTS: dict[str, Variant] = {
    "routed": Routed(),
    "embedded": Embedded(),
    "dense": AlwaysOn(),
    "single": AlwaysOn(),
}
