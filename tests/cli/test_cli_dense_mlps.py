"""PERFT beside the MLPs and attention of a dense base, through Axolotl: one process, two, resumed, and afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cli.adapters import adapter_keys
from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, checksums, log_history, write_rows, write_yaml

STEPS = 3
ADAPTER = "perft and attention"
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
        "offload_params": False,
        "cpu_ram_efficient_loading": False,
    },
}
MODES: dict[str, dict[str, Any]] = {"DDP": {}, "FSDP2": FSDP2}
SHIM, PLUGIN = "tests.cli.cpu_processes.CpuProcesses", "axolotl_moe_peft.MoePeftPlugin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with equally many tokens."""
    folder = tmp_path_factory.mktemp("dense_mlps")
    answers = ("one", "two", "six", "ten")
    write_rows(folder / "rows.jsonl", [(f"what is {i}?", answer) for i, answer in enumerate(answers)])
    return folder


@pytest.fixture(scope="module")
def write_config(folder: Path, base_model: Callable[[str], Path], start: Callable[[str, str], Path]):
    """`write_config(mode, name, **keys)`: 4 rows in a batch, in one process if the mode is None."""

    def write(mode: str | None = None, name: str = "", **keys: Any) -> Path:
        rows = folder / "rows.jsonl"
        settings = {
            "plugins": [SHIM] * (mode is not None) + [PLUGIN],
            **adapter_keys(ADAPTER, folder, balanced=False),
            "lora_model_dir": str(start("llama", ADAPTER)),
            "gradient_checkpointing": True,
            "adam_epsilon": 1.0,  # a step shows the gradient's size
            "max_grad_norm": 0.0,
            "max_steps": STEPS,
            "save_steps": 1,
            "micro_batch_size": 2 if mode else 4,
            **MODES.get(mode, {}),
        }
        return write_yaml(folder / f"{mode} {name}.yaml", base_model("llama"), rows, **settings | keys)

    return write


@pytest.fixture(scope="module")
def trained(axolotl: AxolotlPool, write_config: Callable[..., Path], base_model: Callable[[str], Path]):
    """`trained(mode)`: the folder of a finished run."""

    @functools.cache
    def train(mode: str | None = None) -> Path:
        config, before = write_config(mode), checksums(base_model("llama"))
        result = axolotl("train", config, processes=mode and 2)
        assert result.code == 0, result.error or result.output
        assert checksums(base_model("llama")) == before
        return config.with_suffix("")

    return train


def assert_same(run: Path, expected: Path, rel: float) -> None:
    lines = log_history(expected)
    assert len(log_history(run)) == len(lines) == STEPS
    for line, other in zip(log_history(run), lines):
        for key in ("loss", "grad_norm", *(key for key in other if key.startswith(("router_", "expert_")))):
            # the host rounds what it logs; float32 sums in another order
            assert line[key] == pytest.approx(other[key], rel=rel, abs=1e-4), key
    tensors: dict[str, Tensor] = adapter_tensors(run)
    assert tensors.keys() == adapter_tensors(expected).keys()
    for name, tensor in adapter_tensors(expected).items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.matrix("dense base (target_modules: mlp): train", "perft routed")
@pytest.mark.matrix("updates of linear layers (linear_target_modules): train", "perft routed")
def test_all_that_is_trained_is_saved_and_logged(trained: Callable[..., Path], start: Callable[[str, str], Path]):
    before, after = adapter_tensors(start("llama", ADAPTER)), adapter_tensors(trained())
    assert before.keys() == after.keys() and len(after) == 2 * (3 + 2 * 2)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(line["router_z_loss"] > 0 and line["expert_entropy"] > 0 for line in log_history(trained()))


@pytest.mark.matrix("dense base (target_modules: mlp): processes: 2, {mode}", "perft routed")
@pytest.mark.matrix("updates of linear layers (linear_target_modules): processes: 2, {mode}", "perft routed")
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_log_and_save_what_one_does(mode: str, trained: Callable[..., Path]):
    assert_same(trained(mode), trained(), rel=1e-3)
    checkpoint = adapter_tensors(trained(mode) / f"checkpoint-{STEPS}")
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in adapter_tensors(trained(mode)).items())


@pytest.mark.matrix("dense base (target_modules: mlp): resume", "perft routed")
@pytest.mark.matrix("updates of linear layers (linear_target_modules): resume", "perft routed")
@pytest.mark.parametrize("mode", [None, "FSDP2"])
def test_resumed_equals_straight(
    mode: str | None, axolotl: AxolotlPool, trained: Callable[..., Path], write_config: Callable[..., Path]
):
    checkpoint = str(trained(mode) / f"checkpoint-{STEPS - 1}")
    config = write_config(mode, "resumed", resume_from_checkpoint=checkpoint)
    result = axolotl("train", config, processes=mode and 2)
    assert result.code == 0, result.error or result.output
    assert_same(config.with_suffix(""), trained(mode), rel=0)


@pytest.mark.matrix("dense base (target_modules: mlp): evaluate", "perft routed")
@pytest.mark.matrix("updates of linear layers (linear_target_modules): evaluate", "perft routed")
@pytest.mark.matrix("dense base (target_modules: mlp): inference", "perft routed")
@pytest.mark.matrix("updates of linear layers (linear_target_modules): inference", "perft routed")
def test_evaluate_and_inference_take_the_adapter(
    axolotl: AxolotlPool, trained: Callable[..., Path], write_config: Callable[..., Path], folder: Path
):
    rows = {"path": str(folder / "rows.jsonl"), "type": "chat_template", "split": "train"}
    config = write_config(None, "used", test_datasets=[rows], val_set_size=None, lora_model_dir=None)
    result = axolotl("evaluate", config, f"--lora-model-dir={trained()}")
    assert result.code == 0, result.output
    assert "eval_loss" in result.output
    result = axolotl("inference", config, f"--lora-model-dir={trained()}", stdin="what is 1?")
    assert result.code == 0, result.output


@pytest.mark.matrix(
    "dense base (target_modules: mlp): merge-lora", "perft routed", cell="refused: its updates depend on the token"
)
def test_merge_lora_is_refused_with_the_reason(axolotl: AxolotlPool, write_config: Callable[..., Path]):
    result = axolotl("merge-lora", write_config(None, "merged"))
    assert result.code == 1 and result.tracebacks == 1, result.output
    assert "cannot merge an adapter of type perft: it runs in parallel with the MoE block or MLP" in result.error
    assert not (write_config(None, "merged").with_suffix("") / "merged").exists()


def test_a_new_adapter_says_what_it_trains(axolotl: AxolotlPool, write_config: Callable[..., Path]):
    result = axolotl("train", write_config(None, "new", lora_model_dir=None, max_steps=1))
    assert result.code == 0, result.output
    # 2 layers: 8 pairs of rank 4 and width 32, and a router; a token passes through 2 pairs; q and v of rank 3
    table = [
        line.split() for line in result.output.splitlines() if line.startswith(("experts ", "router ", "linear "))
    ]
    assert table == [
        ["experts", "4", f"{2 * 8 * 2 * 4 * 32:,}", f"{2 * 2 * 2 * 4 * 32:,}", "float32"],
        ["router", "2", str(2 * 8 * 32), str(2 * 8 * 32), "float32"],
        ["linear", "8", str(2 * 3 * (32 + 32 + 32 + 16)), str(2 * 3 * (32 + 32 + 32 + 16)), "float32"],
    ]
