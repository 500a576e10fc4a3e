"""The paper's own setting: experts that are classifiers, each with its head; the router picks both together."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

from axolotl_moe_peft import TTLoraConfig, TTLoraMoeConfig
from axolotl_moe_peft.tt_lora_moe.head import NO_CLASS
from tests.tiny_models import PAD, random_ids, tiny_config

CLASSES = {"rte": 2, "mnli": 3, "csqa": 5}
IDS = random_ids(6, 7)


def base(num_labels: int = 5, seed: int = 0) -> PreTrainedModel:
    """The same trunk each time; the head is new, and of this many classes."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=5))
    torch.manual_seed(seed)
    model.score = nn.Linear(32, num_labels, bias=False)
    model.config.num_labels = num_labels
    return model.eval()


@pytest.fixture
def entries(tmp_path: Path) -> list[dict[str, str]]:
    for seed, (name, classes) in enumerate(CLASSES.items()):
        torch.manual_seed(seed)
        model = peft.get_peft_model(base(classes, seed), TTLoraConfig(rank=2, alpha=300, task_type="SEQ_CLS"))
        model.save_pretrained(tmp_path / name)
    return [{"name": name, "path": str(tmp_path / name)} for name in CLASSES]


def pool(entries: list[dict[str, str]], **kwargs) -> PeftModel:
    config = TTLoraMoeConfig(experts=entries, router_noise=False, task_type="SEQ_CLS", **kwargs)
    torch.manual_seed(3)
    model = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ttmoe_weight.default"):
                parameter.normal_(std=2)
    return model.eval()


@torch.no_grad()
def test_each_row_gets_its_experts_cores_and_head(entries):
    model = pool(entries)
    ids = torch.cat([IDS, torch.nn.functional.pad(IDS[:, :4], (0, 3), value=PAD)])
    mask = (ids != PAD).long()
    logits = model(input_ids=ids, attention_mask=mask).logits
    chosen = model.base_model.chosen_experts["default"].tolist()
    assert len(set(chosen)) > 1
    for row, expert in enumerate(chosen):
        name, classes = list(CLASSES.items())[expert]
        alone = PeftModel.from_pretrained(base(classes, 9), entries[expert]["path"]).eval()
        expected = alone(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row, :classes], expected, rtol=1e-4, atol=1e-4)
        assert (logits[row, classes:] == NO_CLASS).all(), name
    assert model(input_ids=ids, attention_mask=mask, labels=torch.full((len(ids),), 4)).loss.isfinite()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, base()(input_ids=IDS).logits)


@torch.no_grad()
def test_a_pool_saves_loads_grows_and_unloads(entries, tmp_path):
    model = pool(entries[1:])
    model.save_pretrained(tmp_path / "pool")
    loaded = PeftModel.from_pretrained(base(seed=4), tmp_path / "pool").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    loaded.base_model.add_expert(**entries[0])
    loaded.save_pretrained(tmp_path / "grown")
    again = PeftModel.from_pretrained(base(seed=4), tmp_path / "grown").eval()
    assert torch.equal(again(input_ids=IDS).logits, loaded(input_ids=IDS).logits)
    plain = base(seed=4)
    assert torch.equal(again.unload()(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize("router", ["base_hidden", "embedding_linear"])
def test_trainer_teaches_the_router_which_classifier_answers(router, entries, tmp_path):
    model = pool(entries, router=router)
    experts = [i % 3 for i in range(24)]
    rows = {
        "input_ids": [[10 + 30 * e + k for k in range(5)] for e in experts],
        "labels": [i % (2, 3, 5)[e] for i, e in enumerate(experts)],
        "expert_labels": experts,
    }
    arguments = TrainingArguments(
        str(tmp_path / "out"), num_train_epochs=30, per_device_train_batch_size=12, learning_rate=0.05,
        remove_unused_columns=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    heads = model.base_model.model.score.ttmoe_heads["default"].clone()
    Trainer(model, arguments, train_dataset=Dataset.from_dict(rows)).train()
    model.eval()(input_ids=torch.tensor(rows["input_ids"]))
    assert model.base_model.chosen_experts["default"].tolist() == experts
    assert torch.equal(model.base_model.model.score.ttmoe_heads["default"], heads)


def test_what_does_not_fit_is_refused(entries, tmp_path):
    config = TTLoraMoeConfig(experts=entries, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="2, 3, 5 classes, but this LlamaForSequenceClassification has num_labels=2"):
        peft.get_peft_model(base(2), config)
    peft.get_peft_model(base(), TTLoraConfig()).save_pretrained(tmp_path / "headless")
    headless = [{"name": "headless", "path": str(tmp_path / "headless")}]
    with pytest.raises(ValueError, match="headless .* has no head that fits this classifier's score"):
        peft.get_peft_model(base(), TTLoraMoeConfig(experts=headless, task_type="SEQ_CLS"))
