"""What transformers' Trainer knows of a step and its model is not told.

A trainer may take the labels out of a batch before it calls the model, and compute the loss itself: label smoothing,
`compute_loss_func`, TRL's losses, Axolotl's entropy-aware loss, distillation and diffusion. Then the model sees
neither which tokens are supervised nor what share of the step's objective the batch has. No hook of transformers,
accelerate or PEFT tells it, and reading the share off the gradients that come back needs the loss. So the two methods
of Trainer through which every batch goes, in TRL and Axolotl too, are wrapped here once: they compute what they did,
and keep the batch where `current_step` finds it while they run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .batches import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import Trainer

_step: ContextVar[TrainerStep | None] = ContextVar("trainer_step", default=None)


@dataclass(frozen=True)
class TrainerStep:
    """A batch that a trainer is about to train or to evaluate on.

    Attributes:
        trainer: the trainer.
        batch: what the collator made; None if that is no mapping.
        labels: the batch's labels as the collator made them; None if it has none.
        attention_mask: its mask, likewise.
        num_labels: how many of them the loss counts; None without labels.
        num_items_in_batch: that of all batches of the optimiser step, if the trainer counts them.
    """

    trainer: Trainer
    batch: Mapping[str, Any] | None
    labels: Tensor | None
    attention_mask: Tensor | None
    num_labels: Tensor | None
    num_items_in_batch: Tensor | int | None

    def loss_scale(self) -> Tensor | float:
        """The gradient of the step's objective with respect to a mean over this batch.

        A step's objective is a mean over its batches, whoever divides: by labels where these are counted, else each
        batch has the same weight. With fp16 it is multiplied by the scaler's factor.

        Raises:
            RuntimeError: DeepSpeed scales an fp16 loss by a factor that is not known here.
        """
        trainer = self.trainer
        if trainer.is_deepspeed_enabled and trainer.args.fp16:
            raise RuntimeError(
                "router losses: DeepSpeed scales the loss for fp16, and where the trainer computes the loss outside "
                "the model their scale is not known. Train in bf16, or set the coefficients of the router losses to 0."
            )
        scaler = trainer.accelerator.scaler
        factor = 1.0 if scaler is None else scaler.get_scale()
        if self.num_items_in_batch is None or self.num_labels is None:
            return factor / trainer.current_gradient_accumulation_steps
        if trainer.args.average_tokens_across_devices:  # those of all processes, whose gradients are averaged
            factor *= trainer.accelerator.num_processes
        return factor * self.num_labels / self.num_items_in_batch


def current_step() -> TrainerStep | None:
    """The batch that a trainer of transformers trains or evaluates on at the moment, if there is one."""
    return _step.get()


def labels_of(call: Mapping[str, Any]) -> Tensor | None:
    """The labels of a model's call: those that it is given, or that the trainer has taken out of its batch."""
    labels, step = call.get("labels"), current_step()
    return step.labels if labels is None and step is not None else labels


def padding_mask_of(call: Mapping[str, Any]) -> Any:
    """The attention mask of a model's call; that of the trainer's batch, of which it may have made one of pairs."""
    mask, step, input_ids = call.get("attention_mask"), current_step(), call.get("input_ids")
    if step is None or not isinstance(step.attention_mask, Tensor) or input_ids is None:
        return mask
    by_pairs = isinstance(mask, Tensor) and mask.dim() > 2
    return step.attention_mask if by_pairs and step.attention_mask.shape == input_ids.shape else mask


def watch_trainers() -> None:
    """Have `current_step` know the batches of all trainers from now on.

    A tuner that has something to settle with its trainer does so in `prepare_trainer(trainer)`, before each batch.
    """
    from transformers import Trainer  # a second, which only training costs

    if not hasattr(Trainer.training_step, "_keeps_step"):
        Trainer.training_step = _keep_step(Trainer.training_step)  # nosemgrep: no-patching-of-others
        Trainer.prediction_step = _keep_step(Trainer.prediction_step)  # nosemgrep: no-patching-of-others


def _keep_step(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tuner = getattr(self.model, "base_model", None)
        if hasattr(tuner, "prepare_trainer"):
            tuner.prepare_trainer(self)
        num_items = kwargs.get("num_items_in_batch", args[0] if args else None)
        token = _step.set(_read_step(self, inputs, num_items))
        try:
            return method(self, model, inputs, *args, **kwargs)
        finally:
            _step.reset(token)

    wrapper._keeps_step = True
    return wrapper


def _read_step(trainer: Trainer, inputs: Any, num_items_in_batch: Any) -> TrainerStep:
    # of its own: a trainer may take something out of the one that it calls the model with
    batch = dict(inputs) if isinstance(inputs, Mapping) else None
    labels, mask = (None if batch is None else batch.get(key) for key in ("labels", "attention_mask"))
    if not isinstance(labels, Tensor):
        return TrainerStep(trainer, batch, None, mask, None, num_items_in_batch)
    counted = labels
    if isinstance(inputs.get("shift_labels"), Tensor):
        counted = inputs["shift_labels"]
    elif trainer._loss_shifts_labels:
        counted = labels[..., 1:]
    return TrainerStep(trainer, batch, labels, mask, (counted != IGNORE_INDEX).sum(), num_items_in_batch)
