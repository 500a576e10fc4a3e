"""What adapters can go beside: dense MLPs, and MoE blocks, of which it is read what their routers and experts say.

The standard interface (Mixtral, OLMoE, Qwen3-MoE and most others): a module with a router, called `gate` or `router`,
and a module `experts` that is called with (hidden_states (T, D), indices (T, k), weights (T, k)). The router returns
them too, next to each other, with its logits (T, E) beyond the weights; or only the logits. What departs from this is
in moe_families.py. T tokens, E base experts, k of them per token, D model width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .moe_families import STANDARD, BaseRouting, Family


class ExpertsCall(NamedTuple):
    """What reaches the experts: their input (T, width) and the routing."""

    hidden_states: Tensor
    routing: BaseRouting


def layer_index(name: str) -> int | None:
    """The first number in the name of a module, i.e. its decoder layer."""
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(number[1]) if number else None


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """A feed-forward part of a layer, which adapters can go beside.

    Attributes:
        name: its full name in the model.
        module: the part itself.
        config: of the innermost model of transformers around it: the text's, or that of a vision tower.
        reads_text: whether it is part of the decoder and sees the tokens of the batch; not so in a vision tower.
    """

    name: str
    module: nn.Module
    config: Any
    reads_text: bool = True

    @property
    def layer_index(self) -> int | None:
        """The first number in the name, i.e. the decoder layer."""
        return layer_index(self.name)

    @property
    def parent_name(self) -> str:
        """Full name of the module that holds the block."""
        return self.name.rpartition(".")[0]

    @property
    def hidden_size(self) -> int:
        """D, the width of what the block reads and returns."""
        return self.config.hidden_size


@dataclass(frozen=True, kw_only=True)
class DenseMlp(FeedForward):
    """The MLP of a dense layer; it has nothing that families could differ in."""

    family: ClassVar[Family] = STANDARD

    @property
    def norm_topk_prob(self) -> bool:
        """Whether an adapter's K weights sum to one where nothing is said of it: there is no base router to follow."""
        return True


@dataclass(frozen=True, kw_only=True)
class MoeBlock(FeedForward):
    """One MoE block of a base model.

    Its `module` is, where a decoder layer holds router and experts beside other things (Gemma 4), the experts: their
    input is what an adapter must see, and their output what it adds to.

    Attributes:
        router, experts: its children; experts is None where they are no module (JetMoe).
        family: what is special about it.
    """

    router: nn.Module
    experts: nn.Module | None
    family: Family

    @property
    def norm_topk_prob(self) -> bool:
        """Whether the base router's k weights sum to one. Families without the configuration's field mostly do so."""
        if self.family.norm_topk_prob is not None:
            return self.family.norm_topk_prob(self.module)
        return bool(getattr(self.config, "norm_topk_prob", True))

    def read_router(self, output: Any) -> BaseRouting:
        """What the router returned, as far as it can be told."""
        if self.family.routing is not None:
            return self.family.routing(self.module, output)
        if isinstance(output, Tensor):
            return BaseRouting(logits_TE=output)
        if not isinstance(output, (tuple, list)):
            return BaseRouting()
        integers = [i for i, t in enumerate(output) if isinstance(t, Tensor) and not t.is_floating_point()]
        if len(integers) != 1:
            return BaseRouting()
        at, step = integers[0], -1 if integers[0] else 1  # indices first: the order is reversed (Granite)
        logits_at = at + 2 * step
        logits_TE = output[logits_at] if 0 <= logits_at < len(output) else None
        return self._experts_only(BaseRouting(logits_TE, output[at + step], output[at]))

    def read_experts_call(self, args: tuple, kwargs: dict[str, Any], routing: BaseRouting) -> ExpertsCall | None:
        """What the experts are called with; None if that is not hidden states with indices and weights."""
        hidden_states, *choice = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        indices = [t for t in choice if not t.is_floating_point()]
        if len(choice) != 2 or len(indices) != 1:
            return None
        weights = next(t for t in choice if t.is_floating_point())
        routing = self._experts_only(routing._replace(weights_TK=weights, indices_TK=indices[0]))
        return ExpertsCall(hidden_states, routing)

    def _experts_only(self, routing: BaseRouting) -> BaseRouting:
        """Give choices of outputs that are no experts the weight 0."""
        if self.family.num_experts is None:
            return routing
        real = routing.indices_TK < self.family.num_experts(self.module)
        return routing._replace(weights_TK=routing.weights_TK * real, indices_TK=routing.indices_TK * real)
