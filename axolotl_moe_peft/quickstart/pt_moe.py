"""The third quick start: PT-MoE beside what it is made of, on three tasks at once and at about equal sizes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from .console import Steps, fail
from .heldout import TASKS, evaluate, read_heldout, tokenize
from .models import dense_model, load, load_tokenizer
from .recipes import show_what_is_next, train

# the ablation of the paper, under its names
SETTINGS = {"PT": "pt.yaml", "DPT": "dpt.yaml", "SMoP": "smop.yaml", "PT-MoE": "pt_moe.yaml"}


@dataclass(frozen=True)
class Result:
    """Of one setting: its size, and by task the held-out loss per token and how many rows each expert got."""

    parameters: int
    losses: dict[str, float]
    rows: dict[str, list[int]]

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses.values())


def run(work_dir: Path) -> None:
    step = Steps(2 + len(SETTINGS))
    model_dir = dense_model(work_dir, step)
    adapter_dirs = {setting: train(recipe, work_dir, step) for setting, recipe in SETTINGS.items()}
    step("Held-out loss per token of the answers, and how many of a task's rows each expert got")
    print(f"\n  {'':8}{'parameters':>12}" + "".join(f"{task:>20}" for task in TASKS) + f"{'mean':>10}")
    results = {}
    for setting, result in measure(model_dir, adapter_dirs):
        results[setting] = result
        losses = (f"{result.losses[task]:.4f} {_rows(result.rows[task]):>9}" for task in TASKS)
        columns = "".join(f"{column:>20}" for column in losses)
        print(f"  {setting:8}{result.parameters:12,}{columns}{result.mean:10.4f}", flush=True)
    show_what_is_next("pt_moe.yaml", work_dir, adapter_dirs["PT-MoE"])
    if not results["PT-MoE"].mean < results["base"].mean:
        fail("PT-MoE did not lower the held-out loss")


def measure(model_dir: Path, adapter_dirs: dict[str, Path]) -> Iterator[tuple[str, Result]]:
    """Measure the base, then each setting on the same held-out rows, with plain transformers and PEFT."""
    tokenizer = load_tokenizer(model_dir)
    rows = {task: [tokenize(tokenizer, *chat) for chat in read_heldout(task)] for task in TASKS}
    base = load(model_dir)
    yield "base", Result(0, {task: evaluate(base, rows[task])[0] for task in TASKS}, {task: [] for task in TASKS})
    for setting, folder in adapter_dirs.items():
        model = PeftModel.from_pretrained(load(model_dir), folder, is_trainable=True).eval()
        found = {task: evaluate(model, rows[task]) for task in TASKS}
        experts = range(model.peft_config["default"].num_experts)
        yield (
            setting,
            Result(
                parameters=model.get_nb_trainable_parameters()[0],
                losses={task: loss for task, (loss, _) in found.items()},
                rows={task: [chosen.count(expert) for expert in experts] for task, (_, chosen) in found.items()},
            ),
        )


def _rows(counts: list[int]) -> str:
    return " / ".join(map(str, counts)) if len(counts) > 1 else ""
