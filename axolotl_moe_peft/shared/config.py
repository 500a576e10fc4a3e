"""What the configurations of this package's methods share beyond PeftConfig."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from safetensors import safe_open

from .method import Method


@dataclass
class AdapterConfig(Method, PeftConfig):
    """A PeftConfig whose adapter is saved whole or not at all.

    Attributes:
        is_saved: whether it comes from a saved adapter's file.
    """

    def __post_init__(self) -> None:
        self.is_saved = self.peft_version is not None  # which PEFT fills in
        super().__post_init__()
        # names of the tensors that a file of the adapter has; its tuner notes them
        self._tensor_names: frozenset[str] = frozenset()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json. A base model that is a folder is named so that it is found from any other one.

        Raises:
            RuntimeError: PEFT has just written the adapter's tensors beside it, and some are missing or empty.
        """
        if "auto_mapping_dict" in kwargs:  # so calls PeftModel.save_pretrained, and only after the tensors
            self._check_saved_tensors(Path(save_directory) / "adapter_model.safetensors")
        self.base_model_name_or_path = found_from_anywhere(self.base_model_name_or_path)
        super().save_pretrained(save_directory, **kwargs)

    def _check_saved_tensors(self, path: Path) -> None:
        if not path.is_file():  # safe_serialization=False
            return
        with safe_open(path, framework="pt") as file:
            missing = self._tensor_names - {key for key in file.keys() if all(file.get_slice(key).get_shape())}
        if missing:
            path.unlink()
            raise RuntimeError(
                f"the adapter was not saved: {len(missing)} of its {len(self._tensor_names)} tensors are missing or "
                f"empty in what was to be written to {str(path)!r}: {enumerate_names(missing)}. A model that is "
                "sharded has to be gathered first."
            )


@dataclass
class ModulesToSaveConfig(AdapterConfig):
    """An AdapterConfig with what PEFT itself trains beside an adapter.

    The fields are PEFT's own, with the names and the meaning that they have for LoRA; they are no keys of a block.
    """

    trains_modules_of_the_base: ClassVar[bool] = True

    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules of the base, by name or suffix, that are trained and saved whole with the adapter. For "
            "classification the head is one of them without being named."
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings are trained and saved with the adapter; or a map from embedding layers "
            "to tokens."
        },
    )


def found_from_anywhere(base_model: str | None) -> str | None:
    """A base model's name, or its folder such that it does not matter where it is asked for."""
    return os.path.abspath(base_model) if base_model and os.path.isdir(base_model) else base_model


def check_target_modules(key: str, target_modules: Any) -> None:
    """Check that a text is a regular expression.

    Raises:
        ValueError: it is none; the message names `key`.
    """
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"{key}: {target_modules!r} is no regular expression ({error}). Write a list for names or suffixes of "
                f"names: [{target_modules}]."
            ) from None


def enumerate_names(names: set[str] | frozenset[str], most: int = 6) -> str:
    """The first of these names, and how many there are beside them."""
    return ", ".join(sorted(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
