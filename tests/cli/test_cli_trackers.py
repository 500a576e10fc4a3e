"""Pictures of evaluations in a tracker of Axolotl's, of packed rows in two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli.cli_helpers import AxolotlPool, write_rows, write_yaml
from tests.cli.test_cli_processes import HANGS, PLUGIN, SHIM


def test_tensorboard(tmp_path: Path, base_model: Callable[[str], Path], axolotl: AxolotlPool) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ((f"what is {i}?", "ok" * (1 + i % 3)) for i in range(120)))
    packed = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 64}
    evaluations = {"val_set_size": 12, "eval_steps": 2, "max_steps": 4, "use_tensorboard": True}
    settings = {"perft": {"rank": 4, "num_experts": 8}, "plugins": [SHIM, PLUGIN]}
    config = write_yaml(tmp_path / "run.yaml", base_model("mixtral"), rows, **settings, **packed, **evaluations)
    result = axolotl("train", config, processes=2, timeout=HANGS)
    assert result.code == 0, result.output
    (events,) = config.with_suffix("").rglob("events.*")
    read = EventAccumulator(str(events))
    read.Reload()
    steps = [event.step for event in read.Images("routing/usage")]
    assert steps[-2:] == [2, 4] and set(steps) <= {0, 2, 4}  # some versions of the host evaluate first
    assert "train/expert_entropy" in read.Tags()["scalars"]
