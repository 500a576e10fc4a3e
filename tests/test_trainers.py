"""Without Axolotl: transformers' Trainer and TRL's SFTTrainer train the same objects, router losses included."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from axolotl_moe_peft import PerftConfig
from tests.tiny_models import random_ids, randomise_adapters, tiny_model

COMMON = {
    "use_cpu": True,
    "report_to": [],
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
}


def config(**kwargs) -> PerftConfig:
    settings = {"num_experts": 5, "num_experts_per_tok": 2, "rank": 4, "router_z_loss_coef": 0.05, **kwargs}
    return PerftConfig(task_type="CAUSAL_LM", **settings)


def rows(count: int, length: int = 10) -> Dataset:
    ids = random_ids(count, length)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "labels": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )


def train(folder: Path, perft_config: PerftConfig, dataset: Dataset, **kwargs) -> tuple[PeftModel, list[float]]:
    model = get_peft_model(tiny_model("mixtral"), perft_config)
    randomise_adapters(model)
    model.train()
    arguments = TrainingArguments(output_dir=str(folder), **{**COMMON, **kwargs})
    trainer = Trainer(model, arguments, train_dataset=dataset)
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if "perft_" in n}


def test_accumulated_micro_batches_equal_the_whole_batch(tmp_path):
    """The balance loss is not linear in the batch, the z-loss is."""
    settings = config(router_aux_loss_coef=0.0)
    whole, losses = train(tmp_path, settings, rows(8), per_device_train_batch_size=4, max_steps=2)
    parts, parts_losses = train(
        tmp_path, settings, rows(8), per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2
    )
    assert parts_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in adapter_weights(whole).items():
        # Adam divides by the gradient's own size, which magnifies float32's rounding of small gradients
        torch.testing.assert_close(adapter_weights(parts)[name], weight, rtol=1e-3, atol=1e-4)


def test_the_router_losses_act_and_the_logged_loss_does_not_contain_them(tmp_path):
    on, losses = train(tmp_path, config(router_aux_loss_coef=1.0), rows(4), per_device_train_batch_size=4, max_steps=1)
    off, plain = train(
        tmp_path,
        config(router_aux_loss_coef=0.0, router_z_loss_coef=0.0),
        rows(4),
        per_device_train_batch_size=4,
        max_steps=1,
    )
    assert losses == plain
    routers = [n for n in adapter_weights(on) if "perft_router" in n]
    assert all(not torch.allclose(adapter_weights(on)[n], adapter_weights(off)[n]) for n in routers)


def test_reentrant_checkpointing_trains_the_same(tmp_path):
    plain, _ = train(tmp_path, config(router_aux_loss_coef=0.5), rows(4), per_device_train_batch_size=2, max_steps=2)
    checkpointed, _ = train(
        tmp_path,
        config(router_aux_loss_coef=0.5),
        rows(4),
        per_device_train_batch_size=2,
        max_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    for name, weight in adapter_weights(plain).items():
        torch.testing.assert_close(adapter_weights(checkpointed)[name], weight, rtol=1e-4, atol=1e-6)


def test_training_changes_the_adapter_and_nothing_else(tmp_path):
    before = {n: p.clone() for n, p in tiny_model("mixtral").named_parameters()}
    model, _ = train(tmp_path, config(), rows(4), per_device_train_batch_size=2, max_steps=2)
    after = dict(model.unload().named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_trl_sft_trainer_takes_the_config(tmp_path):
    model = tiny_model("mixtral")
    dataset = rows(8).remove_columns(["labels", "attention_mask"])
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, bf16=False, **COMMON),
        train_dataset=dataset,
        processing_class=_tokenizer(),
        peft_config=config(router_aux_loss_coef=1.0),
    )
    start = {n: w.clone() for n, w in adapter_weights(trainer.model).items()}
    trainer.train()
    trained = adapter_weights(trainer.model)
    assert all(not torch.equal(trained[n], w) for n, w in start.items())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "saved")
    assert all(torch.equal(w, trained[n]) for n, w in adapter_weights(loaded).items())


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(128)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )
