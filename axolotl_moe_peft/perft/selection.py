"""Choosing the MoE blocks of a model that get an adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .block import MoeBlock
from .moe_families import STANDARD, family_of

ROUTER_NAMES = ("gate", "router")


def find_moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """Every MoE block of the model, in order, adapted ones included (their `base_layer` is looked at)."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    text_modules = set(decoder.modules())
    configs = _configs(model)
    blocks = []
    for name, module in model.named_modules():
        if name.endswith(".base_layer"):
            continue
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        children, family = dict(inner.named_children()), family_of(inner)
        router = next((children[r] for r in ROUTER_NAMES if r in children), None)
        experts = children.get("experts")
        if router is None or (experts is None and family.routing is None):
            continue
        rest = {"config": configs[name], "reads_text": inner in text_modules}
        if isinstance(inner, GradientCheckpointingLayer):
            inner = experts.get_base_layer() if isinstance(experts, BaseTunerLayer) else experts
            blocks.append(MoeBlock(f"{name}.experts", inner, router, inner, family, **rest))
        else:
            blocks.append(MoeBlock(name, inner, router, experts, family, **rest))
    return _with_siblings_as_one(model, blocks)


def _configs(model: nn.Module) -> dict[str, Any]:
    """Each module's configuration: that of the innermost model of transformers around it."""
    configs: dict[str, Any] = {}
    for name, module in model.named_modules():
        outer = configs.get(name.rpartition(".")[0])
        config = getattr(module, "config", None) if isinstance(module, PreTrainedModel) or not name else outer
        configs[name] = config.get_text_config() if hasattr(config, "get_text_config") else config
    return configs


def _with_siblings_as_one(model: nn.Module, blocks: list[MoeBlock]) -> list[MoeBlock]:
    """Put one block for those that share the tokens of one module: each alone sees a part of a batch, or nothing."""

    def parent_of(block: MoeBlock) -> str:
        return block.name.rpartition(".")[0]

    counts = Counter(map(parent_of, blocks))
    found: dict[str, MoeBlock] = {}
    for block in blocks:
        name = parent_of(block)
        parent = model.get_submodule(name)
        if counts[name] > 1 and not isinstance(parent, nn.ModuleList):
            parent = parent.get_base_layer() if isinstance(parent, BaseTunerLayer) else parent
            block = MoeBlock(name, parent, None, None, STANDARD, block.config, block.reads_text)
        found[block.name] = block
    return list(found.values())


def select_moe_blocks(
    model: nn.Module,
    target_modules: Sequence[str] | str | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
) -> list[MoeBlock]:
    """The MoE blocks that `target_modules` and `layers_to_transform` choose.

    Args:
        model: the base model.
        target_modules: names, suffixes of names, or one regular expression for the full name; None for all that read
            the text, which leaves those of a vision tower alone.
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
    chosen = _named(blocks, target_modules)
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


def _named(blocks: list[MoeBlock], target_modules: Sequence[str] | str | None) -> list[MoeBlock]:
    if target_modules is None:
        chosen = [b for b in blocks if b.reads_text]
        unmatched = []
    elif isinstance(target_modules, str):
        chosen = [b for b in blocks if _compiled(target_modules).fullmatch(b.name)]
        unmatched = [] if chosen else [target_modules]
    else:
        chosen = [b for b in blocks if any(_has_suffix(b.name, t) for t in target_modules)]
        unmatched = [t for t in target_modules if not any(_has_suffix(b.name, t) for b in blocks)]
    if unmatched or not chosen:
        raise ValueError(
            f"perft.target_modules: {', '.join(map(repr, unmatched)) or repr(target_modules)} matches no MoE block"
            f"{'' if target_modules else ' that reads text'}. The MoE blocks of this model are {_list_names(blocks)}"
            f"{'; leave the key out to adapt all of them' if target_modules else ': name those that you mean'}."
        )
    return chosen


def _compiled(expression: str) -> re.Pattern:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"perft.target_modules: {expression!r} is no regular expression ({error}). As a string the key is one "
            "that matches whole names; give a list for names or suffixes of names."
        ) from None


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _list_names(blocks: list[MoeBlock]) -> str:
    names = [b.name for b in blocks]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
