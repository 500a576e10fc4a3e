"""What this package adds to the start of `axolotl train`: one step of a tiny model with ours, and with lora.

Each command is a process of its own, from the shell to the saved adapter, and the commands take turns. The CPU time of
the process is beside its wall time, since on a busy machine only that is comparable; with `--imports` the modules
that took longest to import in a run with ours and are not imported with lora.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.timing import Spread, ratio, report
from tests.cli.cli_helpers import save_base_model, write_rows, write_yaml

OURS, LORA = "perft", "lora"
ADAPTERS = {
    LORA: {
        "plugins": None,
        "perft": None,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
    },
    OURS: {
        "perft": {"num_experts": 4, "num_experts_per_tok": 2, "rank": 4, "alpha": 8},
    },
}


def run(config: Path, threads: int, *options: str) -> tuple[float, float, str]:
    """Wall and CPU seconds of one `axolotl train`, and what it wrote to stderr.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    command = [sys.executable, *options, "-m", "axolotl.cli.main", "train", "--launcher=python", str(config)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


def import_times(config: Path, threads: int) -> dict[str, float]:
    """Milliseconds that each module took to import, without those that it imported."""
    _, _, errors = run(config, threads, "-X", "importtime")
    times = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", errors, re.MULTILINE)
    return {name: int(microseconds) / 1e3 for microseconds, name in times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, after one that is not")
    parser.add_argument("--imports", action="store_true", help="what only ours imports, instead of times")
    parser.add_argument("--json", type=Path, help="a file for the table, too")
    args = parser.parse_args()
    args.device, args.dtype = "cpu", "float32"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_base_model(folder / "model", "mixtral")
        data = write_rows(
            folder / "rows.jsonl", [("What is it?", "It is that."), ("And what else?", "Nothing else.")] * 8
        )
        configs = {
            adapter: write_yaml(
                folder / f"{adapter}.yaml", model, data, output_dir=str(folder / adapter), max_steps=1, **keys
            )
            for adapter, keys in ADAPTERS.items()
        }
        if args.imports:
            times = {adapter: import_times(config, args.threads) for adapter, config in configs.items()}
            only_ours = {module: ms for module, ms in times[OURS].items() if module not in times[LORA]}
            rows.append([f"{len(only_ours)} modules, ms", f"{sum(only_ours.values()):.0f}", "", ""])
            slowest = sorted(only_ours.items(), key=lambda item: -item[1])[:20]
            rows += [[f"{module}, ms", f"{ms:.1f}", "", ""] for module, ms in slowest]
        else:
            wall: dict[str, list[float]] = {adapter: [] for adapter in configs}
            cpu: dict[str, list[float]] = {adapter: [] for adapter in configs}
            for i in range(1 + args.repeats):
                for adapter, config in configs.items():
                    seconds, used, _ = run(config, args.threads)
                    if i:
                        wall[adapter].append(seconds)
                        cpu[adapter].append(used)
            for what, figures in (("wall", wall), ("CPU", cpu)):
                rows += [[f"{what}, {adapter}, s", *Spread.of(figures[adapter]).cells()] for adapter in configs]
                rows.append([f"{what}, {OURS} / {LORA}", *ratio(figures, OURS, LORA).cells()])
    report(args, rows)


if __name__ == "__main__":
    main()
