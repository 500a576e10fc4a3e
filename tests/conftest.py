"""Nothing here may reach the network or send telemetry, and files run in parallel share two cores."""

import os
import random
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.matrix import OUT_OF_TIME, Matrix

torch.set_num_threads(1)
if find_spec("triton") and not torch.cuda.is_available():
    # a torch built for CUDA brings Triton, which fla then takes although there is no GPU for it
    sys.modules["fla"] = None

# these run Axolotl; everything else needs the methods alone
collect_ignore = [] if find_spec("axolotl") else ["cli", "host", "recipes"]
# and these vLLM, which needs other versions than Axolotl does
collect_ignore_glob = [] if find_spec("vllm") else ["serving/test_vllm_*.py", "serving/test_*_server.py"]
if not find_spec("lm_eval"):  # which Axolotl brings
    collect_ignore.append("test_evaluation_harness.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", type=Path, help="write what this run has of the matrix of tests/README.md to a file")
    parser.addoption("--one-in", type=int, metavar="N", help="of a test's parameter sets one in N, always the same")
    parser.addoption("--others", action="store_true", help="those that --one-in leaves out, instead")
    parser.addoption("--until", type=float, metavar="TIME", help="begin no test after it, in seconds since 1970")
    parser.addoption("--fuzz", type=int, help="how many random YAMLs are run through Axolotl (300 is the full form)")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.others and not config.option.one_in:
        raise pytest.UsageError("--others: what --one-in N leaves out; --one-in is missing")
    if config.option.matrix:
        config.pluginmanager.register(Matrix(config.option.matrix, whole=not config.option.one_in))


@pytest.hookimpl(tryfirst=True)  # before -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in ("cli", "host", "recipes") or folder == item.path.name:
            item.add_marker(pytest.mark.host)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))
    if config.option.one_in:
        sample = set(_sample(items, config.option.one_in))
        kept = set(items) - sample if config.option.others else sample
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def _sample(items: list[pytest.Item], one_in: int) -> Iterator[pytest.Item]:
    """Of every test at least one. Drawn, as every N-th could be one adapter: always the same, on each host others."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_test in tests.values():
        chosen = [item for item in of_test if _draw(item, one_in)]
        yield from chosen or of_test[:1]


def _draw(item: pytest.Item, one_in: int) -> bool:
    return random.Random(f"{item.nodeid} on Python 3.{sys.version_info.minor}").randrange(one_in) == 0


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.option.until
    if until and time.time() > until:
        item.user_properties.append((OUT_OF_TIME, True))
        pytest.skip(OUT_OF_TIME)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for r in terminalreporter.stats.get("skipped", []) if isinstance(r, pytest.TestReport)]  # no files
    if count := sum(OUT_OF_TIME in dict(report.user_properties) for report in reports):
        terminalreporter.write_line(f"{count} {OUT_OF_TIME}")
