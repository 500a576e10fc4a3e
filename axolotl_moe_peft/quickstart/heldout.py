"""The loss on held-out conversations, with plain transformers and PEFT."""

from __future__ import annotations

import json

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tt_lora_moe import TTLoraMoeModel
from .recipes import RECIPES


def read_heldout(task: str) -> list[list[dict[str, str]]]:
    """The held-out conversations of a task, each a question and its answer."""
    with (RECIPES / f"{task}_heldout.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, question: dict[str, str], answer: dict[str, str]
) -> dict[str, Tensor]:
    """Tokenise a conversation as Axolotl does: the answer and the end of its turn are supervised."""
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(answer["content"] + tokenizer.eos_token, add_special_tokens=False).input_ids
    return {
        "input_ids": torch.tensor([prompt_ids + answer_ids]),
        "labels": torch.tensor([[-100] * len(prompt_ids) + answer_ids]),
    }


@torch.no_grad()
def evaluate(model: PreTrainedModel | PeftModel, rows: list[dict[str, Tensor]]) -> tuple[float, list[str]]:
    """Run the model on rows, one by one: the loss per supervised token, and of a pool the expert chosen for each."""
    total, tokens, chosen = 0.0, 0, []
    for row in rows:
        supervised = (row["labels"] != -100).sum().item()
        total += model(**row).loss.item() * supervised
        tokens += supervised
        chosen += chosen_experts(model)
    return total / tokens, chosen


def chosen_experts(model: PreTrainedModel | PeftModel) -> list[str]:
    """Names of the experts that a pool chose in its last call, one for each sequence; of other models none."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, TTLoraMoeModel):
        return []
    names = model.peft_config["default"].expert_names
    return [names[expert] for expert in model.base_model.chosen_experts["default"].tolist()]
