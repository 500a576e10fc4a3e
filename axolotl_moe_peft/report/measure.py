"""One pass over rows of known datasets that counts what the routers of a model choose: what routing.json holds.

Shape suffixes: B rows, S their length, D datasets, N experts, K experts per choice.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from ..perft.base_choices import BaseRouters
from ..perft.block import layer_index
from ..shared.batches import IGNORE_INDEX
from ..shared.choice_counts import TokenCounts, TokensOfBatch, divergence, rounded, typical_words
from ..shared.choices import watch_choices
from ..shared.routing import Routing
from ..shared.statistics import usage_figures

VERSION = 1  # of the schema, which the package's README describes
_WORDS = 2000  # the most frequent tokens are looked at one by one
_TYPICAL_TOKENS, _TYPICAL_PROMPTS, _TEXT = 8, 5, 200
CONFIDENCE_BINS = 10


@dataclass(frozen=True)
class Row:
    """A tokenised text.

    Attributes:
        input_ids, labels: of the same length; labels are -100 where there is nothing to predict.
        dataset: number of the dataset that it is from.
        expert: index of its right expert, if that is known; else -100.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    dataset: int
    expert: int = IGNORE_INDEX


@dataclass(frozen=True)
class Processes:
    """The processes of a run, which share the rows; by default there is one.

    Attributes:
        index, count: of this one, and how many there are.
        total: sums a tensor over them.
        collect: joins their lists.
    """

    index: int = 0
    count: int = 1
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor
    collect: Callable[[list], list] = lambda items: items


@dataclass(frozen=True)
class Decision:
    """What a router of whole sequences made of one row: each expert's probability, and the chosen ones."""

    row: int
    probabilities: list[float]
    experts: list[int]


def measure(
    model: PeftModel,
    rows: Sequence[Row],
    datasets: Sequence[str],
    decode: Callable[[list[int]], str],
    *,
    tokens_per_batch: int,
    call: Callable[..., Any] | None = None,
    device: torch.device | None = None,
    processes: Processes = Processes(),
) -> dict[str, Any]:
    """Run rows through a model and count what its routers choose, the adapter's and the base's.

    Args:
        model: with an adapter of this package active; it is put into evaluation mode and back.
        rows: the same in every process, each of which runs its share.
        datasets: their names, by number.
        decode: token ids to text.
        tokens_per_batch: how many tokens a batch may have, padding included; a longer row is a batch of its own.
        call: what to call with a batch; None: the model.
        device: of the batches; None: the model's.
        processes: those of the run, each of which must call.

    Returns:
        What routing.json has under `datasets`, `routers` and `hidden`, the same in every process.

    Raises:
        ValueError: there are no rows, or no routers.
    """
    if not rows:
        raise ValueError("there are no rows to measure the routers on.")
    counting = _Counting(model, rows, len(datasets))
    shares = _batches(rows, tokens_per_batch)
    eagerly = torch.compiler.set_stance("force_eager")
    with _evaluating(model), torch.no_grad(), eagerly, counting.watch():
        # as many calls in every process: where the model is sharded each needs the others
        for step in range(-(-len(shares) // processes.count)):
            at = step * processes.count + processes.index
            counting.run(
                model if call is None else call,
                shares[min(at, len(shares) - 1)],
                at < len(shares),
                device or model.device,
            )
    numbers = [row.dataset for row in rows]
    lengths = [sum(len(row.input_ids) for row in rows if row.dataset == i) for i in range(len(datasets))]
    return {
        "datasets": [
            {"name": name, "rows": numbers.count(i), "tokens": lengths[i]} for i, name in enumerate(datasets)
        ],
        "routers": counting.routers(decode, processes),
        "hidden": sorted(counting.hidden),
    }


class _Counting:
    """The counts of one pass.

    Attributes:
        hidden: names of the base's MoE blocks whose choices cannot be seen.
    """

    def __init__(self, model: PeftModel, rows: Sequence[Row], num_datasets: int) -> None:
        self.adapter = model.active_adapter
        self.config = model.peft_config[self.adapter]
        self.base = BaseRouters(model.get_base_model())
        self.rows, self.num_datasets = rows, num_datasets
        self.hidden: set[str] = set()
        self._counts: dict[str, dict[str, TokenCounts]] = {"adapter": {}, "base": {}}
        self._decisions: list[Decision] = []
        frequent = Counter(token for row in rows for token in row.input_ids).most_common(_WORDS)
        self._words = [token for token, _ in frequent]
        self._places = torch.full((max(token for token, _ in frequent) + 1,), -1)
        self._places[self._words] = torch.arange(len(self._words))

    @contextmanager
    def watch(self) -> Iterator[None]:
        with self.base.watch(), watch_choices(self._note):
            yield

    def run(self, call: Callable[..., Any], numbers: list[int], counted: bool, device: torch.device) -> None:
        """Call the model with the rows of these numbers, and add what its routers choose unless it is for others."""
        self._numbers = numbers if counted else []
        rows = [self.rows[i] for i in numbers]
        input_ids_BS, labels_BS, mask_BS = _collate(rows)
        datasets_BS = torch.tensor([row.dataset if counted else -1 for row in rows]).unsqueeze(1).expand_as(mask_BS)
        datasets_BS = torch.where(mask_BS, datasets_BS, -1).to(device)
        words_BS = torch.where(datasets_BS < 0, -1, self._places.to(device)[input_ids_BS.to(device)])
        self._tokens = TokensOfBatch(datasets_BS.flatten(), words_BS.flatten())
        before = (self.config.positions_before_text, 0)
        self._with_prompt = TokensOfBatch(*(F.pad(x, before, value=-1).flatten() for x in (datasets_BS, words_BS)))
        call(input_ids=input_ids_BS.to(device), attention_mask=mask_BS.long().to(device), labels=labels_BS.to(device))
        for block, choices in self.base.read().items():
            tokens = None if choices is None else self._tokens_of(len(choices.indices_TK))
            if tokens is None:
                self.hidden.add(block)
            else:
                counts = self._of("base", block)
                counts.add(tokens, choices.indices_TK, choices.num_experts, choices.chosen_TK)

    def _tokens_of(self, count: int) -> TokensOfBatch | None:
        """The tokens that a block sees, by their number; None if it does not see all."""
        return next((t for t in (self._tokens, self._with_prompt) if len(t.datasets_T) == count), None)

    def _of(self, whose: str, layer: str) -> TokenCounts:
        new = TokenCounts(self.num_datasets, len(self._words))
        return self._counts[whose].setdefault(layer, new)

    def _note(self, adapter_name: str, layer: str | None, routing: Routing) -> None:
        if adapter_name != self.adapter:
            return
        if layer is not None:
            num_experts = routing.logits_TN.shape[1]
            self._of("adapter", layer).add(self._tokens, routing.indices_TK, num_experts)
            return
        probabilities = routing.logits_TN.float().softmax(-1).tolist()
        self._decisions += [Decision(*row) for row in zip(self._numbers, probabilities, routing.indices_TK.tolist())]

    def routers(self, decode: Callable[[list[int]], str], processes: Processes) -> list[dict[str, Any]]:
        """What routing.json has under `routers`."""
        decisions = sorted(processes.collect(self._decisions), key=lambda decision: decision.row)
        found = [self._router_of_prompts(decisions, decode)] if decisions else []
        for whose, layers in self._counts.items():
            if layers:
                typical = whose == "adapter" or not found
                found.append(self._router_of_tokens(whose, layers, decode if typical else None, processes))
        if not found:
            raise ValueError("neither the adapter nor the base model has a router whose choices can be seen.")
        return found

    def _router_of_tokens(
        self,
        whose: str,
        layers: dict[str, TokenCounts],
        decode: Callable[[list[int]], str] | None,
        processes: Processes,
    ) -> dict[str, Any]:
        described = []
        for block, counts in layers.items():
            layer = describe_layer(layer_index(block), block, processes.total(counts.by_dataset_DN).cpu())
            by_word_VN = processes.total(counts.by_word_VN).cpu()
            if decode is not None:
                layer["typical_tokens"] = [
                    [
                        {"token": decode([self._words[place]]), "count": count, "share": round(share, 6)}
                        for place, count, share in typical_words(by_word_VN, expert, _TYPICAL_TOKENS)
                    ]
                    for expert in range(by_word_VN.shape[1])
                ]
            described.append(layer)
        most = max(len(layer["choices"][0]) for layer in described)
        return {
            "of": whose,
            "unit": "token",
            "experts": [str(i) for i in range(most)],
            "experts_per_choice": max(counts.num_active for counts in layers.values()),
            "layers": described,
        }

    def _router_of_prompts(self, decisions: list[Decision], decode: Callable[[list[int]], str]) -> dict[str, Any]:
        num_experts = len(decisions[0].probabilities)
        names = getattr(self.config, "expert_names", [str(i) for i in range(num_experts)])
        choices_DN = torch.zeros(self.num_datasets, num_experts, dtype=torch.int64)
        probabilities_DN = torch.zeros(self.num_datasets, num_experts, dtype=torch.float64)
        confidence = torch.zeros(self.num_datasets, CONFIDENCE_BINS, dtype=torch.int64)
        confusion_NN = torch.zeros(num_experts, num_experts, dtype=torch.int64)
        for decision in decisions:
            row = self.rows[decision.row]
            choices_DN[row.dataset, decision.experts] += 1
            probabilities_DN[row.dataset] += torch.tensor(decision.probabilities)
            confidence[row.dataset, min(int(max(decision.probabilities) * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)] += 1
            if row.expert >= 0:
                confusion_NN[row.expert, decision.experts[0]] += 1
        rows_D1 = choices_DN.sum(1, keepdim=True).clamp(min=1) / len(decisions[0].experts)
        return {
            "of": "adapter",
            "unit": "prompt",
            "experts": list(names),
            "experts_per_choice": len(decisions[0].experts),
            "layers": [describe_layer(None, None, choices_DN)],
            "probabilities": rounded((probabilities_DN / rows_D1).tolist()),
            "confidence": confidence.tolist(),
            "confusion": confusion_NN.tolist() if confusion_NN.any() else None,
            "typical_prompts": [self._typical_prompts(expert, decisions, decode) for expert in range(num_experts)],
        }

    @functools.cached_property
    def _beginning(self) -> int:
        """How many tokens all prompts begin with, such as those of a system message; 0 if one has no more."""
        prompts = [_prompt(row) for row in self.rows]
        common = len(os.path.commonprefix(prompts))
        return common if common < min(map(len, prompts)) else 0

    def _typical_prompts(
        self, expert: int, decisions: list[Decision], decode: Callable[[list[int]], str]
    ) -> list[dict[str, Any]]:
        sent = [decision for decision in decisions if decision.experts[0] == expert]
        sent.sort(key=lambda decision: -round(decision.probabilities[expert], 6))
        return [
            {
                "dataset": self.rows[decision.row].dataset,
                "probability": round(decision.probabilities[expert], 6),
                "text": decode(_prompt(self.rows[decision.row])[self._beginning :])[:_TEXT],
            }
            for decision in sent[:_TYPICAL_PROMPTS]
        ]


def describe_layer(index: int | None, block: str | None, choices_DN: Tensor) -> dict[str, Any]:
    """What routing.json has of one layer: the choices, and the figures of the log, of all datasets together."""
    figures = usage_figures(choices_DN.sum(0, keepdim=True).float())
    return {
        "layer": index,
        "block": block,
        "choices": choices_DN.tolist(),
        **{name.removeprefix("expert_"): round(value, 6) for name, value in figures.items()},
        "divergence": round(divergence(choices_DN), 6),
    }


def _prompt(row: Row) -> list[int]:
    supervised = next((i for i, label in enumerate(row.labels) if label != IGNORE_INDEX), len(row.labels))
    return list(row.input_ids[: supervised or None])


def _batches(rows: Sequence[Row], tokens_per_batch: int) -> list[list[int]]:
    """Numbers of the rows by batches, long ones first and those of like lengths together."""
    batches: list[list[int]] = []
    longest = 0
    for number in sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids)):
        if not batches or (len(batches[-1]) + 1) * longest > tokens_per_batch:
            batches.append([])
            longest = len(rows[number].input_ids)
        batches[-1].append(number)
    return batches


def _collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and the mask of real tokens, (B, S), padded at the end."""
    length = max(len(row.input_ids) for row in rows)
    input_ids_BS, labels_BS = torch.zeros(len(rows), length).long(), torch.full((len(rows), length), IGNORE_INDEX)
    mask_BS = torch.zeros(len(rows), length).bool()
    for i, row in enumerate(rows):
        end = len(row.input_ids)
        input_ids_BS[i, :end], labels_BS[i, :end] = torch.tensor(row.input_ids), torch.tensor(row.labels)
        mask_BS[i, :end] = True
    return input_ids_BS, labels_BS, mask_BS


@contextmanager
def _evaluating(model: PeftModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
