"""Takes a plain LoRA of PEFT as an expert: a tensor train of two cores.

Shape suffixes: I inputs, O outputs, R rank of a layer, P rank of the train (the largest of its layers').
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..shared.linear import linear_shape
from ..tt_lora import TTLoraConfig

# Fields of PEFT's that may have any value: they say which layers, with which rank and scale, or how it was trained.
# What the head and other modules hold that were saved beside it is seen in its file.
_OF_ANY_VALUE = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config",
)
# the others start from a part of the base's weights, which they take out of it
_INITS_BESIDE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
_PREFIX = "base_model.model."


def check_is_plain(config: LoraConfig) -> None:
    """Check that a LoRA only adds scale * B A x to the outputs of layers.

    Raises:
        ValueError: it does something else; the message names the setting.
    """
    if config.init_lora_weights not in _INITS_BESIDE_THE_BASE:
        raise ValueError(
            f"its init_lora_weights: {config.init_lora_weights!r} has changed the base model's weights, which a pool "
            "shares. Save it as a plain LoRA, by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    plain = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in (*_OF_ANY_VALUE, "init_lora_weights") or not value or value == getattr(plain, field.name):
            continue
        raise ValueError(
            f"its {field.name}: {value!r} makes it more than a plain LoRA, an update scale * B A beside linear "
            "layers; a pool has no other"
        )


def as_tensor_train(
    config: LoraConfig, tensors: dict[str, Tensor], model: nn.Module
) -> tuple[TTLoraConfig, dict[str, Tensor]]:
    """The tt_lora adapter that computes what this LoRA does: its first core is A, the second B.

    Layers of a lower rank than others are filled up with zeros, and where a layer's scale is another one than the
    first that is above 0, its B takes the difference up; else the cores are A and B bit by bit.

    Args:
        config: one that `check_is_plain` has passed.
        tensors: of its file; lora_A.weight (R, I) and lora_B.weight (O, R) of each layer.
        model: the base model.

    Raises:
        ValueError: it does not fit the base model, or is not whole.
    """
    others, modules = dict(tensors), dict(model.named_modules())
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for key in tensors:
        name, is_down, _ = key.partition(".lora_A.weight")
        if is_down:
            up = others.pop(f"{name}.lora_B.weight", None)
            layers[name.removeprefix(_PREFIX)] = _checked_pair(config, name, others.pop(key), up, modules)
    if strange := [key for key in others if ".lora_" in key] or not layers and ["no lora_A.weight"]:
        raise ValueError(f"it has {strange[0]}; a pool takes whole LoRAs of linear layers")
    rank = max(len(down_RI) for down_RI, _ in layers.values())
    scales = {name: _scale(config, name, len(down_RI)) for name, (down_RI, _) in layers.items()}
    alpha = next((scale for scale in scales.values() if scale > 0), 1.0)  # a train has no other
    for name, (down_RI, up_OR) in layers.items():
        missing = rank - len(down_RI)
        others[f"{_PREFIX}{name}.ttcore_in_0"] = F.pad(down_RI.float(), (0, 0, 0, missing)).T.unsqueeze(0)
        up_PO = F.pad(up_OR.float() * (scales[name] / alpha), (0, missing)).T
        others[f"{_PREFIX}{name}.ttcore_out_0"] = up_PO.unsqueeze(2)
    shapes = {name: (down_RI.shape[1], len(up_OR)) for name, (down_RI, up_OR) in layers.items()}
    return TTLoraConfig(rank=rank, alpha=alpha, target_modules=[*layers], factors=_factors(shapes)), others


def _checked_pair(
    config: LoraConfig, name: str, down: Tensor, up: Tensor | None, modules: dict[str, nn.Module]
) -> tuple[Tensor, Tensor]:
    """A and B of one layer."""
    where = name.removeprefix(_PREFIX)
    layer = modules.get(where)
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if layer is None or linear_shape(layer) is None:
        raise ValueError(f"this base model has no place for {name}, beside which it would go")
    inputs, outputs = linear_shape(layer)
    rank = config.rank_pattern.get(get_pattern_key([*config.rank_pattern], where), config.r)
    for key, tensor, shape in (("lora_A", down, (rank, inputs)), ("lora_B", up, (outputs, rank))):
        if tensor is None or tensor.shape != shape:
            found = "missing" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{name}.{key}.weight is {found}, this base model and the LoRA's rank need {shape}")
    return down, up


def _scale(config: LoraConfig, name: str, rank: int) -> float:
    alpha = config.alpha_pattern.get(get_pattern_key([*config.alpha_pattern], name), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _factors(shapes: dict[str, tuple[int, int]]) -> dict[str, dict[str, list[int]]]:
    """Inputs and outputs as one factor each, by the last part of the names where that is enough."""
    by_ending: dict[str, set[tuple[int, int]]] = {}
    for name, shape in shapes.items():
        by_ending.setdefault(name.rpartition(".")[2], set()).add(shape)
    keys = {}
    for name, (inputs, outputs) in shapes.items():
        ending = name.rpartition(".")[2]
        keys[ending if len(by_ending[ending]) == 1 else name] = {"in": [inputs], "out": [outputs]}
    return keys
