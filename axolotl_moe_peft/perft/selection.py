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
from .moe_families import family_of

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
    return blocks


def _configs(model: nn.Module) -> dict[str, Any]:
    """Each module's configuration: that of the innermost model of transformers around it."""
    configs: dict[str, Any] = {}
    for name, module in model.named_modules():
        outer = configs.get(name.rpartition(".")[0])
        config = getattr(module, "config", None) if isinstance(module, PreTrainedModel) or not name else outer
        configs[name] = config.get_text_config() if hasattr(config, "get_text_config") else config
    return configs


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
        ValueError: the model has no MoE block, an entry chooses none, or a block sees a part of the tokens.
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
    _check_that_each_sees_all_tokens(model, blocks, chosen)
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


def _check_that_each_sees_all_tokens(model: nn.Module, blocks: list[MoeBlock], chosen: list[MoeBlock]) -> None:
    """Refuse blocks side by side in one module, which hands each of them the tokens of one modality."""
    counts = Counter(block.parent_name for block in blocks)
    for block in chosen:
        parent = model.get_submodule(block.parent_name)
        if counts[block.parent_name] > 1 and not isinstance(parent, nn.ModuleList):
            raise ValueError(
                f"perft does not go with {type(parent).__name__} ({block.parent_name}): it hands its tokens to "
                f"{counts[block.parent_name]} MoE blocks, of which each sees a part of a batch or nothing at all, so "
                "that adapters would be left without a gradient and their routers' losses and figures be wrong. Leave "
                "such blocks out with `target_modules`, or use `adapter: lora` or `adapter: tt_lora`."
            )


def _named(blocks: list[MoeBlock], target_modules: Sequence[str] | str | None) -> list[MoeBlock]:
    if target_modules is None:
        chosen = [b for b in blocks if b.reads_text]
        unmatched = []
    elif isinstance(target_modules, str):
        chosen = [b for b in blocks if re.fullmatch(target_modules, b.name)]
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


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _list_names(blocks: list[MoeBlock]) -> str:
    names = [b.name for b in blocks]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
