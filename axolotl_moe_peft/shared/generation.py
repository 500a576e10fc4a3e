"""What generation with a cache needs to know: where a call's cache is, whatever transformers calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import nn
from transformers import Cache

# transformers 5.24 has one name for what were two; a call may still use the old ones
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


@cache
def arguments_of(forward: Callable) -> tuple[str, ...]:
    """Names of a forward method's arguments, `self` left out."""
    return tuple(inspect.signature(forward).parameters)[1:]


def cache_name(module: nn.Module) -> str | None:
    """What this module calls the argument for its cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in arguments_of(type(module).forward)), None)


def bind(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, its cache under the name that the module has for it."""
    call, own = dict(zip(arguments_of(type(module).forward), args)), cache_name(module)
    for name, value in kwargs.items():
        call[own if own is not None and name in CACHE_NAMES else name] = value
    return call


def cache_of(module: nn.Module, call: Mapping[str, Any]) -> Any | None:
    """The cache of a call that `bind` returned; None if there is none."""
    return call.get(cache_name(module))


def cache_in(output: Any) -> Cache | None:
    """The cache in a model's output, a tuple or a mapping; None if there is none."""
    parts = output if isinstance(output, tuple) else getattr(output, "values", tuple)()
    return next((part for part in parts if isinstance(part, Cache)), None)
