"""The paper's own setting on a small scale: TT-LoRA classifiers of two sets, and a router that picks one for each row.

    python -m tests.benchmarks.tt_lora_moe_classifiers MODEL RTE_TRAIN RTE_TEST BOOLQ_TRAIN BOOLQ_TEST [SECONDS]

MODEL is a folder, such as the dense model of a quick start; the sets are files of JSON lines. SECONDS bound the
training of each classifier (and half of it the router's). Prints the accuracy of each classifier on its own test rows,
that of the pool on all, and how many rows it sends to the right classifier.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from axolotl_moe_peft import TTLoraConfig, TTLoraMoeConfig

BATCH, MAX_LENGTH, TEST_ROWS = 8, 96, 96
Row = tuple[str, int]


def read(path: str, seed: int) -> list[Row]:
    rows = []
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        if "sentence1" in row:
            rows.append((f"{row['sentence1']}\nFollows: {row['sentence2']}", row["label"]))
        else:
            question = row["instruction"].partition("question: ")[2].partition("\n")[0]
            rows.append((question, int(row["answer"] == "true")))
    random.Random(seed).shuffle(rows)
    return rows


def tokenised(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> dict[str, torch.Tensor]:
    texts = [text for text, _ in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    return {**batch, "labels": torch.tensor([label for _, label in rows])}


def train(model: peft.PeftModel, batches, seconds: float, lr: float) -> int:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    begin, steps = time.perf_counter(), 0
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        steps += 1
        if time.perf_counter() - begin > seconds:
            break
    model.eval()
    return steps


@torch.no_grad()
def right(model: peft.PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> tuple[int, list[int]]:
    """How many rows are answered right, and the experts that a pool chose."""
    hits, experts = 0, []
    for i in range(0, len(rows), BATCH):
        batch = tokenised(tokenizer, rows[i : i + BATCH])
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        hits += int((logits.argmax(-1) == batch["labels"]).sum())
        if isinstance(model.peft_config["default"], TTLoraMoeConfig):
            experts += model.base_model.chosen_experts["default"].tolist()
    return hits, experts


def main(model_dir: str, *arguments: str) -> None:
    files, seconds = arguments[:4], float(arguments[4]) if len(arguments) > 4 else 900.0
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    train_sets = [read(files[i], 0) for i in (0, 2)]
    test_sets = [read(files[i], 1)[:TEST_ROWS] for i in (1, 3)]
    folder, alone = Path(tempfile.mkdtemp()), []
    for name, rows, test in zip(("rte", "boolq"), train_sets, test_sets):
        model = peft.get_peft_model(base(), TTLoraConfig(task_type="SEQ_CLS"))
        batches = (tokenised(tokenizer, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH))
        steps = train(model, batches, seconds, lr=5e-3)
        model.save_pretrained(folder / name)
        alone.append(right(model, tokenizer, test)[0])
        most = max(sum(label for _, label in test), sum(1 - label for _, label in test))
        print(f"{name}: {steps} steps, {alone[-1]} of {len(test)} right (the larger class: {most})", flush=True)
    entries = [{"name": name, "path": str(folder / name)} for name in ("rte", "boolq")]
    pool = peft.get_peft_model(base(), TTLoraMoeConfig(experts=entries, task_type="SEQ_CLS"))
    mixed = [(row, e) for e, rows in enumerate(train_sets) for row in rows[:400]]
    random.Random(2).shuffle(mixed)
    parts = [mixed[i : i + BATCH] for i in range(0, len(mixed), BATCH)]
    batches = (
        tokenised(tokenizer, [row for row, _ in part]) | {"expert_labels": torch.tensor([e for _, e in part])}
        for part in parts
    )
    steps = train(pool, batches, seconds / 2, lr=1e-3)
    print(f"router: {steps} steps")
    for e, (name, test) in enumerate(zip(("rte", "boolq"), test_sets)):
        hits, experts = right(pool, tokenizer, test)
        print(f"pool on {name}: {experts.count(e)} of {len(test)} to its classifier, {hits} right (alone {alone[e]})")


if __name__ == "__main__":
    main(*sys.argv[1:])
