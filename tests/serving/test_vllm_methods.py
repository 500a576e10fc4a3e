"""`moe-serve` with vLLM's server and adapters that are LoRAs, or prompts, to the engine: PEFT's tokens for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from axolotl_moe_peft import PTMoeConfig, TTLoraConfig, TTLoraMoeConfig
from axolotl_moe_peft.serving.start import serve
from tests.serving.served_models import NEW_TOKENS, SIZES, generated, prompts, save_adapter, save_base, save_tokenizer
from tests.serving.servers import Server, serving
from tests.serving.test_vllm_server import OPTIONS

pytestmark = pytest.mark.serve

TWO_PROCESSES = ("--tensor-parallel-size", "2")
NGRAM = (
    *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'),
    *("--max-num-batched-tokens", "256"),
)
EXPERTS = {"gsm8k": {"rank": 2, "alpha": 40}, "boolq": {"rank": 5, "alpha": 16}, "rte": {"rank": 3, "alpha": 30}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; adapters are saved beside it."""
    folder = tmp_path_factory.mktemp("methods")
    save_base("llama", folder / "base", **SIZES)
    save_tokenizer(folder / "base")
    return folder


def base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()


def assert_served(server: Server, name: str, model: PeftModel) -> list[list[int]]:
    expected = generated(model, prompts())
    assert len({tuple(tokens) for tokens in expected}) > len(expected) // 2
    assert server.completions(name, prompts(), NEW_TOKENS) == expected
    return expected


@pytest.mark.parametrize("more", [(), (*TWO_PROCESSES, *NGRAM)], ids=["", "two processes, n-gram speculation"])
def test_a_tt_lora_adapter_beside_its_base(more: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    config = TTLoraConfig(rank=5, alpha=16, task_type="CAUSAL_LM")
    model = save_adapter(base(folder), config, folder / "tt")
    with serving(folder / "tt", *OPTIONS, *more, work=tmp_path) as server:
        assert server.models() == [str(folder / "base"), "tt"]
        expected = assert_served(server, "tt", model)
        with model.disable_adapter():
            of_base = generated(model, prompts())
        assert of_base != expected
        assert server.completions(str(folder / "base"), prompts(), NEW_TOKENS) == of_base


@pytest.mark.parametrize(("router", "more"), [("embedding_linear", ()), ("base_hidden", TWO_PROCESSES)])
def test_a_pool_whose_router_chooses_for_each_request(
    router: str, more: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    entries = []
    for seed, (name, keys) in enumerate(EXPERTS.items()):
        save_adapter(base(folder), TTLoraConfig(task_type="CAUSAL_LM", **keys), folder / name, seed)
        entries.append({"name": name, "path": str(folder / name)})
    config = TTLoraMoeConfig(experts=entries, router=router, task_type="CAUSAL_LM")
    model = save_adapter(base(folder), config, folder / router)
    with torch.no_grad():  # else one expert wins everywhere: the mean of random embeddings is near zero
        for name, parameter in model.named_parameters():
            if name.endswith("ttmoe_bias.default"):
                parameter.zero_()
    model.save_pretrained(folder / router)
    chosen = []
    for prompt in prompts():
        model(input_ids=torch.tensor([prompt]))
        chosen.append(config.expert_names[model.chosen_experts["default"].item()])
    assert set(chosen) == set(EXPERTS)
    with serving(folder / router, *OPTIONS, *more, work=tmp_path) as server:
        assert server.models() == [str(folder / "base"), router, *(f"{router}/{name}" for name in EXPERTS)]
        expected = assert_served(server, router, model)
        for name in EXPERTS:  # each can be asked for by name, and is what the router has chosen elsewhere
            answers = server.completions(f"{router}/{name}", prompts(), NEW_TOKENS)
            same = [answer == right for answer, right in zip(answers, expected)]
            assert all(right for right, c in zip(same, chosen) if c == name) and not all(same)


@pytest.mark.parametrize(
    ("keys", "refused"),
    [({"modules_to_save": ["lm_head"]}, "have no modules_to_save"), ({"rank": 600}, "LoRAs up to rank 512")],
)
def test_what_is_no_lora_to_vllm_is_refused(keys: dict[str, Any], refused: str, folder: Path, tmp_path: Path) -> None:
    config = TTLoraConfig(task_type="CAUSAL_LM", **keys)
    save_adapter(base(folder), config, tmp_path / "adapter")
    with pytest.raises(ValueError, match=refused):
        serve(str(tmp_path / "adapter"), None, "vllm", 8000, [])


def test_a_quantised_base_is_refused(folder: Path, tmp_path: Path) -> None:
    save_adapter(base(folder), TTLoraConfig(task_type="CAUSAL_LM"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="quantised base model"):
        serve(str(tmp_path / "adapter"), None, "vllm", 8000, ["--quantization", "fp8"])


@pytest.mark.parametrize("more", [(), TWO_PROCESSES], ids=["", "two processes"])
def test_prompts_that_are_mixed_for_each_request(more: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    config = PTMoeConfig(num_virtual_tokens=6, num_experts=3, rank=4, task_type="CAUSAL_LM")
    model = save_adapter(base(folder), config, folder / "pt")
    with serving(folder / "pt", *OPTIONS, *more, work=tmp_path) as server:
        assert server.models() == ["pt"]
        assert_served(server, "pt", model)
        with pytest.raises(openai.BadRequestError):
            server.client.completions.create(model="pt", prompt=[])
        answer = server.client.chat.completions.create(
            model="pt", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0
        )
        assert answer.usage.completion_tokens == 4
