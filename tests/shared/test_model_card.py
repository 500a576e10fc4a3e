"""The README.md beside a saved adapter."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.shared.model_card import BEGIN
from tests.cli.cli_helpers import save_base_model
from tests.test_adapters import logits
from tests.tiny_adapters import METHODS, config_of, families, trained
from tests.tiny_models import tiny_config, tiny_model
from tests.tt_lora_moe.pools import save_experts

TITLES = {
    "perft": "PERFT (routed, experts: 8, rank: 4)",
    "tt_lora": "TT-LoRA (rank: 4)",
    "tt_lora_moe": "TT-LoRA MoE (experts: gsm8k, boolq, rte)",
    "pt_moe": "PT-MoE (experts: 3, virtual tokens: 4)",
}


@pytest.fixture
def model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    """A trained adapter beside a base that was named by a relative path."""
    family = families(kind)[0]
    experts = save_experts(tmp_path / "experts", family) if kind == "tt_lora_moe" else []
    save_base_model(tmp_path / "base", family)
    monkeypatch.chdir(tmp_path)
    return trained(kind, AutoModelForCausalLM.from_pretrained("base"), experts)


@pytest.mark.parametrize("kind", METHODS)
def test_it_says_what_the_adapter_is_and_how_it_is_loaded_and_served(kind, model, tmp_path, monkeypatch):
    model.save_pretrained("out")
    text = Path("out", "README.md").read_text()
    size = sum(tensor.numel() for tensor in load_file("out/adapter_model.safetensors").values())
    assert f"{TITLES[kind]} for `{tmp_path / 'base'}`: {size:,} parameters" in text
    assert f"KeyError: '{kind.upper()}'" in text and "axolotl moe-serve ADAPTER" in text
    script = re.search(r"```python\n(.+?)```", text, flags=re.DOTALL)[1]
    monkeypatch.chdir("/")
    (tmp_path / "script.py").write_text(script.replace("ADAPTER", str(tmp_path / "out")))
    assert torch.equal(logits(runpy.run_path(str(tmp_path / "script.py"))["model"]), logits(model))


@pytest.mark.parametrize("kind", ["perft"])
def test_written_again_it_has_the_part_once_and_keeps_the_rest(kind, model):
    Path("out").mkdir()
    # as Axolotl's Trainer leaves it
    rest = "by hand\n\n```yaml\n# a comment\nadapter: perft\n```\n\n# outputs/mine\n\nThis model was trained.\n"
    Path("out", "README.md").write_text(f"---\nlicense: mit\n---\n{rest}")
    for _ in range(2):
        model.save_pretrained("out")
        card = ModelCard.load("out/README.md")
        assert card.text.count(BEGIN) == 1
        before, after = card.text.split(BEGIN)
        assert before.strip() == rest.partition("\n\nThis")[0].strip()
        assert "This model was trained." in after and card.data["license"] == "mit"
        assert card.data["base_model"] and "`axolotl moe-serve ADAPTER`" in after


def test_cards_of_other_adapters_are_peft_s_own(tmp_path):
    get_peft_model(tiny_model("mixtral"), config_of("perft", []))  # from here on cards are described
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert BEGIN not in (tmp_path / "README.md").read_text()


def test_a_classifier_is_loaded_as_one(tmp_path):
    base = LlamaForSequenceClassification(tiny_config("llama", num_labels=3))
    model = get_peft_model(base, TTLoraConfig(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    size = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    assert 'AutoModelForSequenceClassification.from_pretrained("BASE")' in text and f"{size:,} parameters" in text
