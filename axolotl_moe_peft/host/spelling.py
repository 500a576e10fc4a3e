"""Keys of a YAML that are nearly keys of Axolotl's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def check_spelling(data: Mapping[str, Any], schemas: Iterable[type[BaseModel]], where: str = "") -> None:
    """Refuse what is nearly a key of the schema, or of a block in it, which Axolotl would drop without a word.

    Commands put keys of their own beside the schema's, so that what resembles none of them passes.

    Args:
        data: the YAML, or a block of it.
        schemas: what it may be; a block of `datasets` is one of several kinds.
        where: the block, for the message.

    Raises:
        ValueError: a key is nearly one that the host knows.
    """
    fields = [(name, field) for schema in schemas for name, field in schema.model_fields.items()]
    known = {name for key, field in fields for name in _names(key, field)}
    if where == "fsdp_config.":  # the host strips a prefix that transformers' keys have
        known |= {f"fsdp_{name}" for name in known}
    for key, value in data.items():
        if key not in known and (nearest := difflib.get_close_matches(str(key), known, n=1, cutoff=0.85)):
            raise ValueError(
                f"`{where}{key}` is no key of Axolotl's, which would ignore it; did you mean `{where}{nearest[0]}`?"
            )
        blocks = {model for name, field in fields if name == key for model in _models(field.annotation)}
        entries = value if isinstance(value, list) else [value]
        for i, entry in enumerate(entries):
            if blocks and isinstance(entry, Mapping):
                check_spelling(entry, blocks, f"{where}{key}{f'[{i}]' * isinstance(value, list)}.")


def _names(key: str, field: FieldInfo) -> set[str]:
    """A field's key in a YAML, and what else the host takes for it."""
    aliases = getattr(field.validation_alias, "choices", [field.validation_alias, field.alias])
    return {key, *(alias for alias in aliases if isinstance(alias, str))}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The schemas in a type, which drop what they do not know."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation.model_config.get("extra") in (None, "ignore"):
            yield annotation
    for part in get_args(annotation):
        yield from _models(part)
