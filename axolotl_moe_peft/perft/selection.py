"""Choosing the MoE blocks, dense MLPs and linear layers of a model that get an adapter."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..shared.linear import linear_shape
from ..shared.targets import target_layers
from .block import DenseMlp, FeedForward, MoeBlock, layer_index
from .config import DENSE_MLPS, PerftConfig
from .moe_families import family_of

ROUTER_NAMES = ("gate", "router")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "mlp_block")
_MLP_OF_A_LAYER = re.compile(rf"(.*\.)?\d+\.({'|'.join(MLP_NAMES)})")


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
            name, experts = f"{name}.experts", inner
        blocks.append(MoeBlock(name=name, module=inner, router=router, experts=experts, family=family, **rest))
    return blocks


def _configs(model: nn.Module) -> dict[str, Any]:
    """Each module's configuration: that of the innermost model of transformers around it."""
    configs: dict[str, Any] = {}
    for name, module in model.named_modules():
        outer = configs.get(name.rpartition(".")[0])
        config = getattr(module, "config", None) if isinstance(module, PreTrainedModel) or not name else outer
        configs[name] = config.get_text_config() if hasattr(config, "get_text_config") else config
    return configs


def find_dense_mlps(model: nn.Module) -> list[DenseMlp]:
    """The MLP of every dense layer that reads text, in order, adapted ones included.

    It is what a layer calls by one of MLP_NAMES, if that is no MoE block, maps the model's width to itself and keeps
    no state.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    text_modules, configs, moe_blocks = set(decoder.modules()), _configs(model), find_moe_blocks(model)
    in_moe_blocks = tuple(f"{block.name}." for block in moe_blocks)
    mlps = []
    for name, module in model.named_modules():
        if not _MLP_OF_A_LAYER.fullmatch(name) or f"{name}.".startswith(in_moe_blocks):
            continue
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        parts, mlp = set(inner.modules()), DenseMlp(name=name, module=inner, config=configs[name])
        shapes = [shape for part in parts if (shape := linear_shape(part))]
        width = getattr(mlp.config, "hidden_size", None)
        fits = any(i == width for i, _ in shapes) and any(o == width for _, o in shapes)
        fits &= "state" not in inspect.signature(type(inner).forward).parameters  # RWKV's
        if inner in text_modules and fits and not any(block.module in parts for block in moe_blocks):
            mlps.append(mlp)
    return mlps


def select_blocks(
    model: nn.Module,
    target_modules: Sequence[str] | str | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
) -> list[FeedForward]:
    """The MoE blocks and dense MLPs that `target_modules` and `layers_to_transform` choose.

    Args:
        model: the base model.
        target_modules: None for all MoE blocks that read the text, which leaves those of a vision tower alone; `mlp`
            for all dense MLPs; or names, suffixes of names, or one regular expression for the full name. These mean
            MoE blocks; what matches none of those may match dense MLPs.
        layers_to_transform: decoder layers; None for all.

    Raises:
        ValueError: the model has nothing of the kind, an entry chooses none, or a block sees a part of the tokens.
    """
    moe_blocks, mlps = find_moe_blocks(model), find_dense_mlps(model)
    if target_modules == DENSE_MLPS:
        if not mlps:
            raise ValueError(_no_dense_mlp(model, moe_blocks))
        chosen: list[FeedForward] = list(mlps)
    elif not moe_blocks and (target_modules is None or not mlps):
        raise ValueError(_no_moe_block(model, mlps))
    else:
        chosen = _named(moe_blocks, mlps, target_modules)
    _check_that_each_sees_all_tokens(model, moe_blocks, chosen)
    if layers_to_transform is None:
        return chosen
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform)
    unknown = [i for i in layers if i not in {b.layer_index for b in chosen}]
    if unknown or not layers:
        kind = "MoE block" if any(isinstance(b, MoeBlock) for b in chosen) else "dense MLP"
        raise ValueError(
            f"perft.layers_to_transform: {unknown or layers} names no layer with a chosen {kind}; "
            f"there are such in layers {sorted(b.layer_index for b in chosen)}."
        )
    return [b for b in chosen if b.layer_index in layers]


def select_linear_layers(model: nn.Module, config: PerftConfig, blocks: Sequence[FeedForward]) -> dict[str, nn.Module]:
    """The linear layers that `linear_target_modules` and `layers_to_transform` choose, by name.

    Args:
        model: the base model.
        config: of the adapter.
        blocks: what `select_blocks` has chosen for it.

    Raises:
        ValueError: an entry matches nothing, or something in a block: the adapter goes beside blocks as a whole.
    """
    if config.linear_target_modules is None:
        return {}
    key, targets = "perft.linear_target_modules", config.linear_target_modules
    saved = {"modules_to_save": config.modules_to_save, "is_saved": config.is_saved}
    layers = target_layers(SimpleNamespace(target_modules=targets, **saved), model, key)
    around = {
        part: block.name
        for block in (*find_moe_blocks(model), *blocks)
        for whole in (block.module, getattr(block, "router", None))
        for part in (whole.modules() if whole is not None else ())
    }
    outside = {name: layer for name, layer in layers.items() if layer not in around}
    within = next((name for name in layers if name not in outside), None)
    if within is not None and targets != "all-linear":
        raise ValueError(
            f"{key}: {targets!r} matches {within}, which is in {around[layers[within]]}: an adapter goes beside "
            "that as a whole. Name layers outside the blocks, such as attention's."
        )
    if config.layers_to_transform is not None:
        chosen = {block.layer_index for block in blocks}
        outside = {name: layer for name, layer in outside.items() if layer_index(name) in (None, *chosen)}
    if not outside:
        raise ValueError(
            f"{key}: {targets!r} matches no linear layer outside the blocks of the chosen decoder layers."
        )
    return outside


def _no_moe_block(model: nn.Module, mlps: list[DenseMlp]) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    instead = f"`target_modules: {DENSE_MLPS}` adapts the {len(mlps)} dense MLPs, or " if mlps else ""
    return (
        f"perft: no MoE block in {type(model).__name__} (model_type {model_type}): no module has both a router "
        f"({' or '.join(f'`{name}`' for name in ROUTER_NAMES)}) and `experts`. PERFT adapts MoE blocks; for "
        f"a dense base model {instead}use `adapter: lora` or `adapter: tt_lora`."
    )


def _no_dense_mlp(model: nn.Module, moe_blocks: list[MoeBlock]) -> str:
    names = " or ".join(f"`{name}`" for name in MLP_NAMES)
    text = (
        f"perft.target_modules: {DENSE_MLPS} adapts the dense MLPs of a model's layers. {type(model).__name__} has "
        f"none: no layer has an {names} that maps the model's width to itself and keeps no state"
    )
    if moe_blocks:
        return f"{text} and is no MoE block. Leave the key out to adapt its MoE blocks: {_list_names(moe_blocks)}."
    return f"{text}. Use `adapter: lora` or `adapter: tt_lora`."


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


def _named(
    moe_blocks: list[MoeBlock], mlps: list[DenseMlp], target_modules: Sequence[str] | str | None
) -> list[FeedForward]:
    if target_modules is None:
        chosen: list[FeedForward] = [b for b in moe_blocks if b.reads_text]
        unmatched = []
    else:
        entries = [target_modules] if isinstance(target_modules, str) else target_modules
        matches = re.fullmatch if isinstance(target_modules, str) else _is_suffix
        of_entries = {
            entry: [b for b in moe_blocks if matches(entry, b.name)] or [m for m in mlps if matches(entry, m.name)]
            for entry in entries
        }
        names = {block.name for blocks in of_entries.values() for block in blocks}
        chosen = [block for block in (*moe_blocks, *mlps) if block.name in names]
        unmatched = [entry for entry, blocks in of_entries.items() if not blocks]
    if unmatched or not chosen:
        instead = "leave the key out to adapt all MoE blocks" if moe_blocks else "`mlp`, without a list, means all"
        kind = f"no MoE block{' and no dense MLP' if mlps else ''}{'' if target_modules else ' that reads text'}"
        there_is = [f"The MoE blocks of this model are {_list_names(moe_blocks)}"] if moe_blocks else []
        there_is += [f"{'its' if there_is else 'The'} dense MLPs are {_list_names(mlps)}"] if mlps else []
        raise ValueError(
            f"perft.target_modules: {', '.join(map(repr, unmatched)) or repr(target_modules)} matches {kind}. "
            f"{', '.join(there_is)}"
            f"{f'; {instead}' if target_modules else ': name those that you mean'}."
        )
    return chosen


def _is_suffix(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _list_names(blocks: Sequence[FeedForward]) -> str:
    names = [b.name for b in blocks]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
