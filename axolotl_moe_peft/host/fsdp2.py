"""What FSDP2 has to be told so that its checkpoints hold a whole adapter, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils.fsdp_utils import _get_model_state_dict
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

LOG = get_logger(__name__)


class Fsdp2Checkpoints(TrainerCallback):
    """Puts the whole adapter into every checkpoint, beside what the host writes to resume from.

    The host writes the `state_dict_type` that the user asks for, where that resumes: before 1.15 accelerate writes of
    an adapter's FULL_STATE_DICT the first process's part alone (accelerate#4206), and every process its own part.
    """

    def __init__(self, cfg: DictDefault, trainer: Trainer) -> None:
        self.trainer = trainer
        if not _gathers_adapters(trainer.model):
            self._set_state_dict_type("SHARDED_STATE_DICT")
            LOG.info("checkpoints have the adapter twice: whole, and for resuming as a SHARDED_STATE_DICT")
        # of a SHARDED_STATE_DICT the host would make the final adapter from a checkpoint, rounded to bf16
        if cfg.fsdp_config:  # else accelerate's own configuration asks for FSDP
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
    """The adapter's tensors by their names in the model, gathered from the processes of FSDP2; each must call."""
    return {
        name: (tensor.to(device).full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
        for name, tensor in model.state_dict().items()
        if model.base_model.prefix in name
    }
