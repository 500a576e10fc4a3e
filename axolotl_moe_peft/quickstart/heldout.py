"""The loss on held-out conversations, with plain transformers and PEFT."""

from __future__ import annotations

import json

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..shared.choices import watch_choices
from ..shared.routing import Routing
from .recipes import RECIPES

# in the order of the experts of tt_lora_moe.yaml
TASKS = ("gsm8k", "boolq", "openbookqa")


def read_heldout(task: str) -> list[list[dict[str, str]]]:
    """The held-out conversations of a task, each a question and its answer."""
    with (RECIPES / f"{task}_heldout.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, question: dict[str, str], answer: dict[str, str]
) -> dict[str, Tensor]:
    """Tokenise a conversation as Axolotl does: the answer and the end of its turn are supervised.

    Returns:
        input_ids and labels, int64 (1, S); -100 where a label is none.
    """
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(answer["content"] + tokenizer.eos_token, add_special_tokens=False).input_ids
    return {
        "input_ids": torch.tensor([prompt_ids + answer_ids]),
        "labels": torch.tensor([[-100] * len(prompt_ids) + answer_ids]),
    }


@torch.no_grad()
def evaluate(model: PreTrainedModel | PeftModel, rows: list[dict[str, Tensor]]) -> tuple[float, list[int]]:
    """Run the model on rows, one by one.

    Returns:
        The loss per supervised token, and the expert that a router of whole sequences chose for each row (of a mixture
        the one with the largest share; none without such a router).
    """
    total, tokens, chosen = 0.0, 0, []

    def note(adapter_name: str, layer: str | None, routing: Routing) -> None:
        if layer is None:
            chosen.extend(routing.indices_TK[:, 0].tolist())

    with watch_choices(note):
        for row in rows:
            supervised = (row["labels"] != -100).sum().item()
            total += model(**row).loss.item() * supervised
            tokens += supervised
    return total / tokens, chosen
