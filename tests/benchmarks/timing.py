"""Side-by-side timing for the benchmark scripts: candidates take turns, and figures are ratios of one round."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "liger-kernel", "bitsandbytes", "axolotl")
HEADER = ("measured", "median", "min", "max")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Spread(NamedTuple):
    """Median, minimum and maximum of one figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        return cls(statistics.median(figures), min(figures), max(figures))

    def cells(self) -> list[str]:
        return [f"{figure:.3g}" if figure < 100 else f"{figure:.0f}" for figure in self]


def argument_parser(description: str, repeats: int, sizes: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that every script has, and `--size` for those that know several, the first being the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the base model and the activations")
    parser.add_argument("--repeats", type=int, default=repeats, help="measured rounds")
    parser.add_argument("--json", type=Path, help="a file for the table, too")
    if sizes:
        parser.add_argument("--size", default=sizes[0], choices=sizes, help="of the model and its batch")
    return parser


def describe_run(args: argparse.Namespace) -> str:
    """One line on what was measured with."""
    return f"{describe_machine(args.device)}, {args.threads} CPU threads, {args.dtype}, {args.repeats} rounds"


def describe_machine(device: str) -> str:
    """The device and the versions that matter."""
    name = "CPU"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        name = f"{torch.cuda.get_device_name()} (driver {driver}, CUDA {torch.version.cuda})"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return f"{name}, " + ", ".join(f"{package} {number}" for package, number in versions.items())


def report(args: argparse.Namespace, rows: Sequence[Sequence[str]]) -> None:
    """Print what was measured with and the table, and write both where `--json` says."""
    run = describe_run(args)
    print(run)
    print_table(HEADER, rows)
    if args.json:
        args.json.write_text(json.dumps({"run": run, "rows": [list(row) for row in rows]}))


def time_rounds(
    candidates: dict[str, Callable[[], object]], device: str, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Call all candidates in turn, round by round.

    Returns:
        Milliseconds of each candidate in each round after the `warmup` rounds. Entry i of every list is from the same
        round, so what slows the machine for a while cancels in the ratios.
    """
    measure = _time_cuda if device == "cuda" else _time_cpu
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + repeats):
        for name, call in candidates.items():
            elapsed = measure(call)
            if i >= warmup:
                times[name].append(elapsed)
    return times


def ratio(times: dict[str, list[float]], numerator: str, denominator: str) -> Spread:
    """Spread of the per-round ratios of two candidates."""
    return Spread.of([a / b for a, b in zip(times[numerator], times[denominator])])


def failure(what: str, error: Exception) -> list[str]:
    """A row that says why something could not be measured."""
    reason = " ".join(str(error).split())[:110]
    return [f"{what}: {type(error).__name__}: {reason}", "", "", ""]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first column left-aligned, the others right-aligned; a row without figures is a remark."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines if any(line[1:])) for i in range(len(header))]
    for line in lines:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        print("  ".join([first, *others]).rstrip())


def _time_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _time_cuda(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
