"""AdapterCallback: what has to happen while Axolotl's trainer runs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from peft.tuners.tuners_utils import BaseTuner
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..shared.summary import format_memory

LOG = get_logger(__name__)


class AdapterCallback(TrainerCallback):
    """Puts the routers' figures on the host's log line; checks and logs, once, what the optimiser holds."""

    def __init__(self, cfg: DictDefault, trainer: Trainer) -> None:
        self.cfg = cfg
        self.trainer = trainer
        self.fresh = not cfg.lora_model_dir
        self.prediction_steps = 0
        self.memory_is_logged = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.fresh = False
        if not self.trainer.is_deepspeed_enabled:  # DeepSpeed's optimiser holds flat copies
            _check_optimizer(kwargs["model"], kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.memory_is_logged and not self.trainer.is_deepspeed_enabled:
            self.memory_is_logged = True
            rows = self._tuner(kwargs["model"]).parameter_rows()
            LOG.info("memory of the adapter: %s", format_memory(rows, kwargs["optimizer"]))
        if control.should_log:
            self._store(self._tuner(kwargs["model"]), "train")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.prediction_steps += 1
        # the host logs the evaluation before it tells of its end
        batches = kwargs["eval_dataloader"]
        if has_length(batches) and self.prediction_steps == len(batches):
            self._store(self._tuner(kwargs["model"]), "eval")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.prediction_steps = 0
        if self.fresh:
            LOG.warning("evaluated a new, untrained adapter; name the trained one's folder with --lora-model-dir")
            self.fresh = False

    def _tuner(self, model: torch.nn.Module) -> BaseTuner:
        return self.trainer.accelerator.unwrap_model(model).base_model

    def _store(self, tuner: BaseTuner, mode: Literal["train", "eval"]) -> None:
        """Put what the tuner has recorded since the last time on the host's next log line."""
        statistics = getattr(tuner, {"train": "statistics", "eval": "eval_statistics"}[mode], None)
        if statistics is None:
            return
        figures = statistics.pop(lambda tensor: self.trainer.accelerator.reduce(tensor, "sum"))
        if hasattr(self.trainer, "store_metrics"):
            prefix = "eval_" if mode == "eval" else ""
            self.trainer.store_metrics({f"{prefix}{name}": value for name, value in figures.items()}, train_eval=mode)
        else:  # TRL's: lists, averaged for the log line
            for name, value in figures.items():
                self.trainer._metrics[mode][name].append(value)


def _check_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for key, name in trainable.items() if key not in optimised]
    if missing or len(optimised) != len(trainable):
        raise RuntimeError(
            f"the optimiser holds {len(optimised)} parameters, the adapter has {len(trainable)}; not optimised: "
            f"{missing[:5]}. They must be exactly the adapter's; check the `optimizer:` and learning-rate group keys."
        )
