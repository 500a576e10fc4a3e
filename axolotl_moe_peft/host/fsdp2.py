"""FSDP2 as the launcher asks for it, and what it has to be told so that its checkpoints hold a whole adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from accelerate.utils.constants import FSDP_MODEL_NAME
from accelerate.utils.fsdp_utils import _get_model_state_dict
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .saved import saved_adapters

LOG = get_logger(__name__)

# keys of `fsdp_config`, and the variables in which accelerate's launcher has them
_TEXTS = {
    "auto_wrap_policy": "FSDP_AUTO_WRAP_POLICY",
    "transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "state_dict_type": "FSDP_STATE_DICT_TYPE",
}
_FLAGS = {
    "activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
    "cpu_ram_efficient_loading": "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "offload_params": "FSDP_OFFLOAD_PARAMS",
    "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
}


def take_over_from_launcher(cfg: dict[str, Any]) -> None:
    """Have a YAML without `fsdp_config` say what accelerate's launcher, or its configuration file, asks for.

    Without it the host does not set FSDP up. Accelerate shards the model all the same, and once an adapter that is no
    LoRA is trained the host fails to save it.

    Args:
        cfg: the raw YAML.

    Raises:
        ValueError: the launcher asks for FSDP1.
    """
    if cfg.get("fsdp_config") or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"accelerate's configuration or command line asks for FSDP{version}, which is not supported with "
            f"`adapter: {cfg['adapter']}`. Write `fsdp_version: 2` there (`accelerate launch --fsdp_version 2`), or "
            "leave FSDP out there and set `fsdp_version: 2` and `fsdp_config` in the YAML."
        )
    settings: dict[str, Any] = {key: os.environ[name] for key, name in _TEXTS.items() if name in os.environ}
    settings |= {key: parse_flag_from_env(name) for key, name in _FLAGS.items() if name in os.environ}
    if settings.get("auto_wrap_policy") == "SIZE_BASED_WRAP":  # else a number that means nothing
        settings["min_num_params"] = int(os.environ["FSDP_MIN_NUM_PARAMS"])
    LOG.info("FSDP2 as the launcher asks for it: fsdp_config: %s", settings)
    cfg["fsdp_version"], cfg["fsdp_config"] = 2, settings


class Fsdp2Checkpoints(TrainerCallback):
    """Puts the whole adapter into every checkpoint, beside what the host writes to resume from.

    The host writes the `state_dict_type` that the user asks for, where that resumes: before 1.15 accelerate writes of
    an adapter's FULL_STATE_DICT the first process's part alone (accelerate#4206), and every process its own part.
    """

    def __init__(self, cfg: DictDefault, trainer: Trainer) -> None:
        self.trainer = trainer
        # one that an earlier accelerate had to write so
        resumes_from_parts = any((Path(folder) / f"{FSDP_MODEL_NAME}_0").exists() for _, folder in saved_adapters(cfg))
        if resumes_from_parts or not _gathers_adapters(trainer.model):
            self._set_state_dict_type("SHARDED_STATE_DICT")
            LOG.info("checkpoints have the adapter twice: whole, and for resuming as a SHARDED_STATE_DICT")
        # of a SHARDED_STATE_DICT the host would make the final adapter from a checkpoint, rounded to bf16
        cfg.fsdp_config.final_state_dict_type = "FULL_STATE_DICT"

    def _set_state_dict_type(self, kind: str) -> None:
        fsdp = self.trainer.accelerator.state.fsdp_plugin
        fsdp.state_dict_config = fsdp.optim_state_dict_config = None  # those of the other type
        fsdp.set_state_dict_type(kind)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set_state_dict_type("FULL_STATE_DICT")  # the last checkpoint is written; what follows is the adapter

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        accelerator = self.trainer.accelerator
        if "FULL_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type):
            return  # the host has saved it
        tensors = _whole_adapter(kwargs["model"], accelerator.device)
        if accelerator.is_main_process:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            kwargs["model"].save_pretrained(folder, state_dict=tensors)


def _gathers_adapters(model: PeftModel) -> bool:
    """Whether accelerate asks torch for an adapter's FULL_STATE_DICT, and not PEFT, which does not gather it."""
    state_dict = _get_model_state_dict(model, adapter_only=True, sd_options=StateDictOptions(full_state_dict=True))
    return state_dict.keys() <= model.state_dict().keys()  # PEFT leaves the adapter's name out


def _whole_adapter(model: PeftModel, device: torch.device) -> dict[str, Tensor]:
    """What PEFT saves of the model, by names in it, gathered from the processes of FSDP2; each must call."""
    tensors = model.state_dict()
    saved = {id(tensor) for tensor in get_peft_model_state_dict(model, state_dict=tensors).values()}
    return {
        name: (tensor.to(device).full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
        for name, tensor in tensors.items()
        if id(tensor) in saved
    }
