"""Saved adapters that a YAML names: those that a run continues, evaluates or resumes from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axolotl.utils.dict import DictDefault
from axolotl.utils.train import determine_last_checkpoint
from peft import PeftConfig

from ..shared.config import ModulesToSaveConfig

CONTINUED = "lora_model_dir"
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def own_fields(config_cls: type[PeftConfig]) -> dict[str, dataclasses.Field]:
    """The fields that a method's config adds to those that PEFT knows, by name: the keys of its block."""
    inherited = {f.name for f in dataclasses.fields(ModulesToSaveConfig)}
    return {f.name: f for f in dataclasses.fields(config_cls) if f.name not in inherited}


def saved_adapters(args: Any) -> Iterator[tuple[str, str]]:
    """The keys of the validated YAML that name a saved adapter, and its folder or hub id."""
    if folder := getattr(args, "lora_model_dir", None):
        yield CONTINUED, folder
    if folder := getattr(args, "resume_from_checkpoint", None):
        yield "resume_from_checkpoint", folder
    elif getattr(args, "auto_resume_from_checkpoints", None) and (folder := last_checkpoint(args.output_dir)):
        yield "auto_resume_from_checkpoints", folder


def last_checkpoint(output_dir: str) -> str | None:
    """The checkpoint that the host would resume from by itself."""
    return determine_last_checkpoint(DictDefault(output_dir=output_dir, auto_resume_from_checkpoints=True))


def continued(config: PeftConfig, key: str, folder: str) -> PeftConfig:
    """Check that a saved adapter is what the YAML's block describes.

    Args:
        config: the block as a PEFT config.
        key: the key of the YAML that names the adapter.
        folder: a folder, or a repository's id on the hub.

    Returns:
        The block as the config of the saved adapter.

    Raises:
        ValueError: the adapter is not there, incomplete or unreadable, another method's, or differs from the block in
            more than what shapes training only.
    """
    saved = _read_config(key, folder)
    if saved.peft_type != config.peft_type:
        raise ValueError(
            f"{key}: {folder!r} holds an adapter of type {saved.peft_type.value}, the YAML asks for "
            f"{config.peft_type.value}."
        )
    for name in own_fields(type(config)):
        given, made_with = getattr(config, name), getattr(saved, name)
        left_open = given is None and name in config.found_before_training
        if name not in config.training_fields and not left_open and not config.makes_the_same(name, saved):
            raise ValueError(
                f"the block says {name}: {given!r}, but the adapter in {folder!r} ({key}) was made with "
                f"{made_with!r}. Make the block the same as the saved adapter_config.json."
            )
    try:
        result = config.continuing(saved)
    except ValueError as error:
        raise ValueError(f"{key}: {folder!r} cannot be continued: {error}") from None
    if key != CONTINUED and (added := config.added_to(saved)):
        raise ValueError(
            f"{key}: the block adds {', '.join(added)} to the adapter in {folder!r}. A run resumes as it was; to "
            f"add to a trained adapter give its folder as `{CONTINUED}`."
        )
    return result


def _read_config(key: str, folder: str) -> PeftConfig:
    path = Path(folder)
    missing = [name for name in _FILES if not (path / name).is_file()]
    on_the_hub = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", folder) is not None
    if missing and not on_the_hub:
        raise ValueError(f"{key}: {folder!r} holds no {missing[0]}; give the folder of a saved adapter.")
    try:
        return PeftConfig.from_pretrained(folder)
    except (KeyError, OSError, TypeError, ValueError) as error:
        if on_the_hub:
            raise ValueError(
                f"{key}: there is no folder {folder!r} here, and the hub does not give an adapter of that name either "
                f"({error}). Give the folder of a saved adapter, or a repository's id."
            ) from None
        raise ValueError(f"{key}: the adapter_config.json of {folder!r} cannot be read: {error!r}.") from None
