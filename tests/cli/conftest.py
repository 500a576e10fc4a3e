"""Fixtures of the tests that go through Axolotl's command line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
