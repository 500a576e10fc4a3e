"""AdapterCallback: what has to happen while Axolotl's trainer runs."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from peft.tuners.tuners_utils import BaseTuner
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..shared.statistics import usage_entropy
from ..shared.summary import format_memory

LOG = get_logger(__name__)

# A router whose choices have less entropy than this (1 is uniform) over that many steps has collapsed.
_COLLAPSED, _COLLAPSE_STEPS = 0.2, 50
_RUNTIME = "_runtime"  # a figure of every evaluation's line, behind the prefix of the set


class AdapterCallback(TrainerCallback):
    """Puts the routers' figures on the host's log line; checks and logs, once, what the optimiser holds.

    It warns once if a router sends nearly everything to one expert.
    """

    def __init__(self, cfg: DictDefault, trainer: Trainer) -> None:
        self.cfg = cfg
        self.trainer = trainer
        self.fresh = not cfg.lora_model_dir
        self.prediction_steps = 0
        self.memory_is_logged = False
        self.usage_since: int | None = None  # the step after which usage is counted; None once it was warned
        self.log_line = LogLine()
        trainer.callback_handler.callbacks.insert(0, self.log_line)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.fresh = False
        self.usage_since = state.global_step
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
            tuner = self._tuner(kwargs["model"])
            self.log_line.of_training = self._read(tuner, "statistics")
            if self.usage_since is not None and state.global_step - self.usage_since >= _COLLAPSE_STEPS:
                self.usage_since = None if self._warn_of_collapse(tuner, state.global_step) else state.global_step

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

    def _warn_of_collapse(self, tuner: BaseTuner, step: int) -> bool:
        """Warn if the choices since `usage_since` were nearly all of one expert, in any layer's router."""
        statistics = getattr(tuner, "statistics", None)
        if statistics is None:
            return False
        usage = statistics.pop_usage(self._sum)
        collapsed = {key: n for key, n in usage.items() if n.sum() and usage_entropy(n) < _COLLAPSED}
        if not collapsed:
            return False
        (adapter, layer), counts_N = max(collapsed.items(), key=lambda item: item[1].max() / item[1].sum())
        LOG.warning(
            "%s: %d of %d routers have collapsed: in %s of the choices since step %d took expert %d of %d (%s). %s",
            self.cfg.adapter,
            len(collapsed),
            len(usage),
            f"{layer} {counts_N.max() / counts_N.sum():.0%}",
            self.usage_since,
            int(counts_N.argmax()),
            len(counts_N),
            f"entropy under {_COLLAPSED} until step {step}",
            tuner.peft_config[adapter].against_collapse,
        )
        return True

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.trainer.accelerator.reduce(tensor, "sum")

    def _read(self, tuner: BaseTuner, figures_of: str) -> dict[str, float]:
        """What the tuner has recorded since the last time."""
        statistics = getattr(tuner, figures_of, None)
        if statistics is None:
            return {}
        return statistics.pop(self._sum)


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
