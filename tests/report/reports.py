"""Made-up reports of any size."""

from __future__ import annotations

import math
from typing import Any

import torch

from axolotl_moe_peft.report.measure import CONFIDENCE_BINS, VERSION, describe_layer

TOKENS = [{"token": " the", "count": 9, "share": 0.4}, {"token": "\n<b>", "count": 5, "share": 0.9}]


def router_of_tokens(of: str, layers: int, experts: int, datasets: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    described = []
    for i in range(layers):
        choices_DN = (torch.randn(datasets, experts, generator=generator).exp() * 200).long()
        layer = describe_layer(i, f"model.layers.{i}.mlp", choices_DN)
        described.append(layer | {"typical_tokens": [TOKENS] * experts})
    names = [str(i) for i in range(experts)]
    return {"of": of, "unit": "token", "experts": names, "experts_per_choice": 2, "layers": described}


def router_of_prompts(datasets: int, names: list[str]) -> dict[str, Any]:
    count = len(names)
    choices_DN = torch.randint(1, 40, (datasets, count), generator=torch.Generator().manual_seed(0))
    prompts = [{"dataset": 0, "probability": 0.98, "text": "What is <b>this</b> & that? " * 7}]
    return {
        "of": "adapter",
        "unit": "prompt",
        "experts": names,
        "experts_per_choice": 1,
        "layers": [describe_layer(None, None, choices_DN)],
        "probabilities": [[1 / count] * count] * datasets,
        "confidence": [list(range(CONFIDENCE_BINS))] * datasets,
        "confusion": [[30 if i == j else 2 for j in range(count)] for i in range(count)],
        "typical_prompts": [prompts] * count,
    }


def report(routers: list[dict[str, Any]], datasets: int) -> dict[str, Any]:
    keys = ("expert_entropy", "expert_max_share", "expert_used_fraction")
    return {
        "version": VERSION,
        "method": "perft",
        "adapter": "PERFT (routed, experts: 8, rank: 16)",
        "base_model": "allenai/OLMoE-1B-7B-0924",
        "folder": "./outputs/<i>olmoe</i>",
        "step": 1200,
        "datasets": [
            {"name": f"data/a_task_with_a_long_name_{i}.jsonl", "rows": 100 + i, "tokens": 12345 * (i + 1)}
            for i in range(datasets)
        ],
        "routers": routers,
        "hidden": [],
        "history": {k: [(s, 0.5 + 0.4 * math.sin(s / 9 + i)) for s in range(100)] for i, k in enumerate(keys)},
    }


REPORTS = {
    "48 layers of 64 experts": lambda: report(
        [router_of_tokens("adapter", 48, 8, 2), router_of_tokens("base", 48, 64, 2, seed=1)], 2
    ),
    "one layer of 3 experts": lambda: report([router_of_tokens("base", 1, 3, 1)], 1),
    "prompts": lambda: report(
        [
            router_of_prompts(3, ["gsm8k", "boolq", "an expert with a long name"]),
            router_of_tokens("base", 16, 16, 3),
        ],
        3,
    ),
}
FIGURES = {
    "48 layers of 64 experts": ["usage", "datasets-adapter", "datasets-base", "divergence", "training"],
    "one layer of 3 experts": ["usage", "training"],
    "prompts": ["prompts", "confusion", "confidence", "usage", "datasets-base", "divergence", "training"],
}
