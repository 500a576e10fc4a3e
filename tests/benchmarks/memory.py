"""The memory that `axolotl train` takes of a config on a CPU, beside what was estimated before.

    python -m tests.benchmarks.memory example_yamls/quickstart/perft.yaml

Trains three steps without evaluation into a temporary folder. Measured is the process's own memory (RssAnon: no files
that are mapped), at its most less what it was before the base was loaded.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import yaml
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_cli
from axolotl.loaders import ModelLoader

from axolotl_moe_peft.host.memory import estimate, format_parts, total_bytes

# glibc's own caches would keep what is freed
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class Watch(threading.Thread):
    """Notes the most of this process's memory, in bytes, every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, own_memory())
            time.sleep(0.002)


def own_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    arguments = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.benchmarks.memory", *sys.argv[1:]], os.environ | ENVIRONMENT
        )
    with tempfile.TemporaryDirectory() as folder:
        short = {"output_dir": f"{folder}/out", "max_steps": 3, "save_steps": 1000, "test_datasets": None}
        config = yaml.safe_load(arguments.config.read_text()) | short
        config.pop("eval_steps", None)
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        parts = estimate(load_cfg(str(path)))
        before: list[int] = []
        load = ModelLoader.load

        def load_and_note(loader: ModelLoader) -> object:
            before.append(own_memory())
            return load(loader)

        ModelLoader.load = load_and_note
        watch = Watch()
        do_cli(str(path))
    measured = watch.most - before[0]
    print(format_parts(parts))
    print(f"measured {measured / 2**20:,.0f} MiB; estimated / measured {total_bytes(parts) / measured:.2f}")


if __name__ == "__main__":
    main()
