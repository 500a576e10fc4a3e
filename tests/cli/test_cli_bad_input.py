"""What a user gets for a mistake: exit code 1, one message that says where and what to do, nothing overwritten."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from axolotl_moe_peft import PerftConfig, TTLoraConfig
from tests.cli.cli_helpers import (
    AxolotlPool,
    Result,
    adapter_tensors,
    checksums,
    run_command,
    save_tokenizer,
    write_rows,
    write_yaml,
)
from tests.tiny_models import VOCAB_SIZE


def tt_lora(**block: Any) -> dict[str, Any]:
    """The keys that turn a valid YAML into one of a TT-LoRA."""
    return {"adapter": "tt_lora", "perft": None, "tt_lora": {"rank": 4} | block}


# keys of the YAML beside a valid one's, and what the message must hold
REFUSED_BLOCKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "misspelt key": ({"perft": {"rnk": 8}}, ("perft.rnk", "rank")),
    "more experts per token than experts": (
        {"perft": {"num_experts": 2, "num_experts_per_tok": 3}},
        ("perft.num_experts_per_tok", "3", "more than num_experts (2)"),
    ),
    "num_experts_per_tok with dense": (
        {"perft": {"variant": "dense", "num_experts_per_tok": 2}},
        ("perft.num_experts_per_tok", "dense", "Leave it out"),
    ),
    "num_experts with single": (
        {"perft": {"variant": "single", "num_experts": 2}},
        ("perft.num_experts", "single", "Leave it out"),
    ),
    "rank 0": ({"perft": {"rank": 0}}, ("perft.rank", "at least 1")),
    "unknown variant": ({"perft": {"variant": "rooted"}}, ("perft.variant", "rooted", "'routed', 'embedded'")),
    "unknown expert_type": ({"perft": {"expert_type": "mlp"}}, ("perft.expert_type", "mlp", "'parallel_adapter'")),
    "unknown hidden_act": (
        {"perft": {"expert_type": "parallel_adapter", "hidden_act": "slu"}},
        ("perft.hidden_act", "slu", "silu"),
    ),
    "lora_r beside the block": ({"lora_r": 8}, ("`lora_r`", "write `rank` in the `perft:` block")),
    "block under lora": (
        {"adapter": "lora", "lora_r": 8, "lora_alpha": 8, "lora_target_modules": ["q_proj"]},
        ("`perft:`", "'lora'", "`adapter: perft`"),
    ),
    "block without an adapter": ({"adapter": None}, ("`perft:`", "`adapter: perft`")),
    "no block": ({"perft": None}, ("needs a `perft:` block", "`perft: {}`")),
    "tt_lora, misspelt key": (tt_lora(rnk=8), ("tt_lora.rnk", "rank")),
    "tt_lora, rank 0": (tt_lora(rank=0), ("tt_lora.rank", "at least 1")),
    "tt_lora, unknown init": (tt_lora(init="paper"), ("tt_lora.init", "paper", "'normalized' or 'zero'")),
    "tt_lora, factors of one side": (
        tt_lora(factors={"q_proj": {"in": [8, 4]}}),
        ("tt_lora.factors", "q_proj", "`in` and `out`"),
    ),
    "tt_lora, lora_r beside the block": (
        tt_lora() | {"lora_r": 8},
        ("`lora_r`", "write `rank` in the `tt_lora:` block"),
    ),
    "tt_lora, perft's block": (tt_lora() | {"perft": {"rank": 4}}, ("`perft:`", "'tt_lora'", "remove the block")),
}
REFUSED_WITH_THE_BASE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dense base": (
        {"base_model": "llama"},
        ("LlamaForCausalLM", "no MoE block", "`target_modules: mlp`", "`adapter: lora`"),
    ),
    "target_modules match nothing": (
        {"perft": {"target_modules": ["experts_block"]}},
        ("perft.target_modules", "experts_block", "model.layers.0.mlp", "leave the key out"),
    ),
    "layers_to_transform out of range": (
        {"perft": {"layers_to_transform": [0, 7]}},
        ("perft.layers_to_transform", "[7]", "in layers [0, 1]"),
    ),
    "tt_lora, target_modules match nothing": (
        tt_lora(target_modules=["q_proj", "query"]),
        ("tt_lora.target_modules", "'query' matches no module", "k_proj, lm_head, o_proj, q_proj, v_proj"),
    ),
    "tt_lora, factors of another size": (
        tt_lora(factors={"q_proj": {"in": [8, 8], "out": [8, 4]}}),
        ("tt_lora.factors: q_proj.in", "32 inputs", "multiply to 64", "[4, 8] or [8, 4]"),
    ),
}
REFUSED_FOLDERS: dict[str, tuple[str, ...]] = {
    "nowhere": ("lora_model_dir", "adapter_config.json", "give the folder of a saved adapter"),
    "without_weights": ("lora_model_dir", "adapter_model.safetensors", "give the folder of a saved adapter"),
    "garbage_config": ("lora_model_dir", "adapter_config.json", "cannot be read"),
    "truncated_weights": ("lora_model_dir",),
    "missing_tensor": ("lora_model_dir", "missing", "layers.0.mlp.perft_down"),
    "unknown_tensor": (
        "lora_model_dir",
        "layers.0.mlp.perft_sideways",
    ),
    "wrong_shape": (
        "lora_model_dir",
        "layers.0.mlp.perft_down",
    ),
    "lora": ("lora_model_dir", "LORA", "PERFT"),
    "rank_8": ("rank: 4", "8", "adapter_config.json"),
}
REFUSED_TT_LORA_FOLDERS: dict[str, tuple[str, ...]] = {
    "good": ("lora_model_dir", "PERFT", "TT_LORA"),
    "tt_lora_rank_8": ("rank: 4", "8", "adapter_config.json"),
    "tt_lora_missing_core": ("lora_model_dir", "missing", "layers.0.self_attn.q_proj.ttcore_in_0"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_model: Callable[[str], Path]) -> Path:
    """A dense model, saved adapters whole and damaged, and rows."""
    folder = tmp_path_factory.mktemp("bad_input")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **sizes)).save_pretrained(folder / "llama")
    save_tokenizer(folder / "llama")
    for name, config in {
        "good": PerftConfig(rank=4, task_type="CAUSAL_LM"),
        "rank_8": PerftConfig(rank=8, task_type="CAUSAL_LM"),
        "lora": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "tt_lora_rank_8": TTLoraConfig(rank=8, task_type="CAUSAL_LM"),
        "tt_lora_missing_core": TTLoraConfig(rank=4, task_type="CAUSAL_LM"),
    }.items():
        base = AutoModelForCausalLM.from_pretrained(base_model("mixtral"))
        get_peft_model(base, config).save_pretrained(folder / name)
    for name in ("without_weights", "garbage_config", "truncated_weights"):
        shutil.copytree(folder / "good", folder / name)
    (folder / "without_weights" / "adapter_model.safetensors").unlink()
    (folder / "garbage_config" / "adapter_config.json").write_text('{"peft_type": "PERFT", ')
    weights = folder / "truncated_weights" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    tensors = adapter_tensors(folder / "good")
    first = next(name for name in tensors if "layers.0" in name and "perft_down" in name)
    for name, damaged in {
        "missing_tensor": {key: tensor for key, tensor in tensors.items() if key != first},
        "unknown_tensor": tensors | {first.replace("perft_down", "perft_sideways"): torch.zeros(1)},
        "wrong_shape": tensors | {first: tensors[first][:, :2].clone()},
    }.items():
        shutil.copytree(folder / "good", folder / name)
        save_file(damaged, folder / name / "adapter_model.safetensors")
    cores = adapter_tensors(folder / "tt_lora_missing_core")
    del cores["base_model.model.model.layers.0.self_attn.q_proj.ttcore_in_0"]
    save_file(cores, folder / "tt_lora_missing_core" / "adapter_model.safetensors")
    write_rows(folder / "rows.jsonl", ((f"what is {i}?", str(i)) for i in range(4)))
    return folder


@pytest.fixture
def output_dir(folder: Path, tmp_path: Path) -> Path:
    """With an adapter from before, and a note."""
    output_dir = tmp_path / "outputs"
    shutil.copytree(folder / "good", output_dir)
    (output_dir / "note.txt").write_text("keep me")
    return output_dir


@pytest.fixture
def config(folder: Path, tmp_path: Path, output_dir: Path, base_model: Callable[[str], Path]) -> Callable[..., Path]:
    """`config(lora_r=8)`: a valid YAML with these keys changed."""

    def write(base_model_name: str | None = None, **keys: Any) -> Path:
        base = folder / base_model_name if base_model_name else base_model("mixtral")
        keys = {"output_dir": str(output_dir), "dataset_prepared_path": str(tmp_path / "prepared")} | keys
        return write_yaml(tmp_path / "config.yaml", base, folder / "rows.jsonl", **keys)

    return write


def assert_refused(result: Result, fragments: tuple[str, ...]) -> None:
    assert result.code == 1, result.output
    assert result.tracebacks == 1, result.output
    assert [f for f in fragments if f not in result.error] == [], result.error
    if "ValidationError" in result.error:
        assert "1 validation error" in result.error


@pytest.mark.parametrize("case", REFUSED_BLOCKS)
def test_mistakes_in_the_yaml(
    case: str, axolotl: AxolotlPool, config: Callable[..., Path], output_dir: Path, tmp_path: Path
) -> None:
    keys, fragments = REFUSED_BLOCKS[case]
    before = checksums(tmp_path / "outputs")
    result = axolotl("train", config(**keys))
    assert_refused(result, fragments)
    assert checksums(output_dir) == before
    assert not (output_dir / "debug.log").exists()  # refused before the host does anything


@pytest.mark.parametrize("command", ["train", "preprocess"])
@pytest.mark.parametrize("case", REFUSED_WITH_THE_BASE)
def test_base_that_does_not_fit_is_refused_before_the_rows_are_tokenised(
    case: str, command: str, axolotl: AxolotlPool, config: Callable[..., Path], output_dir: Path, tmp_path: Path
) -> None:
    keys, fragments = REFUSED_WITH_THE_BASE[case]
    before = checksums(output_dir)
    result = axolotl(command, config(keys.get("base_model"), **{k: v for k, v in keys.items() if k != "base_model"}))
    assert_refused(result, fragments)
    assert checksums(output_dir) == before
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("name", "keys", "fragments"),
    [(name, {}, fragments) for name, fragments in REFUSED_FOLDERS.items()]
    + [(name, tt_lora(), fragments) for name, fragments in REFUSED_TT_LORA_FOLDERS.items()],
    ids=[*REFUSED_FOLDERS, *(f"{name} as tt_lora" for name in REFUSED_TT_LORA_FOLDERS)],
)
def test_lora_model_dir_that_is_no_whole_adapter(
    name: str,
    keys: dict[str, Any],
    fragments: tuple[str, ...],
    axolotl: AxolotlPool,
    config: Callable[..., Path],
    folder: Path,
    output_dir: Path,
) -> None:
    before, given = checksums(output_dir), checksums(folder)
    result = axolotl("train", config(**keys), f"--lora-model-dir={folder / name}")
    assert_refused(result, (str(folder / name), *fragments))
    assert checksums(output_dir) == before
    assert checksums(folder) == given


@pytest.mark.parametrize("name", ["truncated_weights", "missing_tensor"])
def test_evaluate_refuses_a_damaged_adapter(
    name: str, axolotl: AxolotlPool, config: Callable[..., Path], folder: Path
) -> None:
    result = axolotl("evaluate", config(), f"--lora-model-dir={folder / name}")
    assert_refused(result, ("lora_model_dir", str(folder / name)))


@pytest.mark.parametrize("keys", [{}, tt_lora()], ids=["perft", "tt_lora"])
def test_inference_without_an_adapter(keys: dict[str, Any], axolotl: AxolotlPool, config: Callable[..., Path]) -> None:
    result = axolotl("inference", config(**keys), stdin="what is 1?")
    assert_refused(result, ("untrained adapter", "--lora-model-dir"))
    assert "Give me an instruction" not in result.output


def test_the_launcher_passes_the_message_and_the_exit_code_on(config: Callable[..., Path], output_dir: Path) -> None:
    before = checksums(output_dir)
    result = run_command("axolotl", "train", str(config(perft={"rank": 0})))
    assert result.code == 1
    assert "perft.rank: 0 is not allowed; it is an integer of at least 1" in result.error
    assert checksums(output_dir) == before


def test_valid_yaml_is_what_the_cases_change(
    axolotl: AxolotlPool, config: Callable[..., Path], folder: Path, output_dir: Path
) -> None:
    result = axolotl("train", config(max_steps=1), f"--lora-model-dir={folder / 'good'}")
    assert result.code == 0, result.output
    assert json.loads((output_dir / "adapter_config.json").read_text())["peft_type"] == "PERFT"
