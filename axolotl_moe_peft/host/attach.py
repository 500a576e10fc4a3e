"""Attaches the adapter of a validated YAML to the loaded base model."""

from __future__ import annotations

import dataclasses
from typing import Any

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainingArguments, set_seed

from ..perft.selection import find_moe_blocks
from ..shared.summary import format_table
from .args import CONFIGS
from .calibration import calibrated
from .saved import CONTINUED, continued, own_fields, saved_adapters

# PEFT's fields for what it trains beside an adapter, and the YAML's keys for them
BESIDE = {
    "modules_to_save": "lora_modules_to_save",
    "trainable_token_indices": "peft_trainable_token_indices",  # nosec B105
}

LOG = get_logger(__name__)


def peft_config(cfg: DictDefault, model: PreTrainedModel | None = None) -> PeftConfig:
    """The PEFT config of the YAML's block, for a base model of that kind (None: a causal LM)."""
    block, config_cls = cfg[cfg.adapter], CONFIGS[cfg.adapter]
    # by name: the host leaves out what is null, which is not always the default
    settings: dict[str, Any] = {name: block.get(name) for name in own_fields(config_cls)}
    for field, key in BESIDE.items():
        if cfg[key]:
            settings[field] = cfg[key]
    return config_cls(**settings, task_type=_task_type(model))


def seed_the_start(cfg: DictDefault) -> None:
    """Make what a new adapter, or a new expert of an old one, starts from that of the YAML's seed.

    The host and TRL seed after they have attached it, and under FSDP2 each process keeps its part of its own start.
    """
    set_seed(TrainingArguments.seed if cfg.seed is None else cfg.seed)


def _task_type(model: PreTrainedModel | None) -> TaskType:
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        return TaskType.SEQ_CLS
    if kind.endswith("ForTokenClassification"):
        return TaskType.TOKEN_CLS
    return TaskType.CAUSAL_LM


def attach(
    model: PreTrainedModel, cfg: DictDefault, inference: bool, rows: Dataset | None = None
) -> tuple[PeftModel, PeftConfig]:
    """Attach the YAML's adapter, new or that of `lora_model_dir`, and log what it consists of.

    Args:
        model: the base model.
        cfg: the validated YAML.
        inference: whether the adapter is not trained.
        rows: the training data, for what is found in them before an adapter is made.

    Raises:
        ValueError: the saved adapter is damaged or another one than the YAML describes, or the adapter does not fit
            the base model.
    """
    config = peft_config(cfg, model)
    if config.calibration_rows and not cfg.lora_model_dir:
        most_tokens = cfg.micro_batch_size * cfg.sequence_len
        config = _resumed(config, cfg) or calibrated(config, model, rows, most_tokens)
    seed_the_start(cfg)
    kwargs = {}
    if cfg.peft_autocast_adapter_dtype is not None:
        kwargs["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
    if cfg.lora_model_dir:
        saved = dataclasses.replace(continued(config, CONTINUED, cfg.lora_model_dir), task_type=config.task_type)
        try:
            model = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, config=saved, is_trainable=not inference, **kwargs
            )
        except (KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"lora_model_dir: {cfg.lora_model_dir!r} cannot be loaded: {error}") from None
        for expert in config.added_to(saved):
            LOG.info("adding the expert %s to the pool", expert)
        model.base_model.add_what_is_new(config)
        config = model.active_peft_config
    else:
        model = get_peft_model(model, config, **kwargs)
    _log_what_is_there(model, cfg)
    return model, config


def _resumed(config: PeftConfig, cfg: DictDefault) -> PeftConfig | None:
    """The config of a run that goes on from a checkpoint, whose tensors the host loads into a new adapter."""
    return next((continued(config, key, folder) for key, folder in saved_adapters(cfg)), None)


def _log_what_is_there(model: PeftModel, cfg: DictDefault) -> None:
    new = not cfg.lora_model_dir
    what = "attached, trainable parameters" if new else f"of {cfg.lora_model_dir!r} loaded, its parameters"
    LOG.info("%s adapter %s:\n%s", cfg.adapter, what, format_table(model.base_model.parameter_rows()))
    if new:
        has_routers = bool(find_moe_blocks(model.get_base_model()))
        LOG.info("the base model is frozen%s", ", routers of its own included" if has_routers else "")
    layers = getattr(model.base_model, "adapted_layers", None)
    if layers is not None and len(layers) != model.config.get_text_config().num_hidden_layers:
        LOG.info("layers with an adapter: %s", ", ".join(map(str, layers)))
    left_alone = getattr(model.base_model, "blocks_left_alone", None)
    if left_alone:
        LOG.info("MoE blocks left alone, which `target_modules` can name: %s", ", ".join(left_alone))
