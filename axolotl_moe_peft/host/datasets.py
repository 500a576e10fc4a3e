"""The datasets of a YAML: `expert:`, the label of a router, and prompts for a router to read.

Checked before validation, since Axolotl's schema drops `expert` before any other check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.utils.logging import get_logger
from peft import PeftConfig

from .args import CONFIGS, config_of

LOG = get_logger(__name__)


def prepare_datasets(cfg: dict[str, Any]) -> None:
    """Check the datasets of a run with an adapter of this package, and have their `expert:` reach the rows.

    Args:
        cfg: the raw YAML.

    Raises:
        ValueError: the name of an expert is missing, unknown or without meaning, or the rows have no prompts.
    """
    datasets, test_datasets = _entries(cfg, "datasets"), _entries(cfg, "test_datasets")
    adapter = cfg["adapter"]
    if not CONFIGS[adapter].needs_expert_labels:
        for what, dataset in datasets + test_datasets:
            if dataset.get("expert") is not None:
                raise ValueError(f"{what}.expert means nothing with `adapter: {adapter}`; remove it.")
    try:
        config = config_of(adapter, cfg.get(adapter))
    except ValueError:
        return  # which validation tells
    if config.needs_expert_labels:
        _check_experts(datasets, test_datasets, config)
    if config.reads_prompts:
        _check_prompts(adapter, cfg, datasets + test_datasets)
    if config.needs_expert_labels and not cfg.get("inference") and not cfg.get("merge_lora"):
        _tag(datasets, test_datasets, config)


def _entries(data: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """The entries of a list of datasets, each with its place in it; what is no entry is left out."""
    entries = data.get(key) if isinstance(data.get(key), list) else []
    return [(f"{key}[{i}]", entry) for i, entry in enumerate(entries) if isinstance(entry, Mapping)]


def _check_experts(datasets: list[tuple[str, Any]], test_datasets: list[tuple[str, Any]], config: PeftConfig) -> None:
    known = ", ".join(config.expert_names)
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


def _tag(datasets: list[tuple[str, Any]], test_datasets: list[tuple[str, Any]], config: PeftConfig) -> None:
    from .dataset_experts import tag_dataset

    named = {dataset.get("expert") for _, dataset in datasets}
    for name in config.expert_names:
        if name not in named:
            LOG.warning("no dataset has `expert: %s`: the router does not learn to choose it", name)
    for _, dataset in datasets + test_datasets:
        tag_dataset(dataset, config.expert_names)
