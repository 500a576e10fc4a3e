"""The base router's loss acts as `base_router_aux_loss_coef` says, whatever the model's configuration and TRL add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from axolotl_moe_peft import PerftConfig
from tests.tiny_models import random_ids, randomise_adapters, tiny_model

PAIRS = [{"prompt": f"w{i} w5", "chosen": "w9 w8", "rejected": f"w{i + 20}"} for i in range(4)]
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, [{"text": f"w{i} w{i + 3} w9 w7"} for i in range(4)], {"max_length": 16}),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {"max_length": 16}),
    "kto": (
        KTOTrainer,
        KTOConfig,
        [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(PAIRS)],
        {"max_length": 16},
    ),
    "grpo": (GRPOTrainer, GRPOConfig, [{"prompt": p["prompt"]} for p in PAIRS], {"max_completion_length": 3}),
}
PERFT = {"task_type": "CAUSAL_LM", "num_experts": 3, "rank": 4, "router_aux_loss_coef": 0.0}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def adapted(**settings: Any) -> PeftModel:
    """Of a base whose configuration has a coefficient large enough to be seen in one step."""
    base = tiny_model("olmoe")
    base.config.router_aux_loss_coef = 10.0
    model = get_peft_model(base, PerftConfig(**PERFT | settings))
    randomise_adapters(model)
    return model


def trainer(name: str, folder: Path, model: Any, **arguments: Any) -> Any:
    trainer_cls, config_cls, rows, settings = TRAINERS[name]
    settings = settings | {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }
    rewards = {}
    if name == "grpo":
        settings["num_generations"] = 4
        rewards["reward_funcs"] = lambda completions, **kwargs: [float(len(c)) + i for i, c in enumerate(completions)]
    return trainer_cls(
        model,
        args=config_cls(**settings | arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **rewards,
    )


def trained(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", TRAINERS)
def test_trl_adds_no_loss_of_the_base_router(name, tmp_path, caplog):
    found = []
    caplog.set_level("INFO", logger="axolotl_moe_peft")
    for arguments in ({}, {"router_aux_loss_coef": 0.0}):
        model = adapted()
        run = trainer(name, tmp_path, model, **arguments)
        run.train()
        assert not any("aux_loss" in entry and "router" not in key for entry in run.state.log_history for key in entry)
        found.append(trained(model))
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
    said = [r.getMessage() for r in caplog.records if "would add the base router's loss" in r.getMessage()]
    assert len(said) == 1 and "base_router_aux_loss_coef: 0.0 (default)" in said[0]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_coefficient_given_to_trl_is_refused(name, tmp_path):
    run = trainer(name, tmp_path, adapted(), router_aux_loss_coef=0.5)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef: 0.5 of \w+Config .*`base_router_aux_loss_coef`"):
        run.train()


def test_the_adapters_own_coefficient_acts_once_under_trl(tmp_path):
    on, off = adapted(base_router_aux_loss_coef=1.0), adapted()
    for model in (on, off):
        trainer("sft", tmp_path, model).train()
    plain = adapted(base_router_aux_loss_coef=1.0)
    trainer("sft", tmp_path, plain, router_aux_loss_coef=0.0).train()
    assert all(torch.equal(weight, trained(plain)[name]) for name, weight in trained(on).items())
    assert any(not torch.equal(weight, trained(off)[name]) for name, weight in trained(on).items())


def test_a_base_that_would_add_its_own_loss_does_not_and_has_it_back_afterwards(caplog):
    base = tiny_model("olmoe")
    base.config.output_router_logits = True
    ids = random_ids(1, 8)
    before = base(input_ids=ids, labels=ids).loss.item()
    model = get_peft_model(base, PerftConfig(**PERFT))
    assert "output_router_logits" in caplog.text
    alone = model(input_ids=ids, labels=ids)
    assert alone.loss.item() < before
    assert model(input_ids=ids, labels=ids, output_router_logits=True).loss.item() == alone.loss.item()
    assert model.unload()(input_ids=ids, labels=ids).loss.item() == before
