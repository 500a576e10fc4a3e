"""What a router needs of an Axolotl dataset: from the YAML to its rows, and from there to the batch.

That is `expert:`, which becomes a column of the rows, that every row has a prompt, and for a report of the routing the
name of the dataset that a row is from. The host's schema drops keys
that it does not know, and its dataset cache does not look at them. So what is wanted moves to `conversation`, a key
without use that the schema keeps and the cache's hash contains, and `type` becomes this module, which the host then
loads as a prompt strategy. The strategy leaves the rows to the type that was given, looks through them and adds the
columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..shared.batches import IGNORE_INDEX
from .rows import check_rows_have_prompts, drop_rows_without_prompt

COLUMN = "expert_labels"
DATASET_COLUMN = "dataset_name"


def tag_dataset(
    dataset: DictDefault,
    name: str,
    expert_names: list[str] | None,
    rows_without_prompt: str | None,
    name_of_rows: str | None = None,
) -> None:
    """Let the host load a dataset of the raw YAML through this module; see its description.

    Args:
        dataset: an entry of `datasets` or `test_datasets`; without `expert:` its rows get no label.
        name: which entry it is, for messages.
        expert_names: in the order of the router's logits; None where rows belong to no expert.
        rows_without_prompt: `raise` or `drop`; None where the router reads whole sequences.
        name_of_rows: what its rows are to be told by in a report; None without one.
    """
    expert = dataset.pop("expert", None)
    tag = {"name": name, "type": dataset.get("type"), "rows_without_prompt": rows_without_prompt}
    if expert_names is not None:
        tag["label"] = IGNORE_INDEX if expert is None else expert_names.index(expert)
        tag["expert"] = expert
    if name_of_rows is not None:
        tag["dataset"] = name_of_rows
    dataset["conversation"] = json.dumps(tag, sort_keys=True)
    dataset["type"] = __name__


def load(
    tokenizer: PreTrainedTokenizerBase, cfg: DictDefault, ds_cfg: DictDefault, processor: Any = None
) -> DatasetWrappingStrategy:
    """The strategy of a tagged dataset, under the name that the host looks for."""
    return _ForRouter(tokenizer, cfg, ds_cfg, processor)


class _ForRouter(DatasetWrappingStrategy):
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, cfg: DictDefault, ds_cfg: DictDefault, processor: Any
    ) -> None:
        self.tag = json.loads(ds_cfg["conversation"])
        given = {**ds_cfg, "type": self.tag["type"], "conversation": None}
        # through the schema, for the defaults that depend on the type
        self.dataset_config = DictDefault(SFTDataset(**given).model_dump(exclude_none=True))
        self.arguments = {"tokenizer": tokenizer, "cfg": cfg, "processor": processor}

    def wrap_dataset(self, dataset: Dataset | IterableDataset, **kwargs: Any) -> Dataset | IterableDataset:
        base_type, _, prompt_style = str(self.dataset_config.type).partition(":")
        rows, _ = get_dataset_wrapper(
            dataset_config=self.dataset_config,
            dataset_base_type=base_type,
            dataset=dataset,
            dataset_prompt_style=prompt_style or None,
            **self.arguments,
        )
        if self.tag["rows_without_prompt"] == "drop":
            rows = drop_rows_without_prompt(self.tag["name"], rows)
        elif self.tag["rows_without_prompt"]:
            check_rows_have_prompts(self.tag["name"], rows, self.arguments["tokenizer"])
        columns: dict[str, Any] = {}
        if "label" in self.tag:
            columns[COLUMN] = [self.tag["label"]]
        if "dataset" in self.tag:
            columns[DATASET_COLUMN] = self.tag["dataset"]
        return rows.map(lambda row: columns) if columns else rows


class NamelessCollator:
    """Collates rows with the host's collator, without the names of their datasets, of which no model knows.

    Args:
        collator: the host's, packing or not.
    """

    def __init__(self, collator: Callable[..., Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, features: list[Any], **kwargs: Any) -> Mapping[str, Any]:
        """Collate rows (dicts), or lists of rows that are to be packed together."""
        return self.collator([_without_name(feature) for feature in features], **kwargs)


def _without_name(feature: Any) -> Any:
    if isinstance(feature, list):
        return [_without_name(row) for row in feature]
    return {key: value for key, value in feature.items() if key != DATASET_COLUMN}


class ExpertLabelCollator:
    """Collates rows with the host's collator, and their expert labels into `expert_labels` (B, S), -100 for padding.

    Args:
        collator: the host's, packing or not.
        padding_side: the tokenizer's.
    """

    def __init__(self, collator: Callable[..., Mapping[str, Any]], padding_side: str) -> None:
        self.collator = collator
        self.padding_side = padding_side

    def __call__(self, features: list[Any], **kwargs: Any) -> Mapping[str, Any]:
        """Collate rows (dicts), or lists of rows that are to be packed together.

        Raises:
            ValueError: a row has no label.
        """
        packed = isinstance(features[0], list)
        rows = [[_split(item) for item in row] for row in (features if packed else [[item] for item in features])]
        without_labels = [[item for item, _ in row] if packed else row[0][0] for row in rows]
        batch = self.collator(without_labels, **kwargs)
        if len(batch["input_ids"]) != len(rows):  # single rows that this collator packs into one
            rows = [[item for row in rows for item in row]]
        labels_BS = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for row, labels_S in zip(rows, labels_BS):
            labels = torch.cat([torch.full((len(item["input_ids"]),), label) for item, label in row])
            if self.padding_side == "left":
                labels_S[len(labels_S) - len(labels) :] = labels
            else:
                labels_S[: len(labels)] = labels
        batch[COLUMN] = labels_BS
        return batch


def _split(item: dict[str, Any]) -> tuple[dict[str, Any], int]:
    if COLUMN not in item:
        raise ValueError(
            f"a row has no {COLUMN}: `expert:` cannot be put into a dataset that was tokenised beforehand. Give it a "
            f"column {COLUMN} with a list of one number, the index of its expert in tt_lora_moe.experts."
        )
    return {key: value for key, value in item.items() if key != COLUMN}, item[COLUMN][0]
