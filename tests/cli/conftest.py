"""Fixtures of the tests that go through Axolotl's command line."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.cli import adapters
from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, save_base_model, write_rows, write_yaml


@pytest.fixture(scope="session")
def axolotl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AxolotlPool]:
    """`axolotl("train", config, *options)`: the command in a process of its own."""
    pool = AxolotlPool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`base_model("olmoe")`: the folder of a tiny model of that family; its weights are the same in every file."""
    folder = tmp_path_factory.mktemp("bases")

    def get(family: str) -> Path:
        return folder / family if (folder / family).exists() else save_base_model(folder / family, family)

    return get


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory, base_model: Callable[[str], Path]) -> Callable[[str], Path]:
    """`experts("mixtral")`: the folder of a pool's experts for that tiny model."""
    folder = tmp_path_factory.mktemp("experts")

    @functools.cache
    def save(family: str) -> Path:
        adapters.save_experts(base_model(family), folder / family)
        return folder / family

    return save


@pytest.fixture(scope="session")
def start(
    tmp_path_factory: pytest.TempPathFactory,
    base_model: Callable[[str], Path],
    experts: Callable[[str], Path],
) -> Callable[[str, str], Path]:
    """`start("mixtral", "perft embedded")`: a saved adapter of adapters.py for that tiny model, to continue."""
    folder = tmp_path_factory.mktemp("starts")

    @functools.cache
    def save(family: str, adapter: str) -> Path:
        adapters.save_start(adapter, base_model(family), experts(family), folder / family / adapter)
        return folder / family / adapter

    return save


@pytest.fixture(scope="module")
def train_from_start(
    axolotl: AxolotlPool,
    base_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    experts: Callable[[str], Path],
    start: Callable[[str, str], Path],
) -> Callable[..., tuple[list[dict[str, float]], dict[str, Tensor], str]]:
    """`train_from_start(family, adapter, name, **keys)`: log lines, saved adapter and output of a run from `start`.

    It steps with SGD without clipping, so that the weights show every gradient's size.
    """
    folder = tmp_path_factory.mktemp("from_start")
    rows = write_rows(folder / "rows.jsonl", ((f"what is {i}?", "ok" * (1 + i)) for i in range(4)))

    def run(
        family: str, adapter: str, name: str, **keys: Any
    ) -> tuple[list[dict[str, float]], dict[str, Tensor], str]:
        settings = {
            **adapters.adapter_keys(adapter, experts(family)),
            **adapters.dataset_keys(adapter, rows),
            "lora_model_dir": str(start(family, adapter)),
            "gradient_checkpointing": True,
            "max_steps": 1,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "max_grad_norm": 1e6,
        }
        config = write_yaml(folder / f"{family} {adapter} {name}.yaml", base_model(family), rows, **settings | keys)
        result = axolotl("train", config)
        assert result.code == 0, result.output
        return log_history(config.with_suffix("")), adapter_tensors(config.with_suffix("")), result.output

    return run
