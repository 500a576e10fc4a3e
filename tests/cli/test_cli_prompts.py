"""Rows without a prompt, which routers of prompts could not read: found while datasets are prepared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from tests.cli.adapters import adapter_keys
from tests.cli.cli_helpers import AxolotlPool, log_history, write_yaml

WITHOUT = 3  # of eight rows


@pytest.fixture
def write(tmp_path: Path, base_model: Callable[[str], Path], experts: Callable[[str], Path]) -> Callable[..., Path]:
    """`write(adapter, **keys)`: a YAML with two datasets, of which the second has such a row."""
    answer, question = {"label": True, "text": "ok"}, {"label": False, "text": "what is it?"}
    segments = [[question, answer] if i != WITHOUT else [answer] for i in range(8)]

    def run(adapter: str, **block: Any) -> Path:
        datasets = []
        for name, rows in (("good.jsonl", segments[:WITHOUT]), ("bad.jsonl", segments)):
            (tmp_path / name).write_text("".join(json.dumps({"segments": row}) + "\n" for row in rows))
            datasets.append({"path": str(tmp_path / name), "type": "input_output"})
            datasets[-1] |= {"expert": "a"} if adapter == "tt_lora_moe" else {}
        keys = adapter_keys(adapter, experts("mixtral"))
        keys[adapter] = keys[adapter] | block
        return write_yaml(
            tmp_path / "run.yaml", base_model("mixtral"), tmp_path / "rows.jsonl", datasets=datasets, **keys
        )

    return run


@pytest.mark.parametrize("command", ["preprocess", "train"])
def test_they_are_an_error_that_names_the_dataset_and_the_row(
    command: str, axolotl: AxolotlPool, write: Callable[..., Path], tmp_path: Path
) -> None:
    result = axolotl(command, write("pt_moe"))
    assert result.code != 0
    assert f"datasets[1] ({tmp_path / 'bad.jsonl'}): 1 of 8 rows begin with a supervised token" in result.output
    assert f"row {WITHOUT}: " in result.output and "`rows_without_prompt: drop`" in result.output
    assert "router_input: sequence" in result.output and "Loading model" not in result.output


@pytest.mark.parametrize("adapter", ["pt_moe", "tt_lora_moe"])
def test_they_are_left_out_on_request(
    adapter: str, axolotl: AxolotlPool, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(adapter, rows_without_prompt="drop")
    result = axolotl("train", config)
    assert result.code == 0, result.output
    assert f"datasets[1] ({tmp_path / 'bad.jsonl'}): 1 of 8 rows have no prompt and are left out: 3" in result.output
    prepared = load_from_disk(str(next(filter(Path.is_dir, (tmp_path / "rows.prepared").iterdir()))))
    assert len(prepared) == WITHOUT + 7
    assert log_history(config.with_suffix(""))


def test_they_mean_nothing_to_a_router_of_whole_sequences(axolotl: AxolotlPool, write: Callable[..., Path]) -> None:
    result = axolotl("train", write("pt_moe", rows_without_prompt="drop", router_input="sequence"))
    assert result.code != 0
    assert "pt_moe.rows_without_prompt means nothing where" in result.output
