"""What the MoE blocks of transformers look like inside.

The standard interface (Mixtral, OLMoE, Qwen3-MoE and most others): a module with a router, called `gate` or `router`,
that returns (logits (T, E), weights (T, k), indices (T, k)), and a module `experts` that is called with
(hidden_states (T, D), indices, weights). T tokens, E base experts, k of them per token, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block of a base model.

    Attributes:
        name: its full name in the model.
        module: the block itself.
        router, experts: its children.
        layer_index: the first number in the name, i.e. the decoder layer.
    """

    name: str
    module: nn.Module
    router: nn.Module
    experts: nn.Module

    @property
    def layer_index(self) -> int | None:
        number = re.search(r"(?:^|\.)(\d+)\.", self.name)
        return int(number[1]) if number else None

    @torch.no_grad()
    def base_routing_shape(self, hidden_size: int) -> tuple[int, int]:
        """(E, k), read off what the router returns for a token of zeros (works on the meta device too)."""
        weight = next(self.router.parameters())
        logits_TE, weights_TK, _ = base_routing(self.router(weight.new_zeros(1, hidden_size)))
        return logits_TE.shape[-1], weights_TK.shape[-1]


def base_routing(router_output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits (T, E), weights (T, k), indices (T, k)) of a router's output."""
    logits_TE, weights_TK, indices_TK = router_output[:3]
    return logits_TE, weights_TK, indices_TK


def find_moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """Every MoE block of the model, in order, adapted ones included (their `base_layer` is looked at)."""
    blocks = []
    for name, module in model.named_modules():
        if name.endswith(".base_layer"):
            continue
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        children = dict(inner.named_children())
        router = next((children[r] for r in ROUTER_NAMES if r in children), None)
        if router is not None and "experts" in children:
            blocks.append(MoeBlock(name, inner, router, children["experts"]))
    return blocks


def select_moe_blocks(
    model: nn.Module,
    target_modules: Sequence[str] | str | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
) -> list[MoeBlock]:
    """The MoE blocks that `target_modules` and `layers_to_transform` choose.

    Args:
        model: the base model.
        target_modules: names, suffixes of names, or one regular expression for the full name; None for all.
        layers_to_transform: decoder layers; None for all.

    Raises:
        ValueError: the model has no MoE block, or an entry chooses none.
    """
    blocks = find_moe_blocks(model)
    if not blocks:
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"perft: no MoE block in {type(model).__name__} (model_type {model_type}): no module has both a router "
            f"({' or '.join(f'`{name}`' for name in ROUTER_NAMES)}) and `experts`. PERFT adapts MoE blocks; for a "
            "dense base model use `adapter: lora` or `adapter: tt_lora`."
        )
    if isinstance(target_modules, str):
        chosen = [b for b in blocks if re.fullmatch(target_modules, b.name)]
        unmatched = [] if chosen else [target_modules]
    elif target_modules is not None:
        chosen = [b for b in blocks if any(_has_suffix(b.name, t) for t in target_modules)]
        unmatched = [t for t in target_modules if not any(_has_suffix(b.name, t) for b in blocks)]
    else:
        chosen, unmatched = blocks, []
    if unmatched or not chosen:
        raise ValueError(
            f"perft.target_modules: {', '.join(map(repr, unmatched)) or repr(target_modules)} matches no MoE block. "
            f"The MoE blocks of this model are {_list_names(blocks)}; leave the key out to adapt all of them."
        )
    if layers_to_transform is None:
        return chosen
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform)
    unknown = [i for i in layers if i not in {b.layer_index for b in chosen}]
    if unknown or not layers:
        raise ValueError(
            f"perft.layers_to_transform: {unknown or layers} names no layer with an MoE block; "
            f"there are MoE blocks in layers {sorted(b.layer_index for b in chosen)}."
        )
    return [b for b in chosen if b.layer_index in layers]


def base_norm_topk_prob(model: nn.Module) -> bool:
    """Whether the base router's k weights sum to one. Families without the config field (Mixtral) always do so."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(config, "norm_topk_prob", True))


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _list_names(blocks: list[MoeBlock]) -> str:
    names = [b.name for b in blocks]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
