"""Collects which features of the host are tested with which adapter, for the matrix of tests/README.md.

A test that shows how an adapter works with a feature carries

    @pytest.mark.matrix("packing: on", "{adapter}")                       # a row and a column
    @pytest.mark.matrix("merging", "perft", cell="refused: its updates depend on the token")

in which names in braces are the test's parameters. What is known only while the test runs, it records instead:
`record_property("matrix", [row, column, cell])`. A cell is `CPU` or `GPU` by the test's marker, or the text of `cell`,
whose reason becomes a note. `pytest --matrix=FILE` writes a run's cells, and the versions that it ran with, to a file;
matrix_page.py makes the page of such files. It wants the equals sign, as pytest takes a file that exists for tests.
"""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

COLUMNS = (
    "lora",
    "perft routed",
    "perft embedded",
    "perft dense",
    "tt_lora",
    "tt_lora_moe",
    "pt_moe",
)
SKIPPED = "(GPU)"
OUT_OF_TIME = "not run, as time was over"  # what a test is skipped for after --until, and a property of its report
_ALIASES = {"perft": "perft routed", "routed": "perft routed"}
_WITHOUT_COLUMN = ("perft single",)  # to the host it is as dense
_PACKAGES = ("axolotl", "transformers", "peft", "trl", "accelerate", "torch")


class Matrix:
    """Collects the cells of a run and writes them to a file.

    Args:
        path: of the file.
        whole: whether all tests are to run; where time is over before they have, they have not.
    """

    def __init__(self, path: Path, whole: bool = True) -> None:
        self.path, self.whole = path, whole
        self.passed: dict[tuple[str, str, str], bool] = defaultdict(lambda: True)

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        parameters = getattr(item, "callspec", None)
        for marker in item.iter_markers("matrix"):
            row, column = (text.format(**(parameters.params if parameters else {})) for text in marker.args)
            if column in _WITHOUT_COLUMN:
                continue
            cell = marker.kwargs.get("cell") or ("GPU" if item.get_closest_marker("gpu") else "CPU")
            _check_column(item.nodeid, column)
            item.user_properties.append(("matrix", [row, column, cell]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" or (report.when == "setup" and report.passed):
            return
        if OUT_OF_TIME in dict(report.user_properties):
            self.whole = False
            return
        for name, value in report.user_properties:
            if name == "matrix":
                row, column, cell = value
                _check_column(report.nodeid, column)
                key = (row, _ALIASES.get(column, column), SKIPPED if report.skipped else cell)
                self.passed[key] &= not report.failed

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):  # a process of pytest-xdist: its reports go to the controller
            return
        cells = [[*key, passed] for key, passed in sorted(self.passed.items())]
        self.path.write_text(json.dumps({"stack": stack(), "whole": self.whole, "cells": cells}, indent=1))


def _check_column(nodeid: str, column: str) -> None:
    if _ALIASES.get(column, column) not in COLUMNS:
        raise ValueError(f"{nodeid}: no column {column!r} in the matrix; one of {COLUMNS}")


def stack() -> str:
    """The versions that this run has."""
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


if __name__ == "__main__":
    print(stack())
