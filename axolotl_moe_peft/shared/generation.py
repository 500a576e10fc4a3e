"""Decisions that belong to a sequence: how they travel with its cache, and what a router may read while it generates.

A method that decides once for each sequence (which prompt, which expert) decides when it reads the prompt. Whatever is
called after that follows the decision:
- with a cache, by a note in the cache (`keep`, `note_of`), which goes where the cache goes: copied, pickled, cropped,
  its rows reordered, repeated or selected;
- without one, by the run of `generate` that the call belongs to (`Generation`), which knows where its prompts end.

What only lasts for a call is kept by thread (`PerThread`): threads may call one model at a time.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .batches import Sequences

# transformers 5.24 has one name for what were two; a call may still use the old ones
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

# ------------------------------------------------------------------------------------------------- calls and threads


class PerThread(threading.local):
    """Attributes that every thread has for itself; copies and pickles begin without any."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()


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


def cache_of(module: nn.Module, call: Mapping[str, Any]) -> Cache | None:
    """The cache of a call that `bind` returned; None if there is none.

    Raises:
        ValueError: it is not one of transformers' caches, on which no note can be left.
    """
    given = call.get(cache_name(module))
    if given is not None and not (isinstance(given, Cache) and hasattr(given, "layers")):
        raise ValueError(
            f"a cache of type {type(given).__name__} cannot keep what was decided for its sequences. Give a "
            "transformers.DynamicCache, or none."
        )
    return given


def cache_in(output: Any) -> Cache | None:
    """The cache in a model's output, a tuple or a mapping; None if there is none."""
    parts = output if isinstance(output, tuple) else getattr(output, "values", tuple)()
    return next((part for part in parts if isinstance(part, Cache) and hasattr(part, "layers")), None)


def cached_length(cache: Cache) -> int | None:
    """How many positions a cache holds; None where it holds states that do not count them, as Mamba's."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # no layer of it counts
        return None if cache.has_previous_state() else 0


# -------------------------------------------------------------------------------------------------------- with a cache

_NOTE = "_decision_note"
# what moves a cache layer's rows, or takes from their ends
_OPERATIONS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset")


class CacheNote:
    """What was decided for the rows of a cache.

    It sits in the cache's first layer, whose methods call it, so that it is copied and pickled with it and follows
    what is done to its rows.

    Attributes:
        decided_by: what made the decision, in words; other words mean another adapter.
        rows: the decisions, by name: a tensor (B, ...) with a row for each of the cache's. None if the rows of the
            cache hold several sequences each, which cannot be continued.
        inserted: how many of the cache's positions are no tokens of the caller's, in every row.
        weights: the fingerprint of what filled it (`Fingerprints`); None if nobody asked.
        length: of the cache, after the last call.
        derived: what is computed from `rows`, for as long as they stay as they are.
    """

    def __init__(
        self, layer: Any, decided_by: str | None, rows: dict[str, Tensor] | None, inserted: int, weights: int | None
    ) -> None:
        self.layer, self.decided_by, self.rows, self.inserted = layer, decided_by, rows, inserted
        self.weights = weights
        self.length: int | None = 0
        self.derived: Any = None
        self._keys: Tensor | None = None
        for name in _OPERATIONS:
            if hasattr(type(layer), name):
                setattr(layer, name, _LayerOperation(self, name))
        setattr(layer, _NOTE, self)

    def update(self, cache: Cache) -> None:
        """Note how the cache is left after a call."""
        self.length, self._keys = cached_length(cache), getattr(self.layer, "keys", None)

    def after(self, operation: str, arguments: tuple) -> None:
        """Follow what was done to the layer."""
        if operation == "reset":
            self.remove()
            return
        self._keys = getattr(self.layer, "keys", None)
        if operation == "crop" or self.rows is None:
            return
        self.rows = {name: _moved(rows, operation, arguments[0]) for name, rows in self.rows.items()}
        self.derived = None

    def remove(self) -> None:
        for name in (*_OPERATIONS, _NOTE):
            vars(self.layer).pop(name, None)

    @property
    def is_current(self) -> bool:
        """Whether the rows are where they were left; they may have been moved past the cache's methods."""
        return getattr(self.layer, "keys", None) is self._keys


class _LayerOperation:
    """In place of a method of a cache layer: the method, and the note that follows."""

    def __init__(self, note: CacheNote, name: str) -> None:
        self.note, self.name = note, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.note.layer
        result = getattr(type(layer), self.name)(layer, *args, **kwargs)
        self.note.after(self.name, args or tuple(kwargs.values()))
        return result


def _moved(rows: Tensor, operation: str, argument: Any) -> Tensor:
    if operation == "batch_repeat_interleave":
        return rows.repeat_interleave(argument, 0)
    index = argument.to(rows.device) if isinstance(argument, Tensor) else argument
    return rows.index_select(0, index) if operation == "reorder_cache" else rows[index]


def note_of(cache: Cache | None) -> CacheNote | None:
    """The note in a cache; None if there is none."""
    return getattr(cache.layers[0], _NOTE, None) if cache is not None and cache.layers else None


def keep(
    cache: Cache | None,
    decided_by: str,
    rows: dict[str, Tensor] | None,
    inserted: int = 0,
    weights: int | None = None,
) -> None:
    """Leave a note in a cache that a call has begun to fill; the arguments are CacheNote's."""
    if cache is not None and cache.layers:
        CacheNote(cache.layers[0], decided_by, rows, inserted, weights).update(cache)


def check_continued(
    method: str, cache: Cache | None, decided_by: str | None, nothing: str, weights: Callable[[], int | None]
) -> CacheNote | None:
    """The note of a filled cache that this call continues; None if the call begins.

    Args:
        method: for the message.
        cache: of the call.
        decided_by: what decides now, in words; None if nothing does.
        nothing: what that is called, in words.
        weights: tells the fingerprint of what decides now.

    Raises:
        ValueError: the cache was filled under something else, or its weights have changed since.
    """
    if cache is None or cached_length(cache) == 0:
        return None
    note = note_of(cache)
    before = None if note is None else note.decided_by
    if before != decided_by:
        raise ValueError(
            f"{method}: the cache was filled with {before or nothing}, but now it is {decided_by or nothing}. Begin "
            "with a new cache."
        )
    if note is not None and note.weights is not None and note.weights != weights():
        raise ValueError(
            f"{method}: the cache was filled with {before}, whose weights are others now (another adapter was loaded "
            "under this name, or this one was trained). Begin with a new cache."
        )
    return note


# ----------------------------------------------------------------------------------------------------- without a cache


@dataclass(eq=False)
class Stream:
    """One batch of prompts, and what was generated to them so far.

    Attributes:
        length: how many tokens its rows had before anything was generated.
        prompt_ids: those tokens (B, length); None of the input of `generate` itself.
        decision: what was decided, for who wants to keep it.
    """

    length: int
    prompt_ids: Tensor | None = None
    decision: Any = None


@dataclass(eq=False)
class _Run:
    """A running `generate`."""

    main: Stream
    prepared: Tensor | None = None
    others: list[Stream] = field(default_factory=list)


class _Through:
    """In place of a method: calls it through another one. `inspect` sees the method."""

    def __init__(self, method: Callable, handler: Callable) -> None:
        self.method, self.handler = method, handler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler(self.method, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.method)


class Generation:
    """Knows which calls of a model belong to a `generate`, and where their prompts end.

    It takes the place of two methods of the model (not of its class), `generate` and `prepare_inputs_for_generation`:
    transformers has no hook around them, and whoever generates comes by there, PeftModel, pipelines, and the model
    itself where transformers loaded the adapter. `detach` puts them back.

    Args:
        model: the model; one that does not generate is left alone.
        method: for messages.
        is_active: whether there is an adapter that decides.
    """

    def __init__(self, model: nn.Module, method: str, is_active: Callable[[], bool]) -> None:
        self._model, self._method, self._is_active = model, method, is_active
        self._thread = PerThread()
        self._before = {}
        for name, handler in (("generate", self._generate), ("prepare_inputs_for_generation", self._prepare)):
            if hasattr(model, name):
                self._before[name] = vars(model).get(name)
                setattr(model, name, _Through(getattr(model, name), handler))

    def detach(self) -> None:
        """Put the model's methods back."""
        for name, before in self._before.items():
            delattr(self._model, name)
            if before is not None:
                setattr(self._model, name, before)

    def _generate(self, generate: Callable, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(generate).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        config = given.get("generation_config") or self._model.generation_config
        if given.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)) and self._is_active():
            raise ValueError(
                f"{self._method}: `prefill_chunk_size` is not supported, as the router has to read all of the input "
                "at once. Leave it out."
            )
        inputs = [given[name] for name in ("inputs_embeds", "input_ids", "inputs") if given.get(name) is not None]
        outer = self._run
        self._thread.run = _Run(Stream(inputs[0].shape[1] if inputs else 1))  # without an input it is a single BOS
        try:
            return generate(*args, **kwargs)
        finally:
            self._thread.run = outer

    def _prepare(self, prepare: Callable, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        note = note_of(next((kwargs[name] for name in CACHE_NAMES if isinstance(kwargs.get(name), Cache)), None))
        if note is not None and kwargs.get("next_sequence_length") == input_ids.shape[1] - (note.length or 0):
            # all tokens were given again beside a cache, whose length counts what was inserted
            kwargs["next_sequence_length"] += note.inserted
        inputs = prepare(input_ids, *args, **kwargs)
        if self._run is not None:
            self._run.prepared = _tokens(inputs)
        return inputs

    @property
    def _run(self) -> _Run | None:
        return getattr(self._thread, "run", None)

    def stream(self, call: Mapping[str, Any]) -> Stream | None:
        """The stream that a call of the model belongs to; None if no `generate` is running.

        Beside the calls of `generate` itself there are those of guidance, which has prompts of its own and extends
        them by what is generated.
        """
        run, tokens = self._run, _tokens(call)
        if run is None or tokens is run.prepared:
            return None if run is None else run.main
        for stream in run.others:
            prompt = stream.prompt_ids
            if tokens.shape[0] == prompt.shape[0] and torch.equal(tokens[:, : stream.length], prompt):
                return stream
        run.others.append(Stream(tokens.shape[1], tokens))
        return run.others[-1]


def _tokens(call: Mapping[str, Any]) -> Tensor | None:
    ids = call.get("input_ids")
    return ids if ids is not None else call.get("inputs_embeds")


def only_input(sequences: Sequences, stream: Stream | None) -> Sequences:
    """Sequences of which a router may read what was there before anything was generated."""
    if stream is None:
        return sequences
    readable = torch.arange(sequences.prompt_BS.shape[1], device=sequences.prompt_BS.device) < stream.length
    return replace(sequences, prompt_BS=sequences.prompt_BS & readable)
