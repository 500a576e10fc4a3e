"""The datasets of a YAML: `expert:`, the label of a router, and prompts for a router to read.

Checked before validation, since Axolotl's schema drops what it does not know of them before any other check.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.config import AxolotlInputConfig
from peft import PeftConfig

from .args import CONFIGS, config_of
from .report_key import wants_report
from .rows import KEY as ROWS_WITHOUT_PROMPT
from .spelling import check_spelling

LOG = get_logger(__name__)


def prepare_datasets(cfg: dict[str, Any]) -> None:
    """Check the datasets of a run with an adapter of this package, and have its router's wishes reach their rows.

    Args:
        cfg: the raw YAML.

    Raises:
        ValueError: a key is misspelt, the name of an expert is missing, unknown or without meaning, or the rows have
            no prompts.
    """
    datasets, test_datasets = _entries(cfg, "datasets"), _entries(cfg, "test_datasets")
    adapter = cfg["adapter"]
    check_spelling({key: cfg[key] for key in ("datasets", "test_datasets") if cfg.get(key)}, [AxolotlInputConfig])
    if not CONFIGS[adapter].needs_expert_labels:
        for what, dataset in datasets + test_datasets:
            if dataset.get("expert") is not None:
                raise ValueError(f"{what}.expert means nothing with `adapter: {adapter}`; remove it.")
    _check_rows_for_rewards(cfg, datasets + test_datasets)
    try:
        config = config_of(adapter, cfg.get(adapter))
    except ValueError:
        return  # which validation tells
    if config.needs_expert_labels:
        _check_experts(datasets, test_datasets, config)
    if config.reads_prompts:
        _check_prompts(adapter, cfg, datasets + test_datasets)
    if cfg.get("inference") or cfg.get("merge_lora"):
        return
    if config.needs_expert_labels:
        _warn_of_experts_without_rows(datasets, config)
    classifies = cfg.get("reward_model") or cfg.get("process_reward_model")  # of which routers read the whole rows
    reads_prompts = config.reads_prompts and not classifies
    names = _names(datasets) | _names(test_datasets) if wants_report(cfg) else {}
    if config.needs_expert_labels or reads_prompts or names:
        from .dataset_strategy import tag_dataset

        for what, dataset in datasets + test_datasets:
            tag_dataset(
                dataset,
                f"{what} ({dataset.get('path')})",
                config.expert_names if config.needs_expert_labels else None,
                (cfg[adapter].get(ROWS_WITHOUT_PROMPT) or "raise") if reads_prompts else None,
                names.get(what),
            )


def _entries(data: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """The entries of a list of datasets, each with its place in it; what is no entry is left out."""
    entries = data.get(key) if isinstance(data.get(key), list) else []
    return [(f"{key}[{i}]", entry) for i, entry in enumerate(entries) if isinstance(entry, Mapping)]


def _names(entries: list[tuple[str, Any]]) -> dict[str, str]:
    """What a report calls the datasets of one list, by their places: paths, and what else sets those apart."""
    names = {what: str(dataset.get("path")) for what, dataset in entries}
    for key in ("name", "split"):
        count = Counter(names.values())
        for what, dataset in entries:
            if count[names[what]] > 1 and dataset.get(key):
                names[what] = f"{names[what]} ({dataset[key]})"
    count = Counter(names.values())
    return {what: f"{what}: {name}" if count[name] > 1 else name for what, name in names.items()}


def _check_rows_for_rewards(cfg: Mapping[str, Any], datasets: list[tuple[str, Any]]) -> None:
    """Check that none of the host's other kinds of rows goes to a trainer of rewards."""
    for key, wanted in (("reward_model", "bradley_terry"), ("process_reward_model", "stepwise_supervised")):
        for what, dataset in datasets if cfg.get(key) else []:
            kind = re.split(r"[.:]", str(dataset.get("type")))[0]
            if kind != wanted and kind.isidentifier() and find_spec(f"axolotl.prompt_strategies.{kind}"):
                example = f"`type: {wanted}.chat_template`" if key == "reward_model" else f"`type: {wanted}`"
                raise ValueError(
                    f"{what}.type: {dataset['type']!r} makes rows without the labels that `{key}: true` trains on; "
                    f"use rows of {example}."
                )


def _check_experts(datasets: list[tuple[str, Any]], test_datasets: list[tuple[str, Any]], config: PeftConfig) -> None:
    known = ", ".join(config.expert_names)
    for what, dataset in datasets + test_datasets:
        for key in difflib.get_close_matches("expert", [key for key in dataset if key != "expert"], cutoff=0.85):
            raise ValueError(f"`{what}.{key}` is no key of a dataset; did you mean `{what}.expert`?")
    for what, dataset in datasets:
        if dataset.get("expert") is None:
            raise ValueError(
                f"{what} ({dataset.get('path')}) has no `expert:`; name the expert that its rows belong to, which is "
                f"the router's label: one of {known}."
            )
    for what, dataset in datasets + test_datasets:
        if dataset.get("expert") not in (None, *config.expert_names):
            raise ValueError(
                f"{what}.expert: {dataset['expert']!r} is no name in tt_lora_moe.experts; use one of {known}."
            )


def _check_prompts(adapter: str, data: Mapping[str, Any], datasets: list[tuple[str, Any]]) -> None:
    keys = [f"{what}.type: completion" for what, d in datasets if str(d.get("type")).split(":")[0] == "completion"]
    keys += ["train_on_inputs: true"] if data.get("train_on_inputs") else []
    keys += ["pretraining_dataset"] if data.get("pretraining_dataset") else []
    if keys:
        raise ValueError(
            f"`{keys[0]}` leaves no prompts that the router could read; it reads what comes before the first "
            "supervised token. Use `datasets` of a type with prompts and `train_on_inputs: false`, or let the router "
            f"read whole sequences with `router_input: sequence` in the `{adapter}:` block, in training and at "
            "inference."
        )


def _warn_of_experts_without_rows(datasets: list[tuple[str, Any]], config: PeftConfig) -> None:
    named = {dataset.get("expert") for _, dataset in datasets}
    for name in config.expert_names:
        if name not in named:
            LOG.warning("no dataset has `expert: %s`: the router does not learn to choose it", name)
