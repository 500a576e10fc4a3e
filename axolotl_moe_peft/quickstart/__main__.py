from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

from . import perft, pt_moe, tt_lora_moe
from .console import fail
from .recipes import RECIPES, WORK_DIR

QUICK_STARTS = {"perft": perft.run, "tt_lora_moe": tt_lora_moe.run, "pt_moe": pt_moe.run}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m axolotl_moe_peft.quickstart",
        description="Train a small real model on a CPU and show what the training did. Needs 8 GiB of memory.",
    )
    parser.add_argument(
        "name",
        nargs="?",
        choices=QUICK_STARTS,
        default="perft",
        help="perft: PERFT on a small MoE; tt_lora_moe: three TT-LoRA experts and a router; pt_moe: PT-MoE and its "
        "ablation (default: %(default)s)",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=WORK_DIR,
        help="where models, adapters and caches go, about 2.5 GB (default: %(default)s)",
    )
    arguments = parser.parse_args()
    work_dir = arguments.work_dir.resolve()
    check_installation()
    work_dir.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    print(f"Everything goes to {work_dir}", flush=True)
    QUICK_STARTS[arguments.name](work_dir)
    print(f"Done in {time.monotonic() - start:.0f} s. The recipes: {RECIPES}")


def check_installation() -> None:
    if not RECIPES.is_dir():
        fail(f"{RECIPES} is missing. Run it from a clone of the repository, installed with `pip install -e`.")
    if any(importlib.util.find_spec(name) is None for name in ("axolotl", "gguf")):
        fail("axolotl or gguf is missing: pip install -e '.[quickstart]'")


if __name__ == "__main__":
    main()
