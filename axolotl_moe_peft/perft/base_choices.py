"""What the base model's own routers choose, whichever adapter is attached.

Shape suffixes: T tokens, E base experts, k of them per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from .block import MoeBlock
from .moe_families import BaseRouting
from .selection import find_moe_blocks

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # in configurations, if no logits tell


class BaseChoices(NamedTuple):
    """A base router's decisions about a batch.

    Attributes:
        indices_TK: int64 (T, k), of all tokens that the block saw.
        num_experts: E.
        chosen_TK: bool (T, k), false where the choice was no expert; None: all are.
    """

    indices_TK: Tensor
    num_experts: int
    chosen_TK: Tensor | None = None


class BaseRouters:
    """The routers of a model's MoE blocks that read the text, while `watch` runs.

    Args:
        model: the base model, with adapters or without.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = [block for block in find_moe_blocks(model) if block.reads_text]
        self._seen: dict[str, BaseRouting] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See what the blocks' routers decide in the calls of the model."""
        handles = []
        for block in self.blocks:
            handles.append(block.router.register_forward_hook(partial(self._note_router, block)))
            if block.experts is not None and block.family.routing is None:
                hook = partial(self._note_experts, block)
                handles.append(block.experts.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self) -> dict[str, BaseChoices | None]:
        """The decisions of the last call of each block, by name, and forget them.

        None for a block that hides them: its experts are not called with indices, nor does its router return any.
        """
        seen, self._seen = self._seen, {}
        return {block.name: _choices(block, seen[block.name]) for block in self.blocks if block.name in seen}

    def _note_router(self, block: MoeBlock, router: nn.Module, args: tuple, output: Any) -> None:
        self._seen[block.name] = block.read_router(output)

    def _note_experts(self, block: MoeBlock, experts: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = block.read_experts_call(args, kwargs, self._seen.get(block.name, BaseRouting()))
        if call is not None:
            self._seen[block.name] = call.routing


def _choices(block: MoeBlock, routing: BaseRouting) -> BaseChoices | None:
    num_experts = _num_experts(block, routing)
    if routing.indices_TK is None or num_experts is None:
        return None
    # outputs that are no experts have the weight 0
    chosen_TK = None if block.family.num_experts is None else routing.weights_TK > 0
    return BaseChoices(routing.indices_TK, num_experts, chosen_TK)


def _num_experts(block: MoeBlock, routing: BaseRouting) -> int | None:
    if block.family.num_experts is not None:
        return block.family.num_experts(block.module)
    if routing.logits_TE is not None:
        return routing.logits_TE.shape[-1]
    return next((n for name in _COUNTS if (n := getattr(block.config, name, None))), None)
