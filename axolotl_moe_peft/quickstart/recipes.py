"""Trains a recipe of `example_yamls/quickstart/` with `axolotl train`, unless that was done before."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from .console import Steps, fail
from .files import sha256

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "example_yamls" / "quickstart"
WORK_DIR = ROOT / "quickstart-output"  # as the recipes have it

_MARK = "quickstart_inputs.json"


def train(name: str, work_dir: Path, step: Steps) -> Path:
    """Train a recipe unless it was trained as it now is, on the data and experts that are now there.

    Args:
        name: file name of the recipe.
        work_dir: stands for the recipe's `quickstart-output`.

    Returns:
        The adapter's folder.
    """
    recipe = RECIPES / name
    config = _in_work_dir(yaml.safe_load(recipe.read_text(encoding="utf-8")), work_dir)
    adapter_dir = ROOT / config["output_dir"]
    mark = adapter_dir / _MARK
    inputs = {"recipe": config, "sha256": {str(path): sha256(path) for path in _files_read(config)}}
    if mark.is_file() and json.loads(mark.read_text()) == inputs:
        step(f"{name}: trained before, using {adapter_dir}")
        return adapter_dir
    mark.unlink(missing_ok=True)
    if work_dir != WORK_DIR:
        recipe = work_dir / name
        recipe.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    # one process; the default launcher starts one on every GPU
    command = ["train", os.path.relpath(recipe, ROOT), "--launcher=python"]
    step(f"axolotl {shlex.join(command)}")
    # One GPU at most; and threads that spin while they wait make a busy CPU many times slower.
    defaults = {"CUDA_VISIBLE_DEVICES": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    axolotl = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.main", *command],
        cwd=ROOT,
        env=defaults | os.environ | {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"},
    )
    if axolotl.returncode:
        fail(f"axolotl train failed with exit code {axolotl.returncode}, see above")
    mark.write_text(json.dumps(inputs, indent=2))
    return adapter_dir


def show_what_is_next(name: str, work_dir: Path, adapter_dir: Path) -> None:
    """Print where the adapter of a recipe is, and the command that asks it."""
    recipe = RECIPES / name if work_dir == WORK_DIR else work_dir / name
    options = ["--lora-model-dir", os.path.relpath(adapter_dir, ROOT), "--launcher=python"]
    command = shlex.join(["axolotl", "inference", os.path.relpath(recipe, ROOT), *options])
    print(f"\nThe adapter: {adapter_dir}")
    print(f"Next, in {ROOT}, ask it something (Ctrl-D ends the question):\n\n    {command}\n", flush=True)


def _in_work_dir(value: Any, work_dir: Path) -> Any:
    """The recipe with its paths in `quickstart-output` where they are."""
    if isinstance(value, dict):
        return {key: _in_work_dir(item, work_dir) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_work_dir(item, work_dir) for item in value]
    if isinstance(value, str) and Path(value).parts[:1] == (WORK_DIR.name,):
        return str(work_dir.joinpath(*Path(value).parts[1:]))
    return value


def _files_read(config: dict[str, Any]) -> list[Path]:
    data = [dataset["path"] for key in ("datasets", "test_datasets") for dataset in config[key]]
    experts = config.get("tt_lora_moe", {}).get("experts", [])
    return [ROOT / path for path in data] + [ROOT / e["path"] / "adapter_model.safetensors" for e in experts]


def read_heldout_losses(adapter_dir: Path) -> tuple[float, float]:
    """Read the first and the last evaluation of the latest run from what the trainer saved with its checkpoint."""
    states = sorted(adapter_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(states[-1].read_text())["log_history"] if states else []
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    if len(losses) < 2:
        fail("the recipe has to evaluate before and after training, and to save a checkpoint")
    return losses[0], losses[-1]
