"""What an adapter has to know of the base's choices before it is attached, found in the training data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..perft import calibration
from .saved import saved_adapters

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta

LOG = get_logger(__name__)
get_logger(calibration.__name__)  # so that the host shows which share is covered

_KEY = "perft.experts.calibrate"
_ROWS_OF_OTHER_KINDS = ("rl", "reward_model", "pretraining_dataset", "streaming", "processor_type")


def load_rows(cfg: DictDefault, config: PeftConfig) -> TrainDatasetMeta | None:
    """The host's datasets, where an adapter is to be calibrated on them; else None, and the host loads them.

    Args:
        cfg: the validated YAML of a run that trains.
        config: of its adapter.
    """
    if not config.calibration_rows or any(saved_adapters(cfg)):
        return None
    from axolotl.common.datasets import load_datasets

    return load_datasets(cfg=cfg)


def check_rows_can_be_counted(args: Any, config: PeftConfig) -> None:
    """Check what a validated YAML trains on, where an adapter is to be calibrated on it.

    Raises:
        ValueError: its rows have no tokens before the trainer makes them.
    """
    for key in _ROWS_OF_OTHER_KINDS if config.calibration_rows else ():
        if value := getattr(args, key, None):
            raise ValueError(_no_tokens(config, f"`{key}: {getattr(value, 'value', value)}`"))


def calibrated(config: PeftConfig, model: PreTrainedModel, rows: Any, most_tokens: int) -> PeftConfig:
    """The config of a new adapter with what the base tells of the first rows of the training data.

    The first process counts and tells the others: their base may have no weights yet (FSDP2), and where it has, other
    hardware could break a tie in another way.

    Args:
        config: of the YAML's block.
        model: the base model.
        rows: the training data as the host has prepared them; None where none were loaded.
        most_tokens: of a batch.

    Raises:
        ValueError: there are no such rows, or the base does not tell.
    """
    wanted, key = config.calibration_rows, _KEY
    if rows is None:
        raise ValueError(
            f"{key}: {wanted} rows of the training data are to be counted, and this command does not train. Name a "
            "trained adapter's folder with --lora-model-dir."
        )
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        raise ValueError(_no_tokens(config, "this dataset"))
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"{key}: DeepSpeed's ZeRO-3 divides the base before anything can be counted with it. Count in a run of "
            "one process, whose adapter_config.json has the `expert_ids` from its start on, and give those in the "
            "block; or use FSDP2."
        )
    if len(rows) < wanted:
        LOG.warning("%s: %d rows are asked for; the training data have %d, which are counted", key, wanted, len(rows))
    state, found = PartialState(), [None]
    if state.is_main_process:
        with _runs_on(state.device, model):
            batches = tqdm(_batches(rows, wanted, most_tokens), desc="calibration", unit="batch")
            found = [config.calibrated(model, batches)]
    return broadcast_object_list(found)[0]


def _no_tokens(config: PeftConfig, given: str) -> str:
    return (
        f"{_KEY}: {config.calibration_rows} rows of tokens are to be counted before training, and {given} has none "
        "then: pairs of answers, images and streams become tokens later. Count rows of the kind with "
        "`axolotl_moe_peft.calibrate_experts(base, batches, keep)`, and give what it returns as `perft.expert_ids`."
    )


def _batches(rows: Dataset, most_rows: int, most_tokens: int) -> Iterator[dict[str, Tensor]]:
    """The first rows in batches, padded on the right, where no token reads what comes after it."""
    batch: list[Tensor] = []
    for row in rows.select(range(min(most_rows, len(rows)))).select_columns("input_ids"):
        ids_S = torch.tensor(row["input_ids"], dtype=torch.int64)
        longest = max(map(len, (*batch, ids_S)))
        if batch and longest * (len(batch) + 1) > most_tokens:
            yield _padded(batch)
            batch = []
        batch += [ids_S] if len(ids_S) else []
    if batch:
        yield _padded(batch)


def _padded(rows: list[Tensor]) -> dict[str, Tensor]:
    mask = [torch.ones_like(row) for row in rows]
    return {"input_ids": pad_sequence(rows, True), "attention_mask": pad_sequence(mask, True)}


@contextmanager
def _runs_on(device: torch.device, model: PreTrainedModel) -> Iterator[None]:
    """Have a base that waits on the CPU for FSDP run on the accelerator, where only a layer at a time is.

    What is no layer, such as embeddings, is there all the time. Afterwards all is where it was.
    """
    home = model.get_input_embeddings().weight.device
    if device.type == home.type:
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    of_layers = {part for layer in layers for part in layer.modules()}
    others = [module for module in model.modules() if module not in of_layers]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(lambda layer, args: _move(layer, device)))
            stack.enter_context(layer.register_forward_hook(lambda layer, args, output: _move(layer, home)))
        for module in others:
            stack.callback(_move_own, module, home)
            _move_own(module, device)
        yield


def _move(layer: nn.Module, device: torch.device) -> None:
    layer.to(device)


def _move_own(module: nn.Module, device: torch.device) -> None:
    """Move a module's own tensors, not those of its children."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))
