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
from trl import SFTConfig, SFTTrainer

from tests.pt_moe.prompts import config, layer_of, pt_moe
from tests.tiny_models import random_ids, tiny_model

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


def test_accumulated_micro_batches_equal_the_whole_batch(tmp_path):
    whole, losses = train(tmp_path, rows(8, length=9))
    parts, parts_losses = train(tmp_path, rows(8, length=9), accumulate=4, batch=1)
    assert parts_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in weights(whole).items():
        # Adam divides by the gradient's own size, which magnifies float32's rounding of small gradients
        torch.testing.assert_close(weights(parts)[name], weight, rtol=1e-3, atol=1e-4)


def test_flattened_batches_train_as_padded_ones(tmp_path):
    padded, losses = train(tmp_path, rows(8))
    packed, packed_losses = train(tmp_path, rows(8), collator=DataCollatorWithFlattening())
    assert packed_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in weights(padded).items():
        torch.testing.assert_close(weights(packed)[name], weight, rtol=1e-3, atol=1e-4)


def test_training_changes_the_prompt_and_nothing_else(tmp_path):
    before = {n: p.clone() for n, p in tiny_model("llama").named_parameters()}
    start = weights(pt_moe())
    model, _ = train(tmp_path, rows(8))
    assert all(not torch.equal(weight, start[name]) for name, weight in weights(model).items())
    after = dict(model.unload().named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")
def test_trl_sft_trainer_takes_the_config(tmp_path, packed):
    ids = rows(8)["input_ids"]
    dataset = Dataset.from_dict(
        {"input_ids": ids, "completion_mask": [[int(i >= PROMPT) for i in range(len(row))] for row in ids]}
    )
    trainer = SFTTrainer(
        tiny_model("llama"),
        SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            max_length=32,
            packing=packed,
            completion_only_loss=True,
            **COMMON,
        ),
        train_dataset=dataset,
        processing_class=tokenizer(),
        peft_config=config(router_noise_std=0.1),
    )
    start = {n: w.clone() for n, w in weights(trainer.model).items()}
    trainer.train()
    trained = weights(trainer.model)
    assert all(not torch.equal(trained[n], w) for n, w in start.items())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")
    assert all(torch.equal(w, trained[n]) for n, w in weights(loaded).items())


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
