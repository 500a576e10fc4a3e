"""Optimisers, schedules and learning-rate keys of the host that look at parameters: they work or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, write_rows, write_yaml

ADAPTERS: dict[str, dict[str, Any]] = {
    "perft": {"perft": {"rank": 4}},
    "tt_lora": {"adapter": "tt_lora", "perft": None, "tt_lora": {"rank": 4}},
}
REFUSING = ADAPTERS | {
    "tt_lora_moe": {
        "adapter": "tt_lora_moe",
        "perft": None,
        "tt_lora_moe": {"experts": [{"name": "a", "path": "nowhere"}]},
    },
    "pt_moe": {"adapter": "pt_moe", "perft": None, "pt_moe": {}},
}
# row of the matrix: keys. Factored moments, schedule-free weights, 8-bit states, ...
WORKING: dict[str, dict[str, Any]] = {
    "optimiser: adafactor": {"optimizer": "adafactor"},
    "optimiser: schedule_free_adamw": {"optimizer": "schedule_free_adamw"},
    "optimiser: adamw_8bit": {"optimizer": "adamw_8bit"},
    "optimiser: jagged_restart_steps": {
        "jagged_restart_steps": 2,
        "jagged_restart_warmup_steps": 1,
        "jagged_restart_anneal_steps": 1,
    },
}
MATRICES, FROZEN, WHOLE = "matrices only", "which are frozen", "the frozen ones included"
# row of the matrix: keys, what the message must hold
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "optimiser: muon": ({"optimizer": "muon"}, MATRICES),
    "optimiser: dion": ({"optimizer": "dion"}, MATRICES),
    "optimiser: galore_*": ({"optimizer": "galore_adamw", "optim_target_modules": ["mlp"]}, FROZEN),
    "optimiser: apollo_*": ({"optimizer": "apollo_adamw", "optim_target_modules": ["mlp"]}, FROZEN),
    "optimiser: lomo, adalomo": ({"optimizer": "adalomo"}, WHOLE),
    "optimiser: loraplus_lr_ratio": ({"loraplus_lr_ratio": 4.0}, "`loraplus_lr_ratio` means nothing"),
    "optimiser: relora": ({"relora": True, "jagged_restart_steps": 2}, "`relora` means nothing"),
    "optimiser: polora": ({"optimizer": "polora"}, "polora only updates LoRA"),  # the host's own words
    "optimiser: q_galore_adamw8bit": ({"optimizer": "q_galore_adamw8bit"}, "incompatible with adapter"),
}
REASONS = {
    MATRICES: "it takes matrices only, the parameters are stacks of them",
    FROZEN: "it is for weights of the base, which are frozen",
    WHOLE: "it takes all weights, the frozen ones included",
}
STEPS = 2


@pytest.fixture(scope="module")
def write_config(tmp_path_factory: pytest.TempPathFactory, base_model: Callable[[str], Path]) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("optimizers")
    rows = write_rows(folder / "rows.jsonl", ((f"what is {i}?", "ok" * (1 + i % 3)) for i in range(4)))

    def write(name: str, **keys: Any) -> Path:
        settings = {"max_steps": STEPS, "save_steps": 1, "learning_rate": 0.01}
        return write_yaml(folder / f"{name}.yaml", base_model("mixtral"), rows, **settings | keys)

    return write


@pytest.mark.parametrize(
    ("row", "adapter"),
    [
        pytest.param(row, adapter, marks=pytest.mark.matrix(row, adapter), id=f"{row}, {adapter}")
        for row in WORKING
        for adapter in ADAPTERS
    ],
)
def test_works(row: str, adapter: str, axolotl: AxolotlPool, write_config: Callable[..., Path]) -> None:
    config = write_config(f"{row.rpartition(' ')[2]} {adapter}", **ADAPTERS[adapter] | WORKING[row])
    result = axolotl("train", config)
    assert result.code == 0, result.output
    losses = [line["loss"] for line in log_history(config.with_suffix(""))]
    assert len(losses) == STEPS and losses[1] < losses[0], losses
    first, last = (
        adapter_tensors(folder) for folder in (config.with_suffix("") / "checkpoint-1", config.with_suffix(""))
    )
    assert [name for name in last if torch.equal(first[name], last[name])] == []


@pytest.mark.matrix("optimiser: lr_groups", "{adapter}")
@pytest.mark.parametrize(("adapter", "group"), [("perft", "perft_router"), ("tt_lora", "ttcore_in_0")])
def test_lr_groups_choose_parameters_by_name(
    adapter: str, group: str, axolotl: AxolotlPool, write_config: Callable[..., Path]
) -> None:
    lr_groups = [{"name": "frozen", "modules": [group], "lr": 0.0}]
    config = write_config(f"lr_groups {adapter}", **ADAPTERS[adapter], lr_groups=lr_groups)
    result = axolotl("train", config)
    assert result.code == 0, result.output
    first, last = (
        adapter_tensors(folder) for folder in (config.with_suffix("") / "checkpoint-1", config.with_suffix(""))
    )
    still = {name for name in last if torch.equal(first[name], last[name])}
    assert still == {name for name in last if group in name} != set()


@pytest.mark.parametrize(
    ("row", "adapter"),
    [
        pytest.param(
            row,
            adapter,
            marks=pytest.mark.matrix(row, adapter, cell=f"refused: {REASONS.get(message, 'it is for LoRA')}"),
            id=f"{row}, {adapter}",
        )
        for row, (_, message) in REFUSED.items()
        for adapter in (REFUSING if message == MATRICES else ADAPTERS)
    ],
)
def test_is_refused_before_anything_is_loaded(
    row: str, adapter: str, axolotl: AxolotlPool, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    keys, message = REFUSED[row]
    dataset = {"path": "nowhere", "type": "chat_template"} | ({"expert": "a"} if adapter == "tt_lora_moe" else {})
    keys = REFUSING[adapter] | keys | {"datasets": [dataset], "output_dir": str(tmp_path / "out")}
    result = axolotl("train", write_config("refused", **keys))
    assert (result.code, result.tracebacks) == (1, 1), result.output
    assert message in result.error and adapter in result.error, result.error
    assert not (tmp_path / "out").exists()
