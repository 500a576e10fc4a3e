import json
import re
import sys
import time

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


def run(*cells, whole=True):
    return {"stack": "", "whole": whole, "cells": [list(cell) for cell in cells]}


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
        (run(*BOTH[:1], whole=False), run(*BOTH, *GPU), None),
        (run(*BOTH, whole=False), run(*BOTH[1:], *GPU), "only on the page: packing .* b$"),
        (run(*BOTH), run(*BOTH), "only on the page: kernels"),
        (run(*BOTH), run(*BOTH, whole=False), None),
        (
            run(("packing", "lora", "CPU", False), whole=False),
            run(*BOTH, *GPU),
            "only in the tests: packing .* fails",
        ),
        (
            run(("packing", "pt_moe", "CPU", True), whole=False),
            run(*BOTH, *GPU),
            "only in the tests: packing . pt_moe",
        ),
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
    file.write_text(json.dumps(run(*BOTH, whole=False)))
    monkeypatch.setattr(matrix_page, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["matrix_page", str(file)])
    with pytest.raises(SystemExit, match=r"a\.json has a part .* without --one-in"):
        matrix_page.main()
    assert "CPU" not in page.read_text()


@pytest.fixture
def tests_of_ours(pytester):
    """43 tests, of which two have parameter sets, beside the conftest.py of these tests."""
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n    matrix\n    gpu\n    host\n")
    pytester.makepyfile("""
import pytest
@pytest.mark.matrix("many", "lora")
@pytest.mark.parametrize("number", range(40))
def test_many(number): ...
@pytest.mark.parametrize("number", range(2))
def test_few(number): ...
def test_one(): ...
""")
    return pytester


def collected(pytester, *options):
    lines = pytester.runpytest_inprocess("--collect-only", "-q", *options).outlines
    return [line for line in lines if "::" in line]


def test_of_a_tests_parameter_sets_one_in_n_run_and_of_every_test_at_least_one(tests_of_ours):
    sample = collected(tests_of_ours, "--one-in", "4")
    assert 4 <= sum("test_many" in name for name in sample) <= 16
    assert any("test_few" in name for name in sample) and any("test_one" in name for name in sample)
    others = collected(tests_of_ours, "--one-in", "4", "--others")
    assert sorted(sample + others) == sorted(collected(tests_of_ours))
    assert tests_of_ours.runpytest_inprocess("--others").ret == pytest.ExitCode.USAGE_ERROR


def test_when_time_is_over_no_test_is_begun_and_none_of_them_is_lost(tests_of_ours, monkeypatch):
    tests_of_ours.makepyfile(test_file="import pytest; pytest.skip('a file', allow_module_level=True)")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    in_time, too_late = (
        tests_of_ours.runpytest_subprocess("-n", "2", "--matrix=a.json", "--until", str(time.time() + more))
        for more in (600, -1)
    )
    in_time.assert_outcomes(passed=43, skipped=1)
    in_time.stdout.no_fnmatch_line("*not run*")
    too_late.assert_outcomes(skipped=44)
    too_late.stdout.fnmatch_lines("43 not run, as time was over")
    assert json.loads((tests_of_ours.path / "a.json").read_text()) | {"stack": ""} == run(whole=False)
