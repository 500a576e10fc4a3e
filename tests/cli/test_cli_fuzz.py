"""Random YAMLs: each trains a step, or is refused before the model is loaded by a message that names a key of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.adapters import EXPERTS
from tests.cli.cli_helpers import AxolotlPool, Result, adapter_tensors, log_history, write_rows, write_yaml
from tests.cli.fuzz import random_keys

DAILY = 11


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.option.fuzz or DAILY))


def test_it_trains_or_is_refused_by_name(
    seed: int,
    axolotl: AxolotlPool,
    base_model: Callable[[str], Path],
    experts: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    family, keys = random_keys(seed, experts("mixtral"))
    config = write_yaml(
        tmp_path / "config.yaml",
        base_model(family),
        tmp_path / "rows.jsonl",
        **{"max_steps": 2} | dataset(keys, tmp_path) | keys,
    )
    result = axolotl("train", config)
    what = f"seed {seed}, {family}:\n{config.read_text()}\n{result.output[-6000:]}"
    if result.code:
        assert refused_by_name(result, keys), what
        return
    tensors = adapter_tensors(tmp_path / "config")
    assert tensors and all(tensor.isfinite().all() for tensor in tensors.values()), what
    lines = log_history(tmp_path / "config")
    # packed, the rows may be one batch
    assert 1 <= len(lines) <= 2 and all(math.isfinite(line["loss"]) for line in lines), what


def dataset(keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Rows of the kind that the YAML's trainer reads."""
    rows = folder / "rows.jsonl"
    entry = {"path": str(rows), "type": "chat_template"}
    if keys.get("reward_model"):
        line = '{"system": "", "input": "what is %d?", "chosen": "ok", "rejected": "no"}'
        rows.write_text("".join(line % i + "\n" for i in range(8)))
        entry["type"] = "bradley_terry.chat_template"
    elif keys.get("process_reward_model"):
        line = '{"prompt": "what is %d?", "completions": ["ok", "no"], "labels": [true, false]}'
        rows.write_text("".join(line % i + "\n" for i in range(8)))
        entry["type"] = "stepwise_supervised"
    elif keys.get("rl"):
        lines = (
            '{"chosen": [{"role": "user", "content": "what is %d?"}, {"role": "assistant", "content": "ok"}], '
            '"rejected": [{"role": "user", "content": "what is %d?"}, {"role": "assistant", "content": "no"}]}'
        )
        rows.write_text("".join(lines % (i, i) + "\n" for i in range(8)))
        entry["type"] = "chat_template.default" if keys["rl"] == "dpo" else "chat_template.argilla"
    else:
        write_rows(rows, ((f"what is {i}?", "ok" * (1 + i % 3)) for i in range(64)))
    if keys["adapter"] == "tt_lora_moe":
        entry["expert"] = EXPERTS[0]
    return {"datasets": [entry]}


def refused_by_name(result: Result, keys: dict[str, Any]) -> bool:
    """Whether it ended with one error, before anything was loaded, whose message names a key of the YAML."""
    names = {*keys, *keys[keys["adapter"]], "sequence_len"}
    before = "Loading model" not in result.output and "Starting trainer" not in result.output
    return result.code == 1 and before and any(name in result.error for name in names)
