"""PERFT-E in the most used experts through Axolotl: counted before training, on any number of processes, and kept."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from axolotl_moe_peft import calibrate_experts
from tests.cli.cli_helpers import (
    AxolotlPool,
    Result,
    adapter_tensors,
    lines_to_worry_about,
    log_history,
    tokenised,
    write_rows,
    write_yaml,
)

STEPS, ROWS = 3, 3
BLOCK = {"variant": "embedded", "rank": 4, "init": "paper", "experts": {"keep": 0.25, "calibrate": ROWS}}
PACKED = {
    "sample_packing": True,
    "sample_packing_eff_est": 1.0,
    "sample_packing_sequentially": True,
    "curriculum_sampling": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
}
_FSDP2 = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "OlmoeDecoderLayer",
    "reshard_after_forward": True,
    "offload_params": False,
}
MODES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": {
        "fsdp_version": 2,
        "fsdp_config": _FSDP2 | {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False},
    },
    # the second process has a base without weights until it trains
    "FSDP2 cpu_ram_efficient_loading": {
        "fsdp_version": 2,
        "fsdp_config": _FSDP2 | {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True},
    },
}
SHIM, PLUGIN = "tests.cli.cpu_processes.CpuProcesses", "axolotl_moe_peft.MoePeftPlugin"
Run = Callable[..., tuple[Path, Result]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with equally many tokens, of other letters at the end."""
    folder = tmp_path_factory.mktemp("chosen_experts")
    questions = ("aaaaa", "abcba", "ccccc", "xyzzy", "XYZZY", "12345", "67890", "?!?!?")
    write_rows(folder / "rows.jsonl", [(question, "one") for question in questions])
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, axolotl: AxolotlPool, base_model: Callable[[str], Path]) -> Run:
    """`run(name, mode, *options, **keys)`: the folder and the output of a command, by default of training."""

    def run(name: str, mode: str | None = None, *options: str, command: str = "train", **keys: Any):
        settings = {
            "plugins": [SHIM] * (mode is not None) + [PLUGIN],
            "perft": BLOCK,
            "gradient_checkpointing": True,
            "adam_epsilon": 1.0,  # a step shows the gradient's size
            "max_grad_norm": 0.0,
            "max_steps": STEPS,
            "save_steps": 1,
            "micro_batch_size": 2 if mode else 4,
            **MODES.get(mode, {}),
        }
        config = write_yaml(folder / f"{name}.yaml", base_model("olmoe"), folder / "rows.jsonl", **settings | keys)
        return config.with_suffix(""), axolotl(command, config, *options, processes=mode and 2)

    return run


@pytest.fixture(scope="module")
def trained(run: Run) -> Callable[..., tuple[Path, str]]:
    """`trained(mode)`: the folder of a finished run and its output."""

    @functools.cache
    def train(mode: str | None = None) -> tuple[Path, str]:
        folder, result = run(f"trained {mode}", mode)
        assert result.code == 0, result.error or result.output
        return folder, result.output

    return train


def expert_ids(folder: Path) -> dict[str, list[int]]:
    return json.loads((folder / "adapter_config.json").read_text())["expert_ids"]


def test_the_experts_are_those_of_the_first_rows(
    trained: Callable[..., tuple[Path, str]], folder: Path, base_model: Callable[[str], Path]
) -> None:
    run, output = trained()
    base = AutoModelForCausalLM.from_pretrained(base_model("olmoe"))
    rows = [{"input_ids": torch.tensor([row["input_ids"]])} for row in tokenised(folder / "rows.jsonl")]
    expected = calibrate_experts(base, rows[:ROWS], 0.25)
    assert expert_ids(run) == expected != calibrate_experts(base, rows, 0.25)
    assert expert_ids(run / "checkpoint-1") == expected
    tensors = adapter_tensors(run)
    assert {tensor.shape for tensor in tensors.values()} == {(2, 4, 32), (2, 32, 4)}
    assert re.search(r"experts +4 +1,024 +1,024 +float32", output)  # 2 of 8 experts, both of a token's two at most
    assert re.search(r"2 most used experts of each of 2 blocks are adapted; they have \d\d\.\d % of the base", output)
    assert lines_to_worry_about(output) == []


@pytest.mark.matrix("experts chosen by calibration: processes: 2, {mode}", "perft embedded")
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_choose_log_and_save_what_one_does(mode: str, trained: Callable[..., tuple[Path, str]]) -> None:
    (folder, output), (expected, _) = trained(mode), trained()
    assert expert_ids(folder) == expert_ids(expected)
    assert output.count("most used experts of each of") == 1
    for line, other in zip(log_history(folder), log_history(expected), strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key
    tensors = adapter_tensors(folder)
    assert tensors.keys() == adapter_tensors(expected).keys()
    for name, tensor in adapter_tensors(expected).items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.matrix("experts chosen by calibration: resume", "perft embedded")
def test_a_resumed_run_counts_nothing_and_equals_the_straight_one(
    trained: Callable[..., tuple[Path, str]], run: Run, tmp_path: Path
) -> None:
    straight, _ = trained()
    shutil.copytree(straight / "checkpoint-1", tmp_path / "checkpoint-1")
    options = (f"--output-dir={tmp_path}", f"--resume-from-checkpoint={tmp_path}/checkpoint-1")
    _, result = run("trained None", None, *options)
    assert result.code == 0, result.output
    assert "most used experts" not in result.output
    assert expert_ids(tmp_path) == expert_ids(straight)
    assert [line["loss"] for line in log_history(tmp_path)] == [line["loss"] for line in log_history(straight)]
    tensors = adapter_tensors(tmp_path)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter_tensors(straight).items())


@pytest.mark.matrix("experts chosen by calibration: train --lora-model-dir, packed", "perft embedded")
def test_a_saved_adapter_goes_on_with_its_experts(trained: Callable[..., tuple[Path, str]], run: Run) -> None:
    start, _ = trained()
    folder, result = run("continued", None, f"--lora-model-dir={start}", **PACKED)
    assert result.code == 0, result.output
    assert "most used experts" not in result.output
    assert expert_ids(folder) == expert_ids(start)
    before, after = adapter_tensors(start), adapter_tensors(folder)
    assert before.keys() == after.keys()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in after.items())
    for block, told in (
        (BLOCK | {"experts": {"keep": 0.5, "calibrate": ROWS}}, "the block says experts: {"),
        (BLOCK | {"experts": None}, "the block says experts: None"),
        (BLOCK | {"expert_ids": dict.fromkeys(expert_ids(start), [0, 1])}, "the block says expert_ids: {"),
    ):
        _, result = run("changed", None, f"--lora-model-dir={start}", perft=block)
        assert result.code and told in result.error, result.error or result.output


@pytest.mark.matrix("experts chosen by calibration: train, packed", "perft embedded")
def test_packed_rows_are_counted_as_rows_and_too_few_are_all_counted(
    trained: Callable[..., tuple[Path, str]], run: Run
) -> None:
    chosen = []
    for name, keys in (("packed", PACKED), ("not packed", {})):
        folder, result = run(name, perft=BLOCK | {"experts": {"keep": 0.25}}, **keys)
        assert result.code == 0, result.output
        assert "128 rows are asked for; the training data have 8, which are counted" in result.output
        chosen.append(expert_ids(folder))
    assert chosen[0] == chosen[1] != expert_ids(trained()[0])


def test_named_experts_are_not_counted(trained: Callable[..., tuple[Path, str]], run: Run) -> None:
    block = {key: value for key, value in BLOCK.items() if key != "experts"}
    folder, result = run("named", None, perft=block | {"expert_ids": expert_ids(trained()[0])})
    assert result.code == 0, result.output
    assert "most used experts" not in result.output
    tensors = adapter_tensors(folder)
    for name, tensor in adapter_tensors(trained()[0]).items():
        assert torch.equal(tensors[name], tensor)


def test_a_command_that_does_not_train_has_no_rows_to_count(run: Run) -> None:
    _, result = run("evaluated", command="evaluate")
    assert result.code and "3 rows of the training data are to be counted, and this command does not" in result.error


def test_rows_without_tokens_are_refused_before_anything_is_loaded(run: Run) -> None:
    _, result = run("preferences", rl="dpo")
    assert result.code and "3 rows of tokens are to be counted before training, and `rl: dpo` has none" in result.error
