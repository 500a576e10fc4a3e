"""Without Axolotl: transformers' Trainer and TRL's SFTTrainer train the same objects, router losses included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.tiny_adapters import METHODS, config_of, randomised
from tests.tiny_models import random_ids, tiny_model
from tests.tt_lora_moe.pools import save_experts

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
    "remove_unused_columns": False,
}
PROMPT, LENGTH = 4, 10
# a balance loss is not linear in the batch, the z-loss is
WITHOUT_BALANCE = {"perft": {"router_aux_loss_coef": 0.0}, "pt_moe": {"router_aux_loss_coef": 0.0}}

pytestmark = pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return save_experts(tmp_path_factory.mktemp("experts"), "mixtral")


@pytest.fixture
def train(experts: list[dict[str, str]], tmp_path: Path) -> Callable[..., tuple[PeftModel, list[float]]]:
    """Trains a new adapter of a method two steps on eight rows; the model, and the losses that were logged."""

    def run(method: str, changes: dict[str, Any] | None = None, **arguments: Any) -> tuple[PeftModel, list[float]]:
        config = config_of(method, experts, **(changes or {}))
        model = randomised(get_peft_model(tiny_model("mixtral"), config), seed=1).train()
        settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 2}
        trainer = Trainer(model, TrainingArguments(**settings | COMMON | arguments), train_dataset=rows(method))
        trainer.train()
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return run


def rows(method: str) -> Dataset:
    ids = random_ids(8, LENGTH)
    columns = {
        "input_ids": ids.tolist(),
        "labels": torch.where(torch.arange(LENGTH) < PROMPT, -100, ids).tolist(),
        "attention_mask": torch.ones_like(ids).tolist(),
    }
    if method == "tt_lora_moe":
        columns["expert_labels"] = [i % 3 for i in range(8)]
    return Dataset.from_dict(columns)


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if model.base_model.prefix in n}


@every_method
def test_accumulated_micro_batches_equal_the_whole_batch(method, train):
    changes = WITHOUT_BALANCE.get(method)
    whole, losses = train(method, changes)
    parts, parts_losses = train(method, changes, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert parts_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in weights(whole).items():
        # Adam divides by the gradient's own size, which magnifies float32's rounding of small gradients
        torch.testing.assert_close(weights(parts)[name], weight, rtol=1e-3, atol=1e-4)


@every_method
def test_reentrant_checkpointing_trains_the_same(method, train):
    plain, losses = train(method)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    checkpointed, checkpointed_losses = train(method, **reentrant)
    assert checkpointed_losses == pytest.approx(losses, rel=1e-6)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], weight, rtol=1e-4, atol=1e-6)


@every_method
def test_training_changes_the_adapter_and_nothing_else(method, train):
    base = {n: p.clone() for n, p in tiny_model("mixtral").named_parameters()}
    model, _ = train(method)
    start, _ = train(method, max_steps=1, learning_rate=0.0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, weight in weights(model).items():
        assert torch.equal(weight, weights(start)[name]) == (name not in trained), name
    after = dict(model.unload().named_parameters())
    assert base.keys() == after.keys()
    assert all(torch.equal(base[n], after[n]) for n in base)


@pytest.mark.parametrize(("method", "router"), [("perft", "perft_router"), ("pt_moe", "ptmoe_router")])
def test_the_router_losses_act_and_the_logged_loss_does_not_contain_them(method, router, train):
    on, losses = train(method, {"router_aux_loss_coef": 1.0}, max_steps=1)
    off, plain = train(method, {"router_aux_loss_coef": 0.0}, max_steps=1)
    assert losses == plain
    moved = [n for n in weights(on) if router in n and not torch.equal(weights(on)[n], weights(off)[n])]
    assert moved


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", ["perft", "tt_lora", "pt_moe"])  # a router's steps compute no logits
def test_trl_sft_trainer_takes_the_config(method, packed, experts, tmp_path):
    words = {f"w{i}": i for i in range(128)}
    ids = [random_ids(1, 7 + 3 * (i % 3), seed=i)[0].tolist() for i in range(8)]
    dataset = Dataset.from_dict(
        {"input_ids": ids, "completion_mask": [[int(i >= PROMPT) for i in range(len(row))] for row in ids]}
    )
    settings = {"per_device_train_batch_size": 4, "max_steps": 3, "max_length": 32, "packing": packed}
    trainer = SFTTrainer(
        tiny_model("mixtral"),
        SFTConfig(output_dir=str(tmp_path), completion_only_loss=True, **settings | COMMON),
        train_dataset=dataset,
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
        ),
        peft_config=config_of(method, experts),
    )
    start = {n: w.clone() for n, w in weights(trainer.model).items()}
    trainer.train()
    trained = weights(trainer.model)
    assert start and all(not torch.equal(trained[n], w) for n, w in start.items())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "saved")
    assert all(torch.equal(w, trained[n]) for n, w in weights(loaded).items())
