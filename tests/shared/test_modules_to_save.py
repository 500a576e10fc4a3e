"""Heads, added tokens and other modules of the base that PEFT trains beside an adapter: as with LoRA."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from tests.shared.methods import config_of
from tests.tiny_models import VOCAB_SIZE, random_ids, tiny_config, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")

TRAINED = ("perft", "tt_lora", "pt_moe", "lora")
TASKS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 2, 1])}, "score"),
    "TOKEN_CLS": (AutoModelForTokenClassification, {"labels": torch.arange(3 * 7).view(3, 7) % 3}, "score"),
    "QUESTION_ANS": (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 5])},
        "qa_outputs",
    ),
}
IDS = random_ids(3, 7)


def config(method: str, folder: Path, **kwargs) -> PeftConfig:
    if method == "lora":
        return LoraConfig(target_modules=["q_proj", "v_proj"], **{"task_type": "CAUSAL_LM", **kwargs})
    return config_of(method, folder, **kwargs)


def classifier(task: str, head_seed: int) -> PreTrainedModel:
    """The same trunk each time, and a head of its own, as from_pretrained initialises one."""
    torch.manual_seed(0)
    model = TASKS[task][0].from_config(tiny_config("mixtral", num_labels=3))
    torch.manual_seed(head_seed)
    nn.init.normal_(getattr(model, TASKS[task][2]).weight)
    return model.eval()


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(input_ids=IDS)
    return output.start_logits if "start_logits" in output else output.logits


def train(model: PeftModel, **batch) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), **batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("task", TASKS)
def test_the_head_is_trained_saved_and_loaded(task, method, tmp_path):
    _, labels, head = TASKS[task]
    model = peft.get_peft_model(classifier(task, 1), config(method, tmp_path, task_type=task))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any(f"{head}.modules_to_save.default" in name for name in start)
    train(model, **labels)
    parameters = dict(model.named_parameters())
    assert not torch.equal(
        parameters[f"base_model.model.{head}.modules_to_save.default.weight"],
        start[f"base_model.model.{head}.modules_to_save.default.weight"],
    )
    model.save_pretrained(tmp_path / "adapter")
    assert f"base_model.model.{head}.weight" in load_file(tmp_path / "adapter/adapter_model.safetensors")
    expected = logits_of(model)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(classifier(task, 2), tmp_path / "adapter", low_cpu_mem_usage=low)
        assert torch.equal(logits_of(loaded), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model), logits_of(classifier(task, 1)))


@pytest.mark.parametrize("method", TRAINED)
def test_an_adapter_without_its_head_does_not_load_and_leaves_the_base(method, tmp_path):
    model = peft.get_peft_model(classifier("SEQ_CLS", 1), config(method, tmp_path, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "score" not in key}, path)
    base = classifier("SEQ_CLS", 2)
    expected = logits_of(base)
    error = (
        (KeyError, "score.weight") if method == "lora" else (RuntimeError, "missing: .*score.weight, which is trained")
    )
    with pytest.raises(error[0], match=error[1]):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    if method != "lora":
        assert type(base.score) is nn.Linear and torch.equal(logits_of(base), expected)


@pytest.mark.parametrize("method", TRAINED)
def test_heads_belong_to_their_adapter(method, tmp_path):
    alone = {}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = peft.get_peft_model(classifier("SEQ_CLS", seed), config(method, tmp_path, task_type="SEQ_CLS"))
        train(model, labels=torch.tensor([seed, 2, 1]))
        model.save_pretrained(tmp_path / name)
        alone[name] = logits_of(model)
    model = PeftModel.from_pretrained(classifier("SEQ_CLS", 9), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("second", "first"):
        model.set_adapter(name)
        assert torch.equal(logits_of(model), alone[name])
    model.delete_adapter("first")
    model.set_adapter("second")
    assert torch.equal(logits_of(model), alone["second"])
    assert torch.equal(logits_of(model.unload()), logits_of(model.model if hasattr(model, "model") else model))


# ------------------------------------------------------------------------------------------------------ added tokens


def with_tokens(folder: Path, added: int = 3) -> PreTrainedModel:
    if not (folder / "base").exists():
        tiny_model("mixtral").save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(5)
    base.resize_token_embeddings(VOCAB_SIZE + added, mean_resizing=False)
    return base.eval()


BESIDE = {
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [VOCAB_SIZE, VOCAB_SIZE + 1]},
}


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("beside", BESIDE)
def test_added_tokens_are_trained_saved_and_loaded(beside, method, tmp_path):
    ids = torch.tensor([[5, VOCAB_SIZE, 7, VOCAB_SIZE + 1]])
    model = peft.get_peft_model(with_tokens(tmp_path), config(method, tmp_path, **BESIDE[beside]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.where(torch.arange(4) < 2, -100, ids)
    for _ in range(2):
        model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("embed_tokens" in name and "default" in name for name in moved)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(with_tokens(tmp_path), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
