"""What `moe-serve` refuses before an engine is started."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from transformers.utils.import_utils import is_serve_available

from axolotl_moe_peft import PTMoeConfig, TTLoraConfig
from axolotl_moe_peft_commands import moe_serve
from tests.tiny_models import tiny_config, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")


def error_of(*arguments: str) -> str:
    result = CliRunner().invoke(moe_serve, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    return result.output


def save(config: PeftConfig, folder: Path) -> str:
    base = tiny_model("llama")
    if config.task_type == "SEQ_CLS":
        base = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    get_peft_model(base, config).save_pretrained(folder)
    return str(folder)


def test_what_is_no_adapter_of_this_package_is_named(tmp_path: Path) -> None:
    assert "is no saved adapter that PEFT can read" in error_of(str(tmp_path / "nowhere"))
    lora = save(LoraConfig(task_type="CAUSAL_LM"), tmp_path)
    assert "of type LORA, which vLLM and transformers serve without" in error_of(lora)


def test_classifiers_and_adapters_without_a_base_are_refused(tmp_path: Path) -> None:
    classifier = save(TTLoraConfig(task_type="SEQ_CLS"), tmp_path / "classifier")
    assert "only causal language models are served" in error_of(classifier)
    assert "give --base" in error_of(save(TTLoraConfig(task_type="CAUSAL_LM"), tmp_path / "adapter"))


def test_one_packed_row_for_all_requests_is_refused_where_each_has_a_decision(tmp_path: Path) -> None:
    adapter = save(PTMoeConfig(num_virtual_tokens=4, rank=2, task_type="CAUSAL_LM"), tmp_path)
    options = ("--base", "base", "--engine", "transformers", "--continuous-batching")
    assert "--continuous-batching puts the requests into one packed row" in error_of(adapter, *options)
    assert "--quantization is not tried" in error_of(adapter, *options[:-1], "--quantization=bnb-4bit")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_engine_that_is_not_installed_is_named(tmp_path: Path) -> None:
    adapter = save(TTLoraConfig(task_type="CAUSAL_LM"), tmp_path)
    assert "pip install 'axolotl-moe-peft[serve]'" in error_of(adapter, "--base", "base", "--engine", "vllm")


@pytest.mark.skipif(find_spec("vllm") is not None or is_serve_available(), reason="a server is installed here")
def test_without_a_server_it_says_what_to_install(tmp_path: Path) -> None:
    adapter = save(TTLoraConfig(task_type="CAUSAL_LM"), tmp_path)
    error = error_of(adapter, "--base", "base")
    assert "transformers[serving]" in error and "axolotl-moe-peft[serve]" in error
