"""A heat map of the adapter's routers with every evaluation, for the trackers of a run that take images."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from ..perft.block import layer_index
from ..report.measure import describe_layer
from ..shared.batches import real_token_mask
from ..shared.choices import watch_choices
from ..shared.routing import Routing, expert_counts
from ..shared.trainer_step import TrainerStep, current_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TAG = "routing/usage"


def takes_images(trainer: Trainer) -> bool:
    """Whether a tracker of the trainer takes images, and there is something to draw them with."""
    return find_spec("matplotlib") is not None and any(
        isinstance(callback, tuple(_SENDERS)) for callback in trainer.callback_handler.callbacks
    )


class UsageImages(TrainerCallback):
    """Counts what the adapter's routers choose while the trainer evaluates, and sends a picture of it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._watching = ExitStack()
        self._counts: dict[str | None, Tensor] = {}
        self._num_active = 0
        self._masked: tuple[TrainerStep | None, Tensor | None] = (None, None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watching.enter_context(watch_choices(self._note))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watching.close()

    def _note(self, adapter_name: str, layer: str | None, routing: Routing) -> None:
        step = current_step()
        if step is None or self.trainer.model.training:  # generation, and training
            return
        mask_T = None
        if layer is not None:
            mask_T = self._mask_of(step)
            if mask_T is not None and len(mask_T) != len(routing.indices_TK):
                return  # a trainer that calls the model with something else than its batch
        counts_N = expert_counts(routing.indices_TK, routing.logits_TN.shape[1], mask_T)
        self._counts[layer] = self._counts[layer] + counts_N if layer in self._counts else counts_N
        self._num_active = routing.indices_TK.shape[1]

    def _mask_of(self, step: TrainerStep) -> Tensor | None:
        if self._masked[0] is not step:
            batch = step.batch or {}
            mask_BS = real_token_mask(
                batch.get("input_ids"), step.attention_mask, batch.get("position_ids"), step.labels
            )
            self._masked = (step, None if mask_BS is None else mask_BS.flatten())
        return self._masked[1]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        counts, self._counts = self._counts, {}
        self._masked = (None, None)
        accelerator = self.trainer.accelerator
        layers = [
            describe_layer(
                None if name is None else layer_index(name),
                name,
                accelerator.reduce(counts_N, "sum").round().long().cpu().unsqueeze(0),
            )
            for name, counts_N in counts.items()
        ]
        if layers and accelerator.is_main_process:
            figure = self._figure(layers)
            for callback, send in self._trackers():
                send(callback, figure, state.global_step)

    def _figure(self, layers: list[dict[str, Any]]) -> Figure:
        from ..report.figures import usage_figure

        most = max(len(layer["choices"][0]) for layer in layers)
        router = {
            "of": "adapter",
            "unit": "prompt" if layers[0]["block"] is None else "token",
            "experts": [str(i) for i in range(most)],
            "experts_per_choice": self._num_active,
            "layers": layers,
        }
        return usage_figure([router])

    def _trackers(self) -> Iterator[tuple[TrainerCallback, Callable[[Any, Figure, int], None]]]:
        for callback in self.trainer.callback_handler.callbacks:
            send = next((send for kind, send in _SENDERS.items() if isinstance(callback, kind)), None)
            if send is not None:
                yield callback, send


def _to_tensorboard(callback: TensorBoardCallback, figure: Figure, step: int) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_figure(_TAG, figure, step)
        callback.tb_writer.flush()


def _to_wandb(callback: WandbCallback, figure: Figure, step: int) -> None:
    import wandb
    from PIL import Image

    if wandb.run is not None:
        with io.BytesIO() as file:
            figure.savefig(file, format="png")
            image = Image.open(file).convert("RGB")
        wandb.log({_TAG: wandb.Image(image), "train/global_step": step})


def _to_mlflow(callback: MLflowCallback, figure: Figure, step: int) -> None:
    import mlflow

    if mlflow.active_run() is not None:
        mlflow.log_figure(figure, f"{_TAG}-{step}.png")


_SENDERS: dict[type[TrainerCallback], Callable[[Any, Any, int], None]] = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: _to_wandb,
    MLflowCallback: _to_mlflow,
}
