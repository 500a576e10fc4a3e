"""`axolotl train` with every quick-start recipe on tiny random models, as on a GPU: bf16, checkpointing, Liger.

The recipes keep their data, adapters and schedules. What changes is what their comments say for a GPU, the base model,
and the length of a row, as the tiny tokenizer has one token per character. Flash attention where it is installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.benchmarks.timing import argument_parser, report
from tests.cli.cli_helpers import run_command, run_on_gpu, save_tokenizer
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "example_yamls/quickstart").glob("*.yaml"))
ROUTER = "tt_lora_moe"
BASES = {"quickstart-output/model": "mixtral", "quickstart-output/dense": "llama"}
LIGER = ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy")
MOST_TOKENS = 2048


def save_bases(folder: Path) -> None:
    for path, family in BASES.items():
        # weights that are large enough for attention and experts to matter
        model = tiny_model(family, hidden_size=256, max_position_embeddings=4 * MOST_TOKENS, initializer_range=0.08)
        model.save_pretrained(folder / path)
        save_tokenizer(folder / path)


def adapt(value: Any, folder: Path) -> Any:
    """A recipe's value with its paths where they are."""
    if isinstance(value, dict):
        return {key: adapt(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [adapt(item, folder) for item in value]
    if isinstance(value, str) and value.startswith("quickstart-output/"):
        return str(folder / value)
    return str(ROOT / value) if isinstance(value, str) and value.startswith("example_yamls/") else value


def write_recipe(recipe: Path, folder: Path, on_gpu: bool, bits: int | None, steps: int | None) -> Path:
    """The recipe as it is run here."""
    config = adapt(yaml.safe_load(recipe.read_text()), folder)
    config |= {"sequence_len": MOST_TOKENS, "dataset_num_proc": 1, "dataloader_num_workers": 0}
    if on_gpu:
        attention = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
        config |= {"bf16": True, "gradient_checkpointing": True, "attn_implementation": attention}
        config["plugins"] = ["axolotl.integrations.liger.LigerPlugin", *config["plugins"]]
        config |= dict.fromkeys(LIGER, True)
    if bits:
        config |= {f"load_in_{bits}bit": True, "output_dir": f"{config['output_dir']}-{bits}bit"}
    if steps:
        config |= {"max_steps": steps, "save_steps": steps}
    path = folder / f"{recipe.stem}-{bits}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def losses(output_dir: Path) -> list[float]:
    state = max(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return [line["loss"] for line in json.loads(state.read_text())["log_history"] if "loss" in line]


def train(recipe: Path, bits: int, folder: Path, args: argparse.Namespace) -> tuple[str, int]:
    """A row of the table, and the exit code."""
    on_gpu = args.device == "cuda"
    config = write_recipe(recipe, folder, on_gpu, bits or None, args.steps)
    row = f"axolotl train {recipe.name}{f', {bits}-bit base' if bits else ''}: "
    result = run_on_gpu("train", config) if on_gpu else run_command("axolotl", "train", str(config))
    if result.code:
        print(result.output)
        return row + (result.error or result.output).strip()[-300:], result.code
    found = losses(Path(yaml.safe_load(config.read_text())["output_dir"]))
    few = max(1, len(found) // 10)
    first, last = (sum(part) / few for part in (found[:few], found[-few:]))
    row += f"loss {first:.3f} -> {last:.3f}, {len(found)} steps"
    print(row, flush=True)
    return row, 0


def main() -> None:
    parser = argument_parser(__doc__, repeats=1)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--recipes", nargs="+", default=[recipe.stem for recipe in RECIPES])
    parser.add_argument("--bits", type=int, nargs="*", default=[0, 4], help="of the base; 0 is as it is")
    parser.add_argument("--processes", type=int, default=1, help="that train at a time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_bases(folder)
        rows, failed = [], False
        chosen = [recipe for recipe in RECIPES if recipe.stem in args.recipes]
        # the router's recipe comes after those of its experts
        for recipes in ([r for r in chosen if r.stem != ROUTER], [r for r in chosen if r.stem == ROUTER]):
            with ThreadPoolExecutor(args.processes) as pool:
                for row, code in pool.map(
                    lambda run: train(*run, folder, args), itertools.product(recipes, args.bits)
                ):
                    rows.append([row, "", "", ""])
                    failed |= code != 0
    report(args, rows)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
