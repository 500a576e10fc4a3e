"""Ranks that move through Axolotl: one process, two with DDP and FSDP2, resumed, and what is refused."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.cli_helpers import (
    AxolotlPool,
    Result,
    adapter_tensors,
    lines_to_worry_about,
    log_history,
    write_rows,
    write_yaml,
)
from tests.cli.test_cli_chosen_experts import MODES, PLUGIN, SHIM

STEPS = 5
PLAN = {"max_rank": 5, "warmup_steps": 2, "every_steps": 1, "decay": 0.5, "until": 4}
Run = Callable[..., tuple[Path, Result]]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, axolotl: AxolotlPool, base_model: Callable[[str], Path]
) -> Callable[..., tuple[Path, Result]]:
    """`run(name, score, mode, *options, **keys)`: a run's folder and result; its rows have equally many tokens."""
    folder = tmp_path_factory.mktemp("rank_allocation")
    answers = ("one", "two", "six", "ten")
    write_rows(folder / "rows.jsonl", [(f"what is {i}?", answer) for i, answer in enumerate(answers)])

    def run(name: str, score: str, mode: str | None = None, *options: str, **keys: Any) -> tuple[Path, Result]:
        settings = {
            "plugins": [SHIM] * (mode is not None) + [PLUGIN],
            "perft": {"variant": "embedded", "rank": 3, "rank_allocation": {"score": score, **PLAN}},
            "gradient_checkpointing": True,
            "learning_rate": 0.01,
            "adam_epsilon": 1e-3,
            "max_grad_norm": 0.0,
            "max_steps": STEPS,
            "save_steps": 1,
            "micro_batch_size": 2 if mode else 4,
            **MODES.get(mode, {}),
        }
        config = write_yaml(folder / f"{name}.yaml", base_model("olmoe"), folder / "rows.jsonl", **settings | keys)
        return config.with_suffix(""), axolotl("train", config, *options, processes=mode and 2)

    return run


@pytest.fixture(scope="module")
def trained(run: Run) -> Callable[..., Path]:
    """`trained(score, mode)`: the folder of a finished run."""

    @functools.cache
    def train(score: str, mode: str | None = None) -> Path:
        folder, result = run(f"{score} {mode}", score, mode)
        assert result.code == 0, result.error or result.output
        assert lines_to_worry_about(result.output) == []
        return folder

    return train


def ranks(folder: Path) -> dict[str, list[int]]:
    """Of each expert, by the name of the tensor."""
    downs = {name: tensor for name, tensor in adapter_tensors(folder).items() if name.endswith("perft_down")}
    return {name: (tensor != 0).any(-1).sum(-1).tolist() for name, tensor in downs.items()}


@pytest.mark.matrix("ranks that move: train", "perft embedded")
@pytest.mark.parametrize("score", ["gate", "saliency"])
def test_ranks_move_and_their_sum_stays(score: str, trained: Callable[..., Path]) -> None:
    history = [ranks(trained(score) / f"checkpoint-{step}") for step in range(2, STEPS + 1)]
    assert all(of_block == [3] * 8 for of_block in history[0].values())
    assert all(sum(of_block) == 24 and max(of_block) <= 5 for at_step in history for of_block in at_step.values())
    assert history[0] != history[1] and history[2] == history[3]  # until step 4


@pytest.mark.matrix("ranks that move: processes: 2, {mode}", "perft embedded")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("score", ["gate", "saliency"])
def test_two_processes_move_log_and_save_what_one_does(score: str, mode: str, trained: Callable[..., Path]) -> None:
    if score == "gate" and mode == "FSDP2":
        return  # as with cpu_ram_efficient_loading
    folder, expected = trained(score, mode), trained(score)
    assert ranks(folder) == ranks(expected)
    for line, other in zip(log_history(folder), log_history(expected), strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key
    tensors = adapter_tensors(folder)
    for name, tensor in adapter_tensors(expected).items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(None, marks=pytest.mark.matrix("ranks that move: resume", "perft embedded")),
        pytest.param(
            "FSDP2 cpu_ram_efficient_loading",
            marks=pytest.mark.matrix("ranks that move: resume on 2, {mode}", "perft embedded"),
        ),
    ],
)
def test_a_resumed_run_equals_the_straight_one(
    mode: str | None, trained: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    straight = trained("saliency", mode)
    shutil.copytree(straight / "checkpoint-3", tmp_path / "checkpoint-3")
    options = (f"--output-dir={tmp_path}", f"--resume-from-checkpoint={tmp_path}/checkpoint-3")
    _, result = run(f"saliency {mode}", "saliency", mode, *options)
    assert result.code == 0, result.output
    assert [line["loss"] for line in log_history(tmp_path)] == [line["loss"] for line in log_history(straight)]
    tensors = adapter_tensors(tmp_path)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter_tensors(straight).items())


def test_scaled_gradients_are_refused_before_anything_is_loaded(run: Run) -> None:
    _, result = run("fp16", "gate", fp16=True)
    assert result.code and "perft.rank_allocation does not go with `fp16`" in result.error, result.error
