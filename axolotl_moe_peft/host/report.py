"""The routing report of a run: which rows it is measured on, and writing it when training ends or a command asks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..report.measure import VERSION, Processes, Row, measure
from ..report.page import write
from ..shared.batches import IGNORE_INDEX
from .dataset_strategy import COLUMN, DATASET_COLUMN
from .host_keys import REPORT
from .saved import last_checkpoint

LOG = get_logger(__name__)

_STATE = "trainer_state.json"
_FIGURES = ("expert_", "router_", "base_router_")  # how those of the log begin
_PREPARED = "rows tokenised beforehand"


class RoutingReport(TrainerCallback):
    """Writes the report of the trainer's model.

    Args:
        cfg: the validated YAML, which asks for it.
        trainer: the trainer.

    Attributes:
        error: what kept the report at the end of training from being written.

    Raises:
        ValueError: the evaluation data is not such that it can be gone through twice.
    """

    def __init__(self, cfg: DictDefault, trainer: Trainer) -> None:
        self.cfg, self.trainer = cfg, trainer
        self.error: Exception | None = None
        if not isinstance(trainer.eval_dataset, Dataset):
            raise ValueError(
                f"{cfg.adapter}.{REPORT}: true needs evaluation data that is prepared before training, and this is a "
                f"{type(trainer.eval_dataset).__name__}. Give `test_datasets` without `streaming`."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the host saves the adapter after this, and leaves its other processes before its hook for what comes then
        try:
            self.write(self.trainer.model_wrapped, str(args.output_dir), state.log_history, state.global_step)
        except Exception as error:
            LOG.error("the routing report was not written: %s", error)
            self.error = error

    def write_of_saved(self) -> None:
        """Write the report of the adapter in `lora_model_dir`, for a trainer that has not trained."""
        state = read_state(self.cfg.lora_model_dir)
        self.write(
            _prepared(self.trainer), self.cfg.lora_model_dir, state.get("log_history", []), state.get("global_step")
        )

    def write(self, model: nn.Module, folder: str, log_history: list[dict[str, Any]], step: int | None) -> None:
        """Measure the trainer's model on the evaluation data, every process its share, and write the report.

        Args:
            model: as it is called.
            folder: of the adapter, for the report.
            log_history, step: of its training, as far as they are known.
        """
        trainer, cfg, accelerator = self.trainer, self.cfg, self.trainer.accelerator
        names, rows = self._named_rows()
        LOG.info("measuring the routers on %d rows of %d datasets", len(rows), len(names))
        adapted = accelerator.unwrap_model(model, keep_torch_compile=False)
        measured = measure(
            adapted,
            rows,
            names,
            partial(trainer.processing_class.decode, skip_special_tokens=False),
            tokens_per_batch=self._tokens_per_batch(rows),
            call=model,
            device=accelerator.device,
            processes=Processes(
                accelerator.process_index,
                accelerator.num_processes,
                partial(accelerator.reduce, reduction="sum"),
                gather_object,
            ),
        )
        if accelerator.is_main_process:
            described = {
                "version": VERSION,
                "method": cfg.adapter,
                "adapter": adapted.peft_config[adapted.active_adapter].title,
                "base_model": cfg.base_model,
                "folder": folder,
                "step": step,
            }
            report = {**described, **measured, "history": history_of(log_history)}
            paths = write(report, Path(cfg.output_dir))
            LOG.info("the routing report: %s", ", ".join(map(str, paths)))

    def _tokens_per_batch(self, rows: list[Row]) -> int:
        """As many as the largest batch of the trainer's own evaluation has, whose memory there is."""
        packed = self.cfg.sample_packing and self.cfg.eval_sample_packing is not False
        length = self.cfg.sequence_len if packed else max((len(row.input_ids) for row in rows), default=1)
        return self.trainer.args.per_device_eval_batch_size * length

    def _named_rows(self) -> tuple[list[str], list[Row]]:
        """The names of the datasets that have rows, in the order of the YAML, and the rows."""
        known = [json.loads(entry["conversation"])["dataset"] for entry in self.cfg.test_datasets or self.cfg.datasets]
        rows = self.trainer.eval_dataset
        if DATASET_COLUMN in rows.column_names:
            of_row = [_PREPARED if name is None else name for name in rows[DATASET_COLUMN]]
        else:
            of_row = [known[0] if len(known) == 1 else _PREPARED] * len(rows)
        names = [name for name in [*known, _PREPARED] if name in set(of_row)]
        experts = [label[0] for label in rows[COLUMN]] if COLUMN in rows.column_names else [IGNORE_INDEX] * len(rows)
        texts = zip(rows["input_ids"], rows["labels"], of_row, experts)
        return names, [Row(ids, labels, names.index(name), expert) for ids, labels, name, expert in texts if ids]


def report_of(callbacks: Iterable[TrainerCallback]) -> RoutingReport | None:
    """The one of a trainer's callbacks that writes the report; None if none was asked for."""
    return next((callback for callback in callbacks if isinstance(callback, RoutingReport)), None)


def check_that_it_was_written(callbacks: Iterable[TrainerCallback]) -> None:
    """Tell what kept the report of a training run from being written, once the adapter is saved.

    Raises:
        RuntimeError: it was not written.
    """
    report = report_of(callbacks)
    if report is not None and report.error is not None:
        raise RuntimeError(
            f"the adapter is trained and saved in {report.cfg.output_dir}, but its routing report was not written: "
            f"{report.error}. `axolotl moe-report` writes it, too."
        ) from report.error


def history_of(log_history: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The routers' figures of the lines of training steps: (step, value), by name."""
    history: dict[str, list[tuple[int, float]]] = {}
    for line in log_history:
        for key, value in line.items() if "loss" in line else ():
            if key.startswith(_FIGURES):
                history.setdefault(key, []).append((line["step"], value))
    return history


def read_state(folder: str) -> dict[str, Any]:
    """What the trainer left beside an adapter, or beside its last checkpoint; empty if it left nothing."""
    for path in _states(folder):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return {}


def _states(folder: str) -> Iterator[Path]:
    yield Path(folder) / _STATE
    if Path(folder).is_dir() and (checkpoint := last_checkpoint(folder)):
        yield Path(checkpoint) / _STATE


def _prepared(trainer: Trainer) -> nn.Module:
    """The model of a trainer that has not trained, as it is to be called for evaluation."""
    accelerator, model = trainer.accelerator, trainer.model
    if not trainer.is_fsdp_enabled:
        return accelerator.prepare_model(model, evaluation_mode=True)
    # FSDP2 shards a model together with its optimiser alone
    trainer.model, trainer.optimizer = accelerator.prepare(model, trainer.create_optimizer())
    return trainer.model
