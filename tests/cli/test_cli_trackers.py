"""Pictures of evaluations in a tracker of Axolotl's, of packed rows, and in two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli.cli_helpers import AxolotlPool, write_rows, write_yaml
from tests.cli.test_cli_processes import HANGS, PLUGIN, SHIM

KEYS: dict[str, Any] = {"val_set_size": 6, "eval_steps": 2, "max_steps": 4, "perft": {"rank": 4, "num_experts": 8}}
PACKED = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 64}


@pytest.fixture
def write(tmp_path: Path, base_model: Callable[[str], Path]) -> Callable[..., Path]:
    rows = write_rows(tmp_path / "rows.jsonl", ((f"what is {i}?", "ok" * (1 + i % 3)) for i in range(60)))
    return lambda **keys: write_yaml(tmp_path / "run.yaml", base_model("mixtral"), rows, **KEYS | keys)


@pytest.mark.parametrize("processes", [None, 2])
def test_tensorboard(processes: int | None, write: Callable[..., Path], axolotl: AxolotlPool) -> None:
    plugins = [PLUGIN] if processes is None else [SHIM, PLUGIN]
    config = write(use_tensorboard=True, plugins=plugins, **PACKED if processes is None else {})
    result = axolotl("train", config, processes=processes, timeout=HANGS)
    assert result.code == 0, result.output
    (events,) = config.with_suffix("").rglob("events.*")
    read = EventAccumulator(str(events))
    read.Reload()
    steps = [event.step for event in read.Images("routing/usage")]
    assert steps[-2:] == [2, 4] and set(steps) <= {0, 2, 4}  # some versions of the host evaluate first
    assert "train/expert_entropy" in read.Tags()["scalars"]
