"""Adapters that transformers loads by itself: from_pretrained, load_adapter and pipelines on an adapter's folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, pipeline
from transformers.utils import logging

from tests.cli.cli_helpers import save_base_model
from tests.test_adapters import logits, state
from tests.tiny_adapters import BLOCKS, METHODS, families, trained
from tests.tt_lora_moe.pools import save_experts

every_kind = pytest.mark.parametrize("kind", BLOCKS)
every_method = pytest.mark.parametrize("kind", METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("used")


@pytest.fixture
def saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Path, Tensor]]:
    """`saved(kind)`: a trained adapter's folder, whose base was named by a relative path, and its logits."""

    def save(kind: str) -> tuple[Path, Tensor]:
        family, out = families(kind)[0], folder / kind
        monkeypatch.chdir(folder)
        if not Path("bases", family).exists():
            save_base_model(Path("bases", family), family)
        experts = save_experts(folder / "experts", family) if kind.startswith("tt_lora_moe") else []
        model = trained(kind, AutoModelForCausalLM.from_pretrained(f"bases/{family}"), experts)
        model.save_pretrained(out)
        monkeypatch.chdir("/")
        return out, logits(model)

    return save


@every_kind
def test_it_computes_the_same_wherever_it_is_called_from_and_warns_of_nothing(kind, saved):
    out, expected = saved(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(out).eval()), expected)


@every_method
def test_in_bfloat16_it_computes_what_peft_loads(kind, saved):
    out, _ = saved(kind)
    base = AutoModelForCausalLM.from_pretrained(
        PeftConfig.from_pretrained(out).base_model_name_or_path, dtype=torch.bfloat16
    )
    expected = logits(PeftModel.from_pretrained(base, out))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)), expected)


@every_method
def test_a_pipeline_takes_it(kind, saved):
    out, _ = saved(kind)
    pipe = pipeline("text-generation", str(out))
    peft_model = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    ids = pipe.tokenizer("what is it?", return_tensors="pt")
    expected = peft_model.generate(**ids, max_new_tokens=6, do_sample=False)[0, -6:]
    answer = pipe("what is it?", max_new_tokens=6, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert answer[-6:] == expected.tolist()


@pytest.mark.parametrize("what", ["missing", "does not have"])
@every_method
def test_a_file_that_is_not_the_adapters_is_refused_and_the_model_is_as_it_was(kind, what, saved):
    out, _ = saved(kind)
    path = out / "adapter_model.safetensors"
    tensors = load_file(path)
    key = min(tensors)
    if what == "missing":
        del tensors[key]
    else:
        tensors["base_model.model.other"] = tensors[key].clone()
    save_file(tensors, path)
    with pytest.raises(RuntimeError, match=f"its adapter_config.json describes; .*{what}"):
        AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(out).base_model_name_or_path)
    before = state(base)
    with pytest.raises(RuntimeError, match=what):
        base.load_adapter(str(out))
    assert state(base) == before
    assert not base._hf_peft_config_loaded


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@every_method
def test_two_of_them_beside_each_other(kind, saved):
    out, expected = saved(kind)
    model = AutoModelForCausalLM.from_pretrained(out)
    model.load_adapter(str(out), adapter_name="second")
    # as the model's own set_adapter does, which with transformers 5.24 asks for a PEFT that is not out
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.set_adapter("second")
    assert torch.equal(logits(model), expected)
    base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(out).base_model_name_or_path)
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(logits(model), logits(base))


def test_other_adapters_are_loaded_as_ever(saved, tmp_path):
    out, _ = saved("perft")
    base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(out).base_model_name_or_path)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    logging.set_verbosity_error()
    try:
        assert AutoModelForCausalLM.from_pretrained(tmp_path)._hf_peft_config_loaded
    finally:
        logging.set_verbosity_warning()
