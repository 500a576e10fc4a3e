"""Everything that needs a GPU, in one command: the tests marked `gpu`, then every benchmark, and one short table last.

    python -m tests.benchmarks.gpu_checks --output results

Each check runs in a process of its own and within its own time, so that one that fails or hangs costs no other. What
they print goes to `report.txt` in the output folder as it comes, the figures to `results.json`. The checks that go
through Axolotl's command line are the group `axolotl`; the others, which need torch, transformers and peft, are the
group `methods`. `--device cpu --small` runs the same commands on tiny models, to try the checks themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.benchmarks.timing import HEADER, print_table

ROOT = Path(__file__).resolve().parents[2]
PYTEST = ("pytest", "-m", "gpu", "-q", "-rfE", "--tb=short", "--continue-on-collection-errors")


@dataclass(frozen=True)
class Check:
    """One command.

    Attributes:
        name: of the check in the table.
        group: methods or axolotl.
        module, options: of `python -m`, on a GPU.
        small: in the place of the options for `--small`.
        seconds: after which it is ended.
    """

    name: str
    group: str
    module: str
    options: tuple[str, ...]
    small: tuple[str, ...]
    seconds: int


@dataclass
class Result:
    """What became of a check: its verdict, the line that says what it ran with, and the rows of its table."""

    name: str
    verdict: str
    seconds: float
    run: str = ""
    rows: list[list[str]] = field(default_factory=list)


def _benchmark(name: str, module: str, options: str, small: str, seconds: int) -> Check:
    few = "--repeats 2 --warmup 1 --threads 1"
    return Check(
        name, "methods", f"tests.benchmarks.{module}", (*options.split(),), (*f"{small} {few}".split(),), seconds
    )


CHECKS = [
    Check(
        "tests marked gpu",
        "methods",
        PYTEST[0],
        (*PYTEST[1:], "tests", "--ignore=tests/cli"),
        (*PYTEST[1:], "tests/perft"),
        120,
    ),
    _benchmark(
        "PERFT: whole steps",
        "perft_step",
        "--size olmoe-1b-7b --repeats 15 --warmup 3 --memory-repeats 1",
        "--size tiny --memory-repeats 0",
        100,
    ),
    _benchmark(
        "PERFT: experts' implementations",
        "perft_experts",
        "--size olmoe-1b-7b --repeats 12 --experts grouped_mm eager liger scattermoe",
        "--size tiny",
        100,
    ),
    _benchmark("PERFT: routed adapters alone", "perft_branch", "--tokens 16384", "--tokens 64", 60),
    _benchmark(
        "PERFT: ways",
        "perft_ways",
        "--tokens 8192 --repeats 12 --dtypes bfloat16 float16 float32",
        "--tokens 32",
        60,
    ),
    _benchmark(
        "PT-MoE: packing, decoding",
        "pt_moe_step",
        "--size llama-3.2-1b --rows 64 --sequence-len 2048 --repeats 6 --attention sdpa flex_attention",
        "--size tiny --rows 9 --attention sdpa flex_attention",
        120,
    ),
    _benchmark("TT-LoRA: path alone", "tt_lora_branch", "--batch 8 --sequence 1024", "--batch 1 --sequence 16", 45),
    _benchmark(
        "TT-LoRA: whole steps",
        "tt_lora_step",
        "--size llama-3.2-1b --batch 8 --sequence 1024 --repeats 8",
        "--batch 1 --sequence 8",
        80,
    ),
    _benchmark(
        "TT-LoRA MoE: pools",
        "tt_lora_moe_step",
        "--size llama-3.2-1b --sequence 1024 --repeats 8",
        "--size tiny --sequence 16",
        90,
    ),
    Check(
        "checkpointing",
        "methods",
        "tests.benchmarks.checkpointing",
        ("--size", "small"),
        ("--size", "tiny", "--threads", "1"),
        60,
    ),
    Check(
        "axolotl train",
        "axolotl",
        "tests.benchmarks.axolotl_recipes",
        ("--processes", "8"),
        ("--recipes", "perft", "--steps", "2", "--bits", "0", "--threads", "1"),
        200,
    ),
    Check(
        "command line's tests marked gpu",
        "axolotl",
        PYTEST[0],
        (*PYTEST[1:], "tests/cli"),
        (*PYTEST[1:], "tests/cli/test_cli_kernels.py"),
        240,
    ),
]


def run_check(check: Check, args: argparse.Namespace, seconds: float, log: Path) -> Result:
    """Run the command for no longer than this; its output goes to the end of the log."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as stream:
        table = Path(folder) / "table.json"
        command = [sys.executable, "-m", check.module, *(check.small if args.small else check.options)]
        if check.module != PYTEST[0]:
            command += ["--device", args.device, "--dtype", "bfloat16", "--json", str(table)]
        stream.write(f"\n=== {check.name}: {' '.join(command[1:])}\n".encode())
        stream.flush()
        offset = stream.tell()
        # a session of its own: what it started ends with it
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
        try:
            code = process.wait(seconds)
            verdict = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            verdict = f"ended after {seconds:.0f} s"
        finally:
            _end(process)
        output = log.read_bytes()[offset:].decode(errors="replace")
        result = Result(check.name, verdict, round(time.monotonic() - start, 1))
        if table.exists():
            written = json.loads(table.read_text())
            result.run, result.rows = written["run"], written["rows"]
        elif check.module == PYTEST[0]:
            result.rows = [[line, "", "", ""] for line in _pytest_lines(output)]
        if not result.rows or verdict != "ok":
            result.rows += [[f"| {line[:110]}", "", "", ""] for line in output.strip().splitlines()[-4:]]
        return result


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _pytest_lines(output: str) -> list[str]:
    """The failures and the last line, which counts."""
    lines = [line for line in output.splitlines() if re.match(r"(FAILED|ERROR) |\d+ \w+.* in [\d.]+s", line)]
    return [line[:140] for line in lines[-12:]]


def print_summary(results: list[Result]) -> None:
    """Ratios and remarks; the milliseconds are in the report."""
    rows = []
    for result in results:
        rows.append([f"--- {result.name}: {result.verdict}, {result.seconds:.0f} s", "", "", ""])
        rows += [row for row in result.rows if not row[0].endswith(", ms")]
    for run in dict.fromkeys(result.run for result in results if result.run):
        print(run)
        break
    print_table(HEADER, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="tiny models and few rounds")
    parser.add_argument("--group", default="methods", choices=sorted({check.group for check in CHECKS}))
    parser.add_argument("--only", nargs="+", metavar="WORD", help="the checks with one of these words in their names")
    parser.add_argument("--seconds", type=float, default=520, help="for all checks together")
    parser.add_argument("--output", type=Path, default=Path("gpu-checks"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    log, end = args.output / "report.txt", time.monotonic() + args.seconds
    results: list[Result] = []
    for check in CHECKS:
        if check.group != args.group or (args.only and not any(word in check.name for word in args.only)):
            continue
        left = end - time.monotonic()
        if left < 5:
            results.append(Result(check.name, "no time left", 0.0))
            continue
        results.append(run_check(check, args, min(check.seconds, left), log))
        print(f"{check.name}: {results[-1].verdict}, {results[-1].seconds:.0f} s", flush=True)
        (args.output / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    print_summary(results)
    return 0 if all(result.verdict == "ok" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
