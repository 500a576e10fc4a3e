"""A resumed run with packing: the host draws other rows than it would have drawn, unless it packs them in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.adapters import adapter_keys
from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, write_rows, write_yaml

STEPS, STOP = 4, 2
IN_ORDER = {"sample_packing_sequentially": True, "curriculum_sampling": True}
OTHER_ROWS = (
    "not by the host: a resumed run sees other rows, with `lora` as well; `sample_packing_sequentially: true` and "
    "`curriculum_sampling: true` pack the rows in order"
)


@pytest.fixture(scope="module")
def losses(
    axolotl: AxolotlPool,
    base_model: Callable[[str], Path],
    experts: Callable[[str], Path],
    start: Callable[[str, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[list[float], list[float]]]:
    """`losses(adapter, **keys)`: of the steps of a run, and of one that is stopped and resumed."""
    folder = tmp_path_factory.mktemp("packed")
    rows = write_rows(folder / "rows.jsonl", ((f"what is {i}?", "ok" * (1 + i)) for i in range(24)))

    def run(adapter: str, **keys: Any) -> tuple[list[float], list[float]]:
        settings = {
            **adapter_keys(adapter, experts("mixtral")),
            "lora_model_dir": str(start("mixtral", adapter)),
            "sample_packing": True,
            "micro_batch_size": 1,
            "max_steps": STEPS,
            "save_steps": 1,
        }
        runs, resume = [], {}
        for name in ("straight", "resumed"):
            path = folder / f"{adapter} {name} {bool(keys)}.yaml"
            config = write_yaml(path, base_model("mixtral"), rows, **settings | keys | resume)
            result = axolotl("train", config)
            assert result.code == 0, result.output
            runs.append(config.with_suffix(""))
            resume = {"resume_from_checkpoint": str(runs[0] / f"checkpoint-{STOP}")}
        assert adapter_tensors(runs[0]).keys() == adapter_tensors(runs[1]).keys()
        straight, resumed = ([line["loss"] for line in log_history(folder)] for folder in runs)
        assert resumed[:STOP] == straight[:STOP]
        return straight, resumed

    return run


@pytest.mark.matrix("resume: with packing, in order", "{adapter}")
@pytest.mark.parametrize("adapter", ["lora", "perft"])
def test_rows_packed_in_order_are_seen_again(
    adapter: str, losses: Callable[..., tuple[list[float], list[float]]]
) -> None:
    straight, resumed = losses(adapter, **IN_ORDER)
    assert resumed == straight


def test_shuffled_rows_are_those_of_the_host(
    losses: Callable[..., tuple[list[float], list[float]]], record_property: Callable[[str, Any], None]
) -> None:
    """What the host does with its own adapter is what it does with ours."""
    equal = {adapter: resumed == straight for adapter in ("lora", "perft") for straight, resumed in [losses(adapter)]}
    assert len(set(equal.values())) == 1
    for adapter, column in (("lora", "lora"), ("perft", "perft routed")):
        record_property("matrix", ["resume: with packing", column, "CPU" if equal[adapter] else OTHER_ROWS])
