"""Turns each expert of a saved pool into a plain LoRA that computes the same, for hosts that know only LoRA."""

from __future__ import annotations

from pathlib import Path

from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from .config import TTLoraMoeConfig
from .experts import load_expert
from .layer import NO_CORES


def export_experts(adapter: str | Path, out_folder: str | Path, base: str | None = None) -> dict[str, Path]:
    """Write every expert of a pool as a PEFT LoRA of its own, in float32 and with a scale of 1.

    Args:
        adapter: folder or hub id of a saved pool.
        out_folder: gets a folder for each expert, called as the expert is.
        base: folder or hub id of the base model, of which the configuration is read; None: the pool's.

    Returns:
        The folders, by expert.

    Raises:
        ValueError: it is no pool of experts for causal language modelling, or its file is not whole.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, TTLoraMoeConfig) or any(e.get("num_labels") for e in config.experts):
        raise ValueError(f"{str(adapter)!r} is no tt_lora_moe adapter of a causal language model.")
    with init_empty_weights():
        base_config = AutoConfig.from_pretrained(base or config.base_model_name_or_path, revision=config.revision)
        model = AutoModelForCausalLM.from_config(base_config)
    tensors = load_peft_weights(str(adapter), device="cpu")
    experts = [load_expert(entry, model) for entry in config.experts]
    loras: list[dict] = [{} for _ in experts]
    for name in {name: None for expert in experts for name in expert.shapes}:
        shapes = [expert.shapes.get(name, NO_CORES) for expert in experts]
        cores = tensors.get(f"base_model.model.{name}.ttmoe_cores")
        sizes = [shape.num_parameters for shape in shapes]
        if cores is None or len(cores) != sum(sizes):
            raise ValueError(f"the cores of {name} are missing in {str(adapter)!r}, or not all there.")
        for lora, shape, part in zip(loras, shapes, cores.float().split(sizes)):
            if shape is NO_CORES:
                continue
            down_RI, up_RO = shape.matrices(part)
            lora[f"base_model.model.{name}.lora_A.weight"] = down_RI.contiguous()
            lora[f"base_model.model.{name}.lora_B.weight"] = up_RO.t().contiguous()
    folders = {}
    for entry, expert, lora in zip(config.experts, experts, loras):
        folder = folders[entry["name"]] = Path(out_folder) / entry["name"]
        folder.mkdir(parents=True)
        LoraConfig(
            r=entry["rank"],
            lora_alpha=entry["rank"],
            target_modules=list(expert.shapes),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type=config.task_type,
            base_model_name_or_path=config.base_model_name_or_path,
            revision=config.revision,
            inference_mode=True,
        ).save_pretrained(str(folder))
        save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folders
