"""The second quick start: three TT-LoRA experts on a small real model, and a router that picks one for each prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from .console import Steps, fail
from .heldout import TASKS, evaluate, read_heldout, tokenize
from .models import dense_model, load, load_tokenizer
from .recipes import show_what_is_next, train

LEAST_ACCURACY = 0.97
MOST_ABOVE_EXPERT = 1.01


@dataclass(frozen=True)
class Result:
    """Held-out figures of one task: losses per token of the answers, and how often the router chose its expert."""

    base: float
    expert: float
    routed: float
    accuracy: float


def run(work_dir: Path) -> None:
    step = Steps(3 + len(TASKS))
    model_dir = dense_model(work_dir, step)
    expert_dirs = {task: train(f"tt_lora_{task}.yaml", work_dir, step) for task in TASKS}
    pool_dir = train("tt_lora_moe.yaml", work_dir, step)
    step("Held-out loss per token of the answers, and how often the router chose the task's expert")
    results = {}
    print(f"\n  {'task':12}{'base':>10}{'own expert':>12}{'routed':>10}{'router accuracy':>18}", flush=True)
    for task, r in measure(model_dir, expert_dirs, pool_dir):
        results[task] = r
        print(f"  {task:12}{r.base:10.4f}{r.expert:12.4f}{r.routed:10.4f}{r.accuracy:18.1%}", flush=True)
    show_what_is_next("tt_lora_moe.yaml", work_dir, pool_dir)
    for task, r in results.items():
        if not r.expert < r.base:
            fail(f"{task}: its expert did not lower the held-out loss")
        if not (r.accuracy >= LEAST_ACCURACY and r.routed <= MOST_ABOVE_EXPERT * r.expert):
            fail(f"{task}: the router chose the wrong expert too often")


def measure(model_dir: Path, expert_dirs: dict[str, Path], pool_dir: Path) -> Iterator[tuple[str, Result]]:
    """Measure task after task, all figures of one on the same held-out rows, with plain transformers and PEFT."""
    tokenizer = load_tokenizer(model_dir)
    base = load(model_dir)
    pool = PeftModel.from_pretrained(load(model_dir), pool_dir).eval()
    for task, folder in expert_dirs.items():
        rows = [tokenize(tokenizer, *chat) for chat in read_heldout(task)]
        expert = PeftModel.from_pretrained(load(model_dir), folder).eval()
        (base_loss, _), (expert_loss, _), (routed_loss, chosen) = (evaluate(m, rows) for m in (base, expert, pool))
        yield task, Result(base_loss, expert_loss, routed_loss, chosen.count(TASKS.index(task)) / len(chosen))
