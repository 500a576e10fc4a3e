"""Without Axolotl: transformers' Trainer and TRL's SFTTrainer train a prompt, padded and packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerFast, Trainer
from transformers import TrainingArguments as Arguments
from transformers.data.data_collator import torch_default_data_collator

from tests.pt_moe.prompts import layer_of, pt_moe
from tests.tiny_models import random_ids

COMMON = {
    "use_cpu": True,
    "report_to": [],
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
    "bf16": False,
}
PROMPT = 4


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(128)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )


def rows(count: int, length: int | None = None) -> Dataset:
    """Rows of this length, or of different ones, with a prompt of PROMPT tokens."""
    ids = [random_ids(1, length or 7 + 3 * (i % 3), seed=i)[0].tolist() for i in range(count)]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": [[-100] * PROMPT + row[PROMPT:] for row in ids],
            "attention_mask": [[1] * len(row) for row in ids],
        }
    )


def train(
    folder: Path, dataset: Dataset, collator=None, accumulate=1, batch=4, **settings
) -> tuple[PeftModel, list[float]]:
    model = pt_moe(**settings).train()
    arguments = Arguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=2,
        **COMMON,
    )
    trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=collator or padding_collator())
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def padding_collator() -> DataCollatorForSeq2Seq:
    return DataCollatorForSeq2Seq(tokenizer())


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in layer_of(model).named_parameters()}


def test_flattened_batches_train_as_padded_ones(tmp_path):
    padded, losses = train(tmp_path, rows(8))
    packed, packed_losses = train(tmp_path, rows(8), collator=DataCollatorWithFlattening())
    assert packed_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in weights(padded).items():
        torch.testing.assert_close(weights(packed)[name], weight, rtol=1e-3, atol=1e-4)


def test_losses_computed_from_calls_without_labels_are_refused(tmp_path):
    """As those of preference training are."""

    class Preferences(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model(input_ids=inputs["input_ids"]).logits.sum()

    arguments = Arguments(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, **COMMON)
    pairs = rows(8).rename_column("labels", "chosen_labels")
    trainer = Preferences(pt_moe().train(), arguments, train_dataset=pairs, data_collator=torch_default_data_collator)
    with pytest.raises(ValueError, match="training mode was called without labels"):
        trainer.train()
