"""`moe-serve --engine transformers`: a client of transformers' own server gets the tokens of PEFT's `generate`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from peft import PeftConfig
from transformers import AutoTokenizer

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig, TTLoraMoeConfig
from tests.serving.served_models import NEW_TOKENS, SIZES, generated, save_adapter, save_base, save_tokenizer
from tests.serving.servers import serving
from tests.tiny_models import EOS

pytestmark = pytest.mark.serve

_FAMILY = "dots1"
TEXTS = [f"{'Why ' * (i % 5)}number {i}?" for i in range(16)]


def config_of(method: str, folder: Path) -> PeftConfig:
    if method == "perft":
        return PerftConfig(num_experts=6, rank=4, task_type="CAUSAL_LM")
    if method == "tt_lora":
        return TTLoraConfig(task_type="CAUSAL_LM")
    if method == "pt_moe":
        return PTMoeConfig(num_virtual_tokens=6, num_experts=3, rank=4, task_type="CAUSAL_LM")
    experts = [{"name": name, "path": str(folder / name)} for name in ("a", "b")]
    for seed, expert in enumerate(experts):
        base = save_base(_FAMILY, folder / "base", **SIZES)
        save_adapter(base, TTLoraConfig(task_type="CAUSAL_LM"), Path(expert["path"]), seed)
    return TTLoraMoeConfig(experts=experts, router="embedding_linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("method", ["perft", "tt_lora", "tt_lora_moe", "pt_moe"])
def test_a_client_gets_the_tokens_of_generate(method: str, tmp_path: Path) -> None:
    config = config_of(method, tmp_path)
    base = save_base(_FAMILY, tmp_path / "base", **SIZES)
    save_tokenizer(tmp_path / "base")
    model = save_adapter(base, config, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    answers = [tokens + [EOS] for tokens in generated(model, tokenizer(TEXTS).input_ids)]
    expected = [tokenizer.decode(tokens[: tokens.index(EOS)], skip_special_tokens=True) for tokens in answers]
    assert len(set(expected)) > 3
    options = ["--engine", "transformers", "--device", "cpu", "--dtype", "float32"]
    options += ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "128"]
    with serving(tmp_path / "adapter", *options, work=tmp_path) as server:
        completions = server.client.completions

        def complete(text: str) -> str:
            asked = {"model": "adapter", "max_tokens": NEW_TOKENS, "temperature": 0}
            return completions.create(prompt=text, **asked).choices[0].text

        with ThreadPoolExecutor(len(TEXTS)) as pool:
            assert list(pool.map(complete, TEXTS)) == expected
        with pytest.raises(openai.APIStatusError):
            completions.create(model="adapter", prompt=[7])
