"""The page of the results that `quality.py` wrote: quality.md's tables and quality.svg.

    python -m tests.benchmarks.quality_page [RESULTS]

With RESULTS, another file of lines, the tables are printed only.

Shape suffixes: D datasets (the tasks), N experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from axolotl_moe_peft.quickstart.heldout import TASKS
from axolotl_moe_peft.shared.choice_counts import divergence
from tests.benchmarks.quality_methods import METHODS

HERE = Path(__file__).parent
RESULTS, PAGE, FIGURE = HERE / "quality.jsonl", HERE / "quality.md", HERE / "quality.svg"
BEGIN, END = "<!-- tables: written by python -m tests.benchmarks.quality_page -->", "<!-- tables end -->"
EXACT = ("boolq", "openbookqa")  # whose answers are a few words
BASES = {"model": "on the MoE", "dense": "on the dense model"}

Line = dict[str, Any]


def read(path: Path) -> tuple[dict[str, list[Line]], dict[str, float]]:
    """The runs of each method, in the methods' order, and how long their steps take.

    Raises:
        ValueError: a method's runs have several learning rates or numbers of steps, or two lines have a seed or the
            time of its steps.
    """
    lines: list[Line] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ratios: dict[str, float] = {}
    for line in lines:
        if "step / base" in line:
            if line["method"] in ratios:
                raise ValueError(f"{path}: two lines say how long a step of {line['method']} takes; one is wanted")
            ratios[line["method"]] = line["step / base"]
    found = {}
    for name in METHODS:
        runs = [line for line in lines if line["method"] == name and line.get("chooses") is False]
        if len({(run["learning_rate"], run["steps"]) for run in runs}) > 1:
            raise ValueError(
                f"{path}: runs of {name} have several learning rates or numbers of steps; one file for each"
            )
        seeds = [run["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{path}: runs of {name} have the seeds {sorted(seeds)}; one line for each")
        if runs:
            found[name] = sorted(runs, key=lambda run: run["seed"])
    return found, ratios


def mutual_information(counts_DN: Tensor) -> float:
    """Of task and expert, by the mean of their entropies: 0, the expert says nothing of the task, to 1."""
    share_DN = counts_DN.double() / counts_DN.sum()
    of_tasks, of_experts = (torch.special.entr(share_DN.sum(axis)).sum() for axis in (1, 0))
    both = torch.special.entr(share_DN).sum()
    return ((of_tasks + of_experts - both) / ((of_tasks + of_experts) / 2)).item()


def spread(values: list[float], digits: int = 3) -> str:
    """Mean (minimum to maximum)."""
    mean, least, most = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def table(what: str, by_method: dict[str, list[Line]], step_ratios: dict[str, float]) -> str:
    heads = [what, "parameters", "learning rate", "seeds", "loss, mean of tasks", *TASKS]
    heads += [*(f"{task} exact" for task in EXACT), "fourth text", "step / base"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, runs in by_method.items():
        cells = [name, f"{runs[0].get('parameters', 0):,}", str(runs[0]["learning_rate"] or "")]
        cells += [str(len(runs)) if METHODS[name].attach else ""]
        cells += [spread([r[key] for r in runs]) for key in ("mean", *TASKS)]
        cells += [spread([r[f"{task} exact"] for r in runs], 2) for task in EXACT]
        cells += [spread([r["fourth text"] for r in runs])]
        cells += [f"{step_ratios[name]:.2f}" if name in step_ratios else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def routing_table(by_method: dict[str, list[Line]]) -> str:
    """Of every method with routers: how far they tell the tasks apart, and the least used expert."""
    lines = [
        "| method | expert and task | the same, layer by layer | smallest share | layers with an idle expert |",
        "|---|---|---|---|---|",
    ]
    for name, runs in by_method.items():
        of_runs = [[torch.tensor(counts) for counts in r["choices"].values()] for r in runs if r["choices"]]
        if not of_runs:
            continue
        measure = mutual_information if "" in runs[0]["choices"] else divergence
        told = [[100 * measure(counts_DN) for counts_DN in layers] for layers in of_runs]
        smallest = [[(c.sum(0) / c.sum()).min().item() for c in layers] for layers in of_runs]
        idle = [sum(share == 0 for share in shares) / len(shares) for shares in smallest]
        by_layer = [statistics.mean(values) for values in zip(*told)]
        cells = [name, spread([statistics.mean(values) for values in told], 1)]
        cells += [" ".join(f"{value:.0f}" for value in by_layer) if len(by_layer) > 1 else ""]
        cells += [spread([min(shares) for shares in smallest]), spread(idle, 2)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(by_method: dict[str, list[Line]], step_ratios: dict[str, float]) -> str:
    """What was learnt on each base, and what the routers did with the held-out rows, in Markdown."""
    parts = []
    for base, text in BASES.items():
        runs = {name: lines for name, lines in by_method.items() if METHODS[name].base == base}
        if runs:
            parts.append(table(text, runs, step_ratios))
    return "\n\n".join([*parts, routing_table(by_method)])


def draw(by_method: dict[str, list[Line]]) -> Figure:
    """The mean held-out loss of every run, a panel for each base, the lowest on top."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for (base, text), axes in zip(BASES.items(), figure.subplots(1, len(BASES))):
        losses = {name: [run["mean"] for run in by_method[name]] for name in by_method if METHODS[name].base == base}
        frozen = [losses.pop(name)[0] for name in list(losses) if METHODS[name].attach is None]
        draw_panel(axes, losses)
        axes.set_title(text + "".join(f"; frozen {loss:.2f}" for loss in frozen))
    return figure


def draw_panel(axes: Axes, losses: dict[str, list[float]]) -> None:
    names = sorted(losses, key=lambda name: statistics.mean(losses[name]))
    for place, name in enumerate(names):
        values = losses[name]
        axes.plot(values, [place] * len(values), "o", color="0.45", markersize=5, markerfacecolor="white")
        axes.plot(statistics.mean(values), place, "|", color="black", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel("held-out loss, mean of the tasks")


def page_tables() -> str:
    """The tables as the page has them."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="print the tables of this file")
    args = parser.parse_args()
    runs, ratios = read(args.results or RESULTS)
    print(tables(runs, ratios))
    if args.results is None:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        text = f"{head}{BEGIN}\n\n{tables(runs, ratios)}\n\n{END}{rest.partition(END)[2]}"
        PAGE.write_text(text, encoding="utf-8")
        # text as text, and nothing of this moment or machine
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "quality"}):
            draw(runs).savefig(FIGURE, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
