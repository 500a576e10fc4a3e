import json
import sys

import pytest

from tests import matrix_page

pytest_plugins = ["pytester"]

CONFTEST = """
from pathlib import Path
from tests.matrix import Matrix
def pytest_configure(config):
    config.pluginmanager.register(Matrix(Path("a.json")))
"""
TESTS = """
import pytest
@pytest.mark.matrix("sizes: {size}", "{adapter}")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("adapter", ["perft", "lora"])
def test_sizes(adapter, size):
    assert (adapter, size) != ("lora", 2)
@pytest.mark.matrix("merging", "pt_moe", cell="refused: no weight computes it")
def test_refused():
    pass
def test_what_only_the_run_knows(record_property):
    record_property("matrix", ["resuming", "lora", "CPU"])
@pytest.mark.gpu
@pytest.mark.matrix("kernels", "lora")
def test_gpu():
    pytest.skip("no GPU")
"""


def run(*cells):
    return {"stack": "", "cells": [list(cell) for cell in cells]}


def test_a_run_writes_what_its_tests_showed(pytester):
    pytester.makeini("[pytest]\nmarkers =\n    matrix\n    gpu\n")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert json.loads((pytester.path / "a.json").read_text())["cells"] == [
        ["kernels", "lora", "(GPU)", True],
        ["merging", "pt_moe", "refused: no weight computes it", True],
        ["resuming", "lora", "CPU", True],
        ["sizes: 1", "lora", "CPU", True],
        ["sizes: 1", "perft routed", "CPU", True],
        ["sizes: 2", "lora", "CPU", False],
        ["sizes: 2", "perft routed", "CPU", True],
    ]


def test_a_cell_names_the_stacks_that_it_passed_on():
    a = run(("packing", "lora", "CPU", True), ("packing", "pt_moe", "CPU", True), ("merging", "pt_moe", "no: R", True))
    b = run(("packing", "lora", "CPU", True), ("packing", "pt_moe", "CPU", False), ("kernels", "lora", "(GPU)", True))
    gpu = run(("kernels", "lora", "GPU", True))
    assert matrix_page.table({"a": a, "b": b, "gpu": gpu}).splitlines()[2:] == [
        "| kernels | GPU |  |  |  |  |  |  |",
        "| merging |  |  |  |  |  |  | no [1] a |",
        "| packing | CPU ab |  |  |  |  |  | CPU a, fails b |",
        "",
        "1. R",
    ]


@pytest.mark.parametrize(("cells", "code"), [([("x", "lora", "CPU", True)], 0), ([("x", "pt_moe", "CPU", True)], 1)])
def test_a_page_of_other_tests_does_not_pass(tmp_path, monkeypatch, cells, code):
    page, file = tmp_path / "README.md", tmp_path / "a.json"
    page.write_text(f"before\n{matrix_page.BEGIN}\n{matrix_page.END}\nafter\n")
    monkeypatch.setattr(matrix_page, "PAGE", page)
    file.write_text(json.dumps(run(("x", "lora", "CPU", True))))
    monkeypatch.setattr(sys, "argv", ["matrix_page", str(file)])
    matrix_page.main()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    file.write_text(json.dumps(run(*cells)))
    monkeypatch.setattr(sys, "argv", ["matrix_page", "--check", str(file)])
    if code:
        with pytest.raises(SystemExit, match="differs"):
            matrix_page.main()
    else:
        matrix_page.main()
