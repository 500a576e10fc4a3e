"""AdapterCallback: what has to happen while Axolotl's trainer runs."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from peft.tuners.tuners_utils import BaseTuner
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..shared.summary import format_memory

LOG = get_logger(__name__)

_RUNTIME = "_runtime"  # a figure of every evaluation's line, behind the prefix of the set


class AdapterCallback(TrainerCallback):
    """Puts the routers' figures on the host's log line; checks and logs, once, what the optimiser holds."""

    def __init__(self, cfg: DictDefault, trainer: Trainer) -> None:
        self.cfg = cfg
        self.trainer = trainer
        self.fresh = not cfg.lora_model_dir
        self.prediction_steps = 0
        self.memory_is_logged = False
        self.log_line = LogLine()
        trainer.callback_handler.callbacks.insert(0, self.log_line)

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
            self.log_line.of_training = self._read(self._tuner(kwargs["model"]), "statistics")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            raise RuntimeError(
                "no step was trained, and an untrained adapter is not saved: the rows do not fill a batch. Use more "
                "rows, a smaller `micro_batch_size` or `gradient_accumulation_steps`, or no `sample_packing`."
            )

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.prediction_steps += 1
        # the host logs the evaluation before it tells of its end
        batches = kwargs["eval_dataloader"]
        if has_length(batches) and self.prediction_steps == len(batches):
            self.log_line.of_evaluation = self._read(self._tuner(kwargs["model"]), "eval_statistics")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.prediction_steps = 0
        if self.fresh:
            LOG.warning("evaluated a new, untrained adapter; name the trained one's folder with --lora-model-dir")
            self.fresh = False

    def _tuner(self, model: torch.nn.Module) -> BaseTuner:
        return self.trainer.accelerator.unwrap_model(model).base_model

    def _read(self, tuner: BaseTuner, figures_of: str) -> dict[str, float]:
        """What the tuner has recorded since the last time."""
        statistics = getattr(tuner, figures_of, None)
        if statistics is None:
            return {}
        return statistics.pop(lambda tensor: self.trainer.accelerator.reduce(tensor, "sum"))


class LogLine(TrainerCallback):
    """Puts figures on a log line of the trainer, whichever it is.

    Not all trainers that the host takes have a place for figures of others, and those that have have different ones.
    It is to be the first of the callbacks, so that whoever prints or sends a line has the figures in it.

    Attributes:
        of_training: for the next line of a step.
        of_evaluation: for the line of the evaluation that is about to end; there they have its prefix, which for other
            sets than the usual one is not `eval_`.
    """

    def __init__(self) -> None:
        self.of_training: dict[str, float] = {}
        self.of_evaluation: dict[str, float] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        prefix = next((key.removesuffix(_RUNTIME) for key in logs if key.endswith(_RUNTIME)), None)
        figures = {}
        if self.of_evaluation and prefix is not None:
            figures = {f"{prefix}_{name}": value for name, value in self.of_evaluation.items()}
            self.of_evaluation = {}
        elif "loss" in logs:
            figures, self.of_training = self.of_training, {}
        for line in (logs, state.log_history[-1]):
            line.update(figures)


def _check_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for key, name in trainable.items() if key not in optimised]
    if missing or len(optimised) != len(trainable):
        raise RuntimeError(
            f"the optimiser holds {len(optimised)} parameters, the adapter has {len(trainable)}; not optimised: "
            f"{missing[:5]}. They must be exactly the adapter's; check the `optimizer:` and learning-rate group keys."
        )
