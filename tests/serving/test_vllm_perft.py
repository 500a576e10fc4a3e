"""PERFT inside vLLM: its greedy tokens are those of PEFT's `generate`, whatever vLLM makes of a batch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from axolotl_moe_peft import PerftConfig, TTLoraConfig
from tests.serving.served_models import ENGINE, SIZES, generated, prompts, save_adapter, save_base
from tests.tiny_models import tiny_model

# before vLLM is imported: one process, and little memory for its cache
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

from vllm import LLM, SamplingParams  # noqa: E402

pytestmark = pytest.mark.serve

_ROUTED = {"num_experts": 6, "num_experts_per_tok": 2}
_NO_GRAPH = {"enforce_eager": True}


@dataclass
class Case:
    """An adapter's keys on a family, and what vLLM is given beside them."""

    family: str
    keys: dict[str, Any]
    sizes: dict[str, Any]
    options: dict[str, Any]

    @property
    def architecture(self) -> str:
        return "PerftDenseForCausalLM" if self.family == "mistral" else "PerftForCausalLM"


def case(
    family: str,
    variant: str,
    options: dict[str, Any] = _NO_GRAPH,
    target_modules: str | None = None,
    expert_ids: dict[str, list[int]] | None = None,
    **sizes: Any,
) -> Case:
    keys = {"variant": variant, "target_modules": target_modules, "expert_ids": expert_ids} | {
        "routed": _ROUTED,
        "dense": {"num_experts": 2},
    }.get(variant, {})
    return Case(family, keys, SIZES | sizes, options)


_MOE = {"moe_intermediate_size": 64}
CASES = {
    # softmax, whose weights the base does not renormalise
    "olmoe routed": case("olmoe", "routed"),
    "olmoe embedded, compiled": case("olmoe", "embedded", {}),
    "olmoe embedded in some experts": case(
        "olmoe", "embedded", expert_ids={"model.layers.0.mlp": [3, 0], "model.layers.1.mlp": [1, 2]}
    ),
    # softmax, renormalised
    "qwen3_moe routed": case("qwen3_moe", "routed", **_MOE, norm_topk_prob=True),
    "qwen3_moe embedded": case("qwen3_moe", "embedded", **_MOE, norm_topk_prob=True),
    # sigmoid with groups and a correction bias, shared experts
    "glm4_moe routed": case("glm4_moe", "routed", **_MOE, n_group=2, topk_group=1),
    "glm4_moe embedded": case("glm4_moe", "embedded", **_MOE, n_group=2, topk_group=1),
    # a shared expert with a gate
    "qwen2_moe routed": case("qwen2_moe", "routed", **_MOE),
    # experts with biases, attention sinks
    "gpt_oss routed": case("gpt_oss", "routed"),
    "gpt_oss embedded": case("gpt_oss", "embedded"),
    "granitemoe routed": case("granitemoe", "routed"),
    "mixtral dense": case("mixtral", "dense"),
    "mixtral single": case("mixtral", "single"),
    "mistral routed": case("mistral", "routed", target_modules="mlp"),
    # last: after it vLLM cannot make another engine in this process
    "mixtral routed, n-gram speculation": case(
        "mixtral",
        "routed",
        _NO_GRAPH | {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """Each case's folder, with base and adapter, and PEFT's answers: all of them before there is an engine.

    An engine makes transformers' model classes those of vLLM.
    """
    found = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("served")
        base = save_base(case.family, folder / "base", **case.sizes)
        config = PerftConfig(rank=4, alpha=16, task_type="CAUSAL_LM", **case.keys)
        found[name] = folder, generated(save_adapter(base, config, folder / "adapter"), prompts())
    save_adapter(tiny_model("llama"), TTLoraConfig(task_type="CAUSAL_LM"), tmp_path_factory.getbasetemp() / "tt_lora")
    return found


def engine(
    folder: Path, options: dict[str, Any], adapter: Path | str | None = None, architecture: str = "PerftForCausalLM"
) -> LLM:
    overrides = {"architectures": [architecture], "perft_adapter": str(adapter or folder / "adapter")}
    return LLM(str(folder / "base"), hf_overrides=overrides, **(ENGINE | options))


def answered(llm: LLM) -> list[list[int]]:
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts()]
    outputs = llm.generate(requests, greedy, use_tqdm=False)
    assert sum(output.num_cached_tokens for output in outputs) > 0
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_base_that_names_no_adapter_is_refused(answers: dict) -> None:
    folder, _ = answers["olmoe routed"]
    with pytest.raises(ValueError, match="need an adapter: --hf-overrides"):
        LLM(str(folder / "base"), hf_overrides={"architectures": ["PerftForCausalLM"]}, **ENGINE)


def test_an_adapter_of_another_method_is_refused(answers: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, _ = answers["olmoe routed"]
    with pytest.raises(ValueError, match="is an adapter of type TT_LORA, not PERFT"):
        engine(folder, _NO_GRAPH, tmp_path_factory.getbasetemp() / "tt_lora")


def test_an_adapter_of_another_base_is_refused(answers: dict) -> None:
    folder, _ = answers["olmoe routed"]
    with pytest.raises(ValueError, match=r"layers.0.mlp.perft_\w+ has no place in Glm4MoeModel"):
        engine(answers["glm4_moe routed"][0], _NO_GRAPH, folder / "adapter")


def test_an_adapter_whose_file_is_not_whole_is_refused(answers: dict, tmp_path: Path) -> None:
    folder, _ = answers["olmoe routed"]
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if ".layers.1." not in key}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").symlink_to(folder / "adapter" / "adapter_config.json")
    with pytest.raises(ValueError, match="layers.1.mlp has no perft_down, perft_router, perft_up; its file is not wh"):
        engine(folder, _NO_GRAPH, tmp_path)


@pytest.mark.parametrize(
    "options, refused",
    [
        ({"quantization": "experts_int8", "dtype": "bfloat16"}, "a quantised base model"),
        ({"enable_lora": True}, "LoRA beside it"),
        ({"enable_expert_parallel": True}, "pipeline, data or expert parallelism"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], refused: str, answers: dict) -> None:
    with pytest.raises(ValueError, match=f"a PERFT adapter is not served with {refused}"):
        engine(answers["olmoe routed"][0], _NO_GRAPH | options)


def test_weights_that_sum_to_one_where_the_base_has_others_give_other_tokens(answers: dict, tmp_path: Path) -> None:
    """That the gates are right shows in the tokens."""
    folder, expected = answers["olmoe routed"]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["norm_topk_prob"] is None
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"norm_topk_prob": True}))
    (tmp_path / "adapter_model.safetensors").symlink_to(folder / "adapter" / "adapter_model.safetensors")
    wrong = answered(engine(folder, _NO_GRAPH, tmp_path))
    assert sum(a != b for a, b in zip(wrong, expected)) > len(expected) // 8


@pytest.mark.parametrize("name", CASES)
def test_the_tokens_are_those_of_generate(name: str, answers: dict) -> None:
    folder, expected = answers[name]
    assert len({tuple(tokens) for tokens in expected}) > len(expected) // 2
    assert answered(engine(folder, CASES[name].options, architecture=CASES[name].architecture)) == expected
