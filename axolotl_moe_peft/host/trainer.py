"""What the host's trainer is told about an adapter of this package, once both are there."""

from __future__ import annotations

from axolotl.utils.dict import DictDefault
from peft import PeftModel
from transformers import Trainer, TrainerCallback

from ..shared.batches import predicts_tokens
from .args import CONFIGS
from .callback import AdapterCallback
from .dataset_strategy import COLUMN, ExpertLabelCollator, NamelessCollator
from .fsdp2 import Fsdp2Checkpoints
from .report import RoutingReport
from .report_key import wants_report
from .rows import check_rows_have_prompts, spread_rows
from .usage_images import UsageImages, takes_images


def prepare_trainer(cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
    """Prepare the trainer for the YAML's adapter.

    Returns:
        The callbacks to add to it.

    Raises:
        ValueError: nothing of the adapter would be trained, something that is not saved with it would be, or its
            router would find no prompt in some rows.
    """
    _check_trainable(trainer.model)
    config = trainer.model.peft_config[trainer.model.active_adapter]
    if config.reads_prompts and predicts_tokens(trainer.model.get_base_model()):
        # those that were tokenised beforehand nobody has looked through
        check_rows_have_prompts("prepared rows", trainer.train_dataset, trainer.processing_class)
        check_rows_have_prompts("prepared rows for evaluation", trainer.eval_dataset, trainer.processing_class)
    trainer.model.base_model.measure_on(
        spread_rows(trainer.train_dataset, predicts_tokens(trainer.model.get_base_model())),
        trainer.model.active_adapter,
    )
    if CONFIGS[cfg.adapter].needs_expert_labels:
        _collate_expert_labels(trainer)
    if cfg.rl and "ref" in trainer.model.peft_config:
        _copy_into_reference(trainer.model)
    callbacks: list[TrainerCallback] = [AdapterCallback(cfg, trainer)]
    if config.has_router and takes_images(trainer):
        callbacks.append(UsageImages(trainer))
    if wants_report(cfg):
        trainer.data_collator = NamelessCollator(trainer.data_collator)
        trainer.eval_data_collator = NamelessCollator(trainer.eval_data_collator)
        callbacks.append(RoutingReport(cfg, trainer))
    if trainer.accelerator.is_fsdp2:
        callbacks.append(Fsdp2Checkpoints(cfg, trainer))
    return callbacks


def _check_trainable(model: PeftModel) -> None:
    of_adapter = {name: p for name, p in model.named_parameters() if model.base_model.prefix in name}
    if not any(p.requires_grad for p in of_adapter.values()):
        raise ValueError(
            f"none of the adapter's {len(of_adapter)} parameters would be trained: a key or another plugin has frozen "
            "them after it was attached. Remove what freezes parameters."
        )
    if strangers := model.base_model.trainable_strangers(model.active_adapter):
        raise ValueError(
            f"{len(strangers)} parameters that are not saved with the adapter would be trained, {strangers[0]} among "
            "them: a key or another plugin has made them trainable. Remove it; `lora_modules_to_save` trains and "
            "saves modules of the base."
        )


def _collate_expert_labels(trainer: Trainer) -> None:
    padding_side = trainer.processing_class.padding_side
    trainer.data_collator = ExpertLabelCollator(trainer.data_collator, padding_side)
    trainer.eval_data_collator = ExpertLabelCollator(trainer.eval_data_collator, padding_side)
    # else the host drops the column of rows that it does not pack
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns.append(COLUMN)


def _copy_into_reference(model: PeftModel) -> None:
    """Make TRL's frozen reference a copy of the adapter; TRL copies only parameters of modules named after it."""
    for name, parameter in model.named_parameters():
        if name.endswith(".default"):
            model.get_parameter(f"{name.removesuffix('default')}ref").data.copy_(parameter.data)
