import json
import re
import sys

import pytest

from tests import matrix_page
from tests.cli.cli_helpers import ROOT

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


def run(*cells, one_in=None):
    return {"stack": "", "one_in": one_in, "cells": [list(cell) for cell in cells]}


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


BOTH = [("packing", "lora", "CPU", True), ("merging", "pt_moe", "no: R, of course", True)]
GPU = [("kernels", "lora", "(GPU)", True)]


@pytest.mark.parametrize(
    ("a", "b", "differs"),
    [
        (run(*BOTH), run(*BOTH, *GPU), None),
        (run(*BOTH), run(*BOTH, ("kernels", "lora", "GPU", True)), None),
        (run(*BOTH[:1]), run(*BOTH, *GPU), "only on the page: merging .* a$"),
        (run(*BOTH[:1], one_in=2), run(*BOTH, *GPU), None),
        (run(*BOTH, one_in=2), run(*BOTH[1:], *GPU), "only on the page: packing .* b$"),
        (run(*BOTH), run(*BOTH), "only on the page: kernels"),
        (
            run(("packing", "lora", "CPU", False), one_in=2),
            run(*BOTH, *GPU),
            "only in the tests: packing .* fails",
        ),
        (run(("packing", "pt_moe", "CPU", True), one_in=2), run(*BOTH, *GPU), "only in the tests: packing . pt_moe"),
        (
            run(*BOTH),
            run(BOTH[0], ("merging", "pt_moe", "no: S", True), *GPU),
            "only in the tests: merging .* no: S",
        ),
    ],
)
def test_a_page_of_other_tests_does_not_pass(tmp_path, monkeypatch, a, b, differs):
    page, files = tmp_path / "README.md", [tmp_path / "a.json", tmp_path / "b.json"]
    page.write_text(f"before\n{matrix_page.BEGIN}\n{matrix_page.END}\nafter\n")
    monkeypatch.setattr(matrix_page, "PAGE", page)
    for runs, options in (((run(*BOTH), run(*BOTH, *GPU)), []), ((a, b), ["--check"])):
        for file, cells in zip(files, runs):
            file.write_text(json.dumps(cells))
        monkeypatch.setattr(sys, "argv", ["matrix_page", *options, *map(str, files)])
        if options and differs:
            with pytest.raises(SystemExit) as exit:
                matrix_page.main()
            assert any(re.match(differs, line) for line in str(exit.value).splitlines())
        else:
            matrix_page.main()
            assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")


def test_no_page_is_written_from_a_part_of_the_tests(tmp_path, monkeypatch):
    page, file = tmp_path / "README.md", tmp_path / "a.json"
    page.write_text(f"before\n{matrix_page.BEGIN}\n{matrix_page.END}\nafter\n")
    file.write_text(json.dumps(run(*BOTH, one_in=3)))
    monkeypatch.setattr(matrix_page, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["matrix_page", str(file)])
    with pytest.raises(SystemExit, match=r"a\.json has one in 3 .* without --one-in"):
        matrix_page.main()
    assert "CPU" not in page.read_text()


def test_of_a_tests_parameter_sets_one_in_n_run_and_of_every_test_at_least_one(pytester):
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile("""
import pytest
@pytest.mark.parametrize("number", range(40))
def test_many(number): ...
@pytest.mark.parametrize("number", range(2))
def test_few(number): ...
def test_one(): ...
""")
    lines = pytester.runpytest_inprocess("--collect-only", "-q", "--one-in", "4").outlines
    assert 4 <= sum("test_many" in line for line in lines) <= 16
    assert any("test_few" in line for line in lines) and any("test_one" in line for line in lines)
