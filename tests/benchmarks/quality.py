"""Does it help? Every method on the quick starts' models and three tasks, beside the frozen base and PEFT's LoRA.

    python -m tests.benchmarks.quality WORK_DIR tests/benchmarks/quality.jsonl [--steps 60] [--seeds 3] [--only dense]

WORK_DIR has the quick starts' `dense` and `model`. The learning rate of every method is chosen from one grid, walked
downhill from its middle, by the loss on rows of the training files that are not trained on, after a third of the steps
with the first seed; a method at other sizes keeps it. Then every method is trained with every seed: the same rows in
the same order, steps of a row of each task. Each run is a line of JSON in RESULTS; a run that has a line is not made
again, whatever machine it ran on. Then steps are timed beside the base's, which wants an idle machine; the tables come
last. `quality_page` writes the page of them.

Shape suffixes: D datasets (the tasks), N experts, T tokens or prompts, K chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from axolotl_moe_peft.quickstart.heldout import TASKS, read_heldout, tokenize
from axolotl_moe_peft.quickstart.models import load, load_tokenizer
from axolotl_moe_peft.quickstart.recipes import RECIPES, ROOT
from axolotl_moe_peft.shared.choices import watch_choices
from axolotl_moe_peft.shared.routing import Routing
from tests.benchmarks.quality_methods import METHODS, Method
from tests.benchmarks.quality_page import tables

TRAIN_ROWS, VALIDATION_ROWS, HELDOUT_ROWS = 40, 8, 12
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
TIMED_ROUNDS = 5
# what no method is trained on: a licence's text
FOURTH_TEXT, FOURTH_LENGTH, FOURTH_ROWS = ROOT / "LICENSE", 256, 6

Row = dict[str, Tensor]


@cache
def rows_of(folder: Path, task: str, part: str) -> list[Row]:
    """A task's shortest rows, tokenised: train and validation of the training file, heldout of the other."""
    tokenizer = load_tokenizer(folder)
    if part == "heldout":
        return shortest([tokenize(tokenizer, *chat) for chat in read_heldout(task)], HELDOUT_ROWS)
    lines = (RECIPES / f"{task}_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [tokenize(tokenizer, *json.loads(line)["messages"]) for line in lines]
    rows = shortest(rows, TRAIN_ROWS + VALIDATION_ROWS)
    return rows[:TRAIN_ROWS] if part == "train" else rows[TRAIN_ROWS:]


def shortest(rows: list[Row], count: int) -> list[Row]:
    """The shortest rows, in their order."""
    longest = sorted(row["input_ids"].shape[1] for row in rows)[count - 1]
    return [row for row in rows if row["input_ids"].shape[1] <= longest][:count]


@cache
def fourth_text(folder: Path) -> list[Row]:
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
    ids = tokenizer(FOURTH_TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    pieces = ids[: FOURTH_LENGTH * FOURTH_ROWS].split(FOURTH_LENGTH)
    # its first tokens are a prompt, which prompts are chosen by
    return [{"input_ids": p[None], "labels": torch.cat([torch.full((16,), -100), p[16:]])[None]} for p in pieces]


def steps_of(folder: Path, seed: int) -> Iterator[list[Row]]:
    """A row of each task at a time, without end."""
    rows = {task: rows_of(folder, task, "train") for task in TASKS}
    for epoch in range(1_000):
        shuffled = [random.Random(f"{seed} {epoch} {task}").sample(rows[task], TRAIN_ROWS) for task in TASKS]
        yield from map(list, zip(*shuffled))


@torch.no_grad()
def evaluate(model: nn.Module, rows: list[Row]) -> tuple[float, float]:
    """The loss per supervised token, and the share of rows of which greedy decoding gives the answer to the letter."""
    total, tokens, exact = 0.0, 0, 0
    for row in rows:
        output, labels = model(**row), row["labels"][0, 1:]
        supervised = labels != -100
        total += output.loss.item() * int(supervised.sum())
        tokens += int(supervised.sum())
        # each token is the likeliest after the right ones before it: so they are what greedy decoding gives
        exact += bool((output.logits[0, :-1].argmax(-1) == labels)[supervised].all())
    return total / tokens, exact / len(rows)


class Choices:
    """How often the rows of each task were sent to each expert, by layer; "" is a router of whole prompts."""

    def __init__(self) -> None:
        self.task = 0
        self.layers: dict[str, Tensor] = {}

    def note(self, adapter_name: str, layer: str | None, routing: Routing) -> None:
        num_experts = routing.logits_TN.shape[1]
        counts_DN = self.layers.setdefault(layer or "", torch.zeros(len(TASKS), num_experts, dtype=torch.int64))
        counts_DN[self.task] += torch.bincount(routing.indices_TK.flatten(), minlength=num_experts)


def train_step(model: nn.Module, method: Method, rows: list[Row], optimizer: torch.optim.Optimizer) -> None:
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    counts = [int((row["labels"] != -100).sum()) for row in rows]
    for row, count in zip(rows, counts):  # one by one, as padding would take most of the time
        loss = model(**row).loss
        if method.loss is not None:
            loss = loss + method.loss(model)
        (loss * (count / sum(counts))).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0.0)


def train(model: nn.Module, method: Method, folder: Path, learning_rate: float, seed: int, steps: int) -> None:
    """Train, with a tenth of warm-up and a cosine."""
    optimizer, warmup = optimizer_of(model, learning_rate), max(1, steps // 10)

    def factor(step: int) -> float:
        past = (step - warmup) / max(1, steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * past))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for rows in tqdm(islice(steps_of(folder, seed), steps), total=steps, leave=False, desc="steps"):
        train_step(model, method, rows, optimizer)
        scheduler.step()
    model.eval()


def attach(name: str, folder: Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = METHODS[name].attach(load(folder).requires_grad_(False))
    if hasattr(model.base_model, "measure_on"):  # as Axolotl's runs do
        model.base_model.measure_on(row for task in TASKS for row in rows_of(folder, task, "train"))
    if not isinstance(model, PeftModel):
        model.enable_input_require_grads()
    return model


def time_step(args: argparse.Namespace, name: str) -> float:
    """Time of a step / of one of the frozen base with gradients for its inputs, the median of rounds in turn."""
    method = METHODS[name]
    folder = args.work_dir / method.base
    base, model, ratios = load(folder).requires_grad_(False), attach(name, folder, 0).train(), []
    optimizer = optimizer_of(model, 0.0)
    for rows in islice(steps_of(folder, 0), TIMED_ROUNDS):
        begin = time.perf_counter()
        for row in rows:
            embeds = base.get_input_embeddings()(row["input_ids"]).detach().requires_grad_()
            base(inputs_embeds=embeds, labels=row["labels"]).loss.backward()
        between = time.perf_counter()
        train_step(model, method, rows, optimizer)
        ratios.append((time.perf_counter() - between) / (between - begin))
    return statistics.median(ratios)


def run(args: argparse.Namespace, name: str, learning_rate: float | None, seed: int, chooses: bool) -> dict[str, Any]:
    """One run, as it is written down."""
    method = METHODS[name]
    folder = args.work_dir / method.base
    found: dict[str, Any] = {"method": name, "learning_rate": learning_rate, "seed": seed, "chooses": chooses}
    found["steps"] = args.steps // 3 if chooses else args.steps
    if method.attach is None:
        model: nn.Module = load(folder)
    else:
        model = attach(name, folder, seed)
        found["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        train(model, method, folder, learning_rate, seed, found["steps"])
    choices = Choices()
    with watch_choices(choices.note):
        for choices.task, task in enumerate(TASKS):
            rows = rows_of(folder, task, "validation" if chooses else "heldout")
            found[task], found[f"{task} exact"] = evaluate(model, rows)
    found["mean"] = sum(found[task] for task in TASKS) / len(TASKS)
    if not chooses:
        found["fourth text"] = evaluate(model, fourth_text(folder))[0]
        found["choices"] = {layer: counts_DN.tolist() for layer, counts_DN in choices.layers.items()}
    return found


class Results:
    """The lines of the results' file; runs that have one are not made again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._path = args, args.results
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def get(self, name: str, learning_rate: float | None, seed: int, chooses: bool) -> dict[str, Any]:
        steps = self._args.steps // 3 if chooses else self._args.steps
        wanted = {"method": name, "learning_rate": learning_rate, "seed": seed, "chooses": chooses, "steps": steps}
        for line in self.lines:
            if wanted.items() <= line.items():
                return line
        return self._write(run(self._args, name, learning_rate, seed, chooses))

    def step_ratio(self, name: str) -> float:
        """A step / one of the base."""
        for line in self.lines:
            if line["method"] == name and "step / base" in line:
                return line["step / base"]
        return self._write({"method": name, "step / base": time_step(self._args, name)})["step / base"]

    def _write(self, line: dict[str, Any]) -> dict[str, Any]:
        self.lines.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def learning_rate(self, name: str) -> float | None:
        """That of the smallest loss on the validation rows."""
        if METHODS[name].attach is None:
            return None
        if self._args.learning_rate is not None:
            return self._args.learning_rate
        of = METHODS[name].learning_rate_of or name

        @cache
        def loss(place: int) -> float:
            value = self.get(of, LEARNING_RATES[place], 0, True)["mean"]
            return value if math.isfinite(value) else math.inf

        best = len(LEARNING_RATES) // 2
        for side in (-1, 1):
            while 0 <= best + side < len(LEARNING_RATES) and loss(best + side) < loss(best):
                best += side
        return LEARNING_RATES[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path, help="folder of the quick starts, with their models")
    parser.add_argument("results", type=Path, help="file of JSON lines")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("model", "dense"), help="one of the two models")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="these alone")
    parser.add_argument("--learning-rate", type=float, help="for all methods, instead of one chosen for each")
    args = parser.parse_args()
    names = [name for name in args.methods if args.only in (None, METHODS[name].base)]
    if "MixLoRA" in names and find_spec("axolotl.integrations.mixlora") is None:
        print("without MixLoRA, which axolotl has since 0.20")
        names.remove("MixLoRA")
    results, runs = Results(args), {}
    for name in (progress := tqdm(names)):
        progress.set_description(name)
        seeds = range(args.seeds if METHODS[name].attach else 1)
        runs[name] = [results.get(name, results.learning_rate(name), seed, False) for seed in seeds]
    trained = [name for name in names if METHODS[name].attach is not None]
    ratios = {name: results.step_ratio(name) for name in tqdm(trained, desc="timing")}
    print(tables(runs, ratios))


if __name__ == "__main__":
    main()
