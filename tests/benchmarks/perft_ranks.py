"""PERFT-E whose ranks move, beside one of a uniform rank of the same sum, on the quick start's MoE.

    python -m tests.benchmarks.perft_ranks MODEL RESULTS [SEEDS]

MODEL is the folder of the quick start's MoE. Each run is a line of JSON in RESULTS: the loss per supervised token of
the held-out rows of GSM8K afterwards, and the ranks of the experts at the end, from least to most in a block. A
run that has a line is not made again; at the end it prints their table.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer
from axolotl_moe_peft.perft.rank_allocation import active_slots
from axolotl_moe_peft.quickstart.heldout import evaluate, read_heldout, tokenize
from axolotl_moe_peft.quickstart.recipes import RECIPES

STEPS, ROWS, RANK, LEARNING_RATE = 32, 1, 4, 1e-3
PLAN = {"max_rank": 8, "warmup_steps": 6, "every_steps": 6, "decay": 0.9}
CASES: dict[str, dict[str, Any] | None] = {
    "uniform": None,
    "gate": {"score": "gate", **PLAN},
    "saliency": {"score": "saliency", **PLAN},
}


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows padded on the right."""
    ids = [row["input_ids"][0] for row in rows]
    return {
        "input_ids": pad_sequence(ids, True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
        "labels": pad_sequence([row["labels"][0] for row in rows], True, padding_value=-100),
    }


def train(model: PeftModel, rows: list[dict[str, Tensor]], seed: int, moves: bool) -> None:
    """A training loop of one's own."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.0)
    allocation = model.base_model.rank_allocation() if moves else None
    order = [row for epoch in range(3) for row in random.Random(10 * seed + epoch).sample(rows, len(rows))]
    model.train()
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch_of(order[step * ROWS : (step + 1) * ROWS])).loss
        loss.backward()
        if allocation is not None:
            allocation.note_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if allocation is not None:
            allocation.step(step + 1, optimizer)
        print(f"  step {step + 1}: {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


def heldout(model: PeftModel, rows: list[dict[str, Tensor]]) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        return evaluate(model, rows)[0]


def run(folder: str, case: str, seed: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    read = [json.loads(line)["messages"] for line in (RECIPES / "gsm8k_train.jsonl").read_text().splitlines()]
    rows = [tokenize(tokenizer, *messages) for messages in read]
    test = [tokenize(tokenizer, *messages) for messages in read_heldout("gsm8k")]
    torch.manual_seed(seed)
    config = PerftConfig(
        variant="embedded", rank=RANK, alpha=2 * RANK, rank_allocation=CASES[case], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).eval()
    begin = time.perf_counter()
    train(model, rows, seed, CASES[case] is not None)
    seconds = time.perf_counter() - begin
    layers = [module for module in model.modules() if isinstance(module, PerftLayer)]
    ranks = [active_slots(layer.perft_down["default"].detach()).sum(-1).sort().values for layer in layers]
    return {
        "case": case,
        "seed": seed,
        "after": heldout(model, test),
        "mean ranks": torch.stack(ranks).float().mean(0).tolist(),
        "sum": int(torch.stack(ranks).sum()),
        "seconds": seconds,
    }


def main(folder: str, results: str, seeds: str = "3") -> None:
    path = Path(results)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in range(int(seeds)):
        for case in CASES:
            if not any((line["case"], line["seed"]) == (case, seed) for line in done):
                print(f"{case}, seed {seed}", file=sys.stderr, flush=True)
                done.append(run(folder, case, seed))
                with path.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    print("| ranks | " + " | ".join(f"seed {seed}" for seed in range(int(seeds))) + " | mean | ranks at the end |")
    for case in CASES:
        lines = sorted((line for line in done if line["case"] == case), key=lambda line: line["seed"])
        losses = [line["after"] for line in lines]
        ranks = [sum(column) / len(lines) for column in zip(*(line["mean ranks"] for line in lines))]
        cells = [*(f"{loss:.4f}" for loss in losses), f"{sum(losses) / len(losses):.4f}"]
        print(f"| {case} | {' | '.join(cells)} | {', '.join(f'{rank:.1f}' for rank in ranks)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
