"""Fixtures of the tests that go through Axolotl's command line."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli import adapters
from tests.cli.cli_helpers import AxolotlPool, save_base_model


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
