"""Turns a TT-LoRA adapter into a plain LoRA of the same rank that computes the same, for hosts that know only LoRA.

axolotl export-tt-lora ./outputs/my-adapter ./outputs/my-adapter-as-lora
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from .config import TTLoraConfig
from .layer import build_matrices

LOG = logging.getLogger(__name__)

_BESIDE = (".weight", ".bias", ".trainable_tokens_delta")
_WEIGHTS = "adapter_model.safetensors"


def export_to_lora(
    adapter: str | Path | PeftModel, out_folder: str | Path, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Write a TT-LoRA adapter as a PEFT LoRA: lora_A = A^T, lora_B = C^T and a scale of alpha.

    Args:
        adapter: the folder of a saved adapter, which needs no base model, or a model that has one.
        out_folder: gets adapter_config.json and adapter_model.safetensors, in float32; made if it is not there.
        adapter_name: which adapter of the model.

    Returns:
        The tensors that were written: lora_A.weight (rank, inputs) and lora_B.weight (outputs, rank) of each layer.

    Raises:
        ValueError: it is no complete TT-LoRA adapter, or `out_folder` is its own folder.
    """
    if isinstance(adapter, PeftModel):
        config, cores = (
            adapter.peft_config[adapter_name],
            get_peft_model_state_dict(adapter, adapter_name=adapter_name),
        )
        base = adapter.get_base_model()
    else:
        config, cores = _read(Path(adapter), Path(out_folder))
        base = _architecture(config)
    if not isinstance(config, TTLoraConfig):
        raise ValueError(f"the adapter is of type {config.peft_type.value}; only TT_LORA can be exported.")
    # resized embeddings, heads and tokens that PEFT saves beside an adapter go with it as they are
    tensors = {key: cores.pop(key).detach().cpu().contiguous() for key in [*cores] if _is_beside(key)}
    layers = _by_layer(cores, config.rank)
    for name, (cores_in, cores_out) in layers.items():
        down, up = build_matrices(cores_in, cores_out, alpha=1.0)
        tensors[f"{name}.lora_A.weight"] = down.detach().cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = up.T.detach().cpu().contiguous()
    targets = config.target_modules
    if targets == "all-linear":  # what PEFT means by it is more, routers among them
        targets = sorted(name.removeprefix("base_model.model.") for name in layers)
    scale = config.alpha * config.rank  # PEFT divides by the rank
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=int(scale) if scale == int(scale) else scale,
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.modules()) if base is not None else False,
        task_type=config.task_type,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    Path(out_folder).mkdir(parents=True, exist_ok=True)
    lora.save_pretrained(out_folder)
    save_file(tensors, Path(out_folder) / _WEIGHTS, metadata={"format": "pt"})
    return tensors


def _read(folder: Path, out_folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    for name in ("adapter_config.json", _WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} holds no {name}; give the folder of a saved adapter.")
    if folder.resolve() == out_folder.resolve():
        raise ValueError(f"the export would overwrite the adapter in {str(folder)!r}; give another folder for it.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the adapter_config.json of {str(folder)!r} cannot be read: {error!r}.") from error
    try:
        return config, load_file(folder / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{str(folder / _WEIGHTS)!r} cannot be read: {error}.") from error


def _is_beside(key: str) -> bool:
    return key.startswith("base_model.model.") and key.endswith(_BESIDE) and ".lora_" not in key


def _by_layer(cores: dict[str, Tensor], rank: int) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Input and output cores of each layer, from their names ...q_proj.ttcore_in_0 ..., ...q_proj.ttcore_out_0 ..."""
    sides: dict[str, dict[str, dict[int, Tensor]]] = {}
    for key, core in cores.items():
        name, separator, position = key.rpartition(".ttcore_")
        side, _, index = position.partition("_")
        if not separator or side not in ("in", "out") or not index.isdecimal():
            raise ValueError(f"{key} is no tensor of a TT-LoRA adapter.")
        sides.setdefault(name, {"in": {}, "out": {}})[side][int(index)] = core
    layers = {}
    for name, found in sides.items():
        trains = [[found[side][k] for k in sorted(found[side])] for side in ("in", "out")]
        cores_of_both = [*trains[0], *trains[1]]
        ranks = [1, *[rank] * (len(cores_of_both) - 1), 1]
        whole = all(trains) and all(sorted(part) == list(range(len(part))) for part in found.values())
        if not whole or [tuple(core.shape[::2]) for core in cores_of_both] != [*zip(ranks, ranks[1:])]:
            raise ValueError(f"cores of {name} are missing or not of rank {rank}.")
        layers[name] = (trains[0], trains[1])
    return layers


def _architecture(config: PeftConfig) -> torch.nn.Module | None:
    """The base model without weights, or None if its configuration cannot be found."""
    base = config.base_model_name_or_path
    try:
        with torch.device("meta"):
            return AutoModel.from_config(AutoConfig.from_pretrained(base, revision=config.revision)) if base else None
    except (OSError, ValueError) as error:
        LOG.warning("no configuration of the base model %r (%s); taking its layers for nn.Linear", base, error)
        return None
