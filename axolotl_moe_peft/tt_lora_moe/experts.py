"""Reads trained tt_lora and LoRA adapters as experts of a pool, and checks that they fit the base model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from ..shared.targets import target_layers
from ..tt_lora import TTLoraConfig
from ..tt_lora.layer import core_shapes
from ..tt_lora.model import factors_of
from .config import POOLED_FIELDS
from .head import head_name
from .layer import ExpertShapes
from .plain_lora import as_tensor_train, check_is_plain

_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Expert:
    """One expert, and where its cores go.

    Attributes:
        entry: its entry in a saved pool's `experts`.
        shapes: by name of the linear layer, of those that it adapts.
        cores: a vector by name of the linear layer; None of an expert that is in a pool already.
        num_labels: classes of its head; None of an expert that is no classifier.
        head: a vector, see TTLoraPoolHead; None without one, and of an expert that is in a pool already.
    """

    entry: dict[str, Any]
    shapes: dict[str, ExpertShapes]
    cores: dict[str, Tensor] | None
    num_labels: int | None = None
    head: Tensor | None = None


def load_expert(entry: dict[str, Any], model: nn.Module) -> Expert:
    """The expert of one entry, for this base model.

    Raises:
        ValueError: it cannot be read, is no tt_lora or LoRA adapter, or was trained on another base model. The message
            names it.
    """
    what = f"tt_lora_moe.experts: {entry['name']}"
    if "rank" in entry:
        config, tensors = TTLoraConfig(**{key: entry[key] for key in POOLED_FIELDS}), None
    else:
        config, tensors = read_expert(entry, getattr(model, "name_or_path", ""))
    try:
        if isinstance(config, LoraConfig):
            config, tensors = as_tensor_train(config, tensors, model)
        layers = target_layers(config, model)
        factors = {name: factors_of(name, layer, config) for name, layer in layers.items()}
    except ValueError as error:
        raise ValueError(f"{what} does not fit {type(model).__name__}: {error}") from None
    shapes, cores = {}, None if tensors is None else {}
    for name in layers:
        of_cores = core_shapes(factors[name], config.rank)
        sides = [tuple(shape for core, shape in of_cores.items() if f"_{side}_" in core) for side in ("in", "out")]
        shapes[name] = ExpertShapes(*sides, config.alpha)
        if tensors is not None:
            keys = {f"base_model.model.{name}.{core}": shape for core, shape in of_cores.items()}
            for key, shape in keys.items():
                if key not in tensors or tensors[key].shape != shape:
                    found = tuple(tensors[key].shape) if key in tensors else "missing"
                    raise ValueError(f"{what} ({entry['path']}): {key} is {found}, this base model needs {shape}.")
            cores[name] = torch.cat([tensors.pop(key).flatten().float() for key in keys])
    num_labels, head = entry.get("num_labels"), None
    if tensors is not None and (name := head_name(model)):
        head = _head_of(f"{what} ({entry['path']})", f"base_model.model.{name}", tensors, model.get_submodule(name))
        num_labels = len(head)
    for key, tensor in (tensors or {}).items():
        _check_is_the_bases(f"{what} ({entry['path']})", key, tensor, model)
    pooled = {key: getattr(config, key) for key in POOLED_FIELDS}
    if num_labels is not None:
        pooled["num_labels"] = num_labels
    entry = {"name": entry["name"], "path": entry["path"], **pooled}
    return Expert(entry, shapes, cores, num_labels, None if head is None else head.flatten())


def _head_of(what: str, name: str, tensors: dict[str, Tensor], base_head: nn.Module) -> Tensor:
    """The expert's classification head, (classes, inputs), or with its bias in a last column; taken out of tensors."""
    weight, bias = tensors.pop(f"{name}.weight", None), tensors.pop(f"{name}.bias", None)
    if weight is None or weight.shape[1] != base_head.in_features or (bias is None) != (base_head.bias is None):
        found = "no head" if weight is None else f"a head {tuple(weight.shape)}"
        raise ValueError(
            f"{what} has {found} that fits this classifier's {name.rpartition('.')[2]}, which takes "
            f"{base_head.in_features} features. Train it with task_type SEQ_CLS on this base."
        )
    return weight.float() if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1).float()


def _check_is_the_bases(what: str, key: str, tensor: Tensor, model: nn.Module) -> None:
    """Check that what an expert has beside its cores is in the base as well, as embeddings are that were resized."""
    own = dict(model.named_parameters()).get(key.removeprefix("base_model.model."))
    if own is None:
        raise ValueError(f"{what}: this base model has no place for {key}.")
    if own.shape != tensor.shape or not (own.is_meta or torch.equal(own.detach().cpu(), tensor.to(own.dtype))):
        raise ValueError(
            f"{what} has a {key} {tuple(tensor.shape)} of its own, beside which it was trained; this base model's "
            f"{tuple(own.shape)} is another, and a pool shares one. Give the base the same (resize its embeddings and "
            "load that tensor), or train the expert with its base as it is."
        )


def read_expert(
    entry: dict[str, Any], base_model: str | None = None
) -> tuple[TTLoraConfig | LoraConfig, dict[str, Tensor]]:
    """Read an expert's folder.

    Args:
        entry: {name, path}.
        base_model: name or path of the base model, if it is known.

    Raises:
        ValueError: the folder is incomplete or unreadable, or it holds another method's adapter or that of another
            base model.
    """
    path = entry["path"]
    what = f"tt_lora_moe.experts: {entry['name']} ({path})"
    missing = [name for name in _FILES if Path(path).is_dir() and not (Path(path) / name).is_file()]
    if missing or not (Path(path).is_dir() or could_be_on_the_hub(path)):
        raise ValueError(
            f"{what} holds no {(missing or _FILES)[0]}; give the folder of a trained tt_lora or LoRA adapter."
        )
    try:
        config = PeftConfig.from_pretrained(path)
        if config.peft_type == PeftType.LORA:
            check_is_plain(config)
        elif not isinstance(config, TTLoraConfig):
            raise ValueError(f"it is an adapter of type {config.peft_type.value}, not TT_LORA or LORA")
        tensors = load_peft_weights(path, device="cpu")
    except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        nowhere = "" if Path(path).is_dir() else "there is no such folder here, and the hub does not give it either: "
        raise ValueError(f"{what} cannot be taken as an expert: {nowhere}{error}.") from None
    trained_on = config.base_model_name_or_path
    if trained_on and base_model and _normalised(trained_on) != _normalised(base_model):
        raise ValueError(
            f"{what} was trained on the base model {trained_on!r}, not {base_model!r}. If both are the same model, "
            "write the name into base_model_name_or_path of its adapter_config.json."
        )
    return config, tensors


def could_be_on_the_hub(path: str) -> bool:
    """Whether it is no folder here and has the form of a repository's id."""
    return not Path(path).is_dir() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None


def _normalised(name: str) -> str:
    return os.path.realpath(name) if os.path.isdir(name) else name.rstrip("/")
