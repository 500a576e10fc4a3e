"""Who looks on when routers choose: layers tell of every decision, and a report (or nobody) listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .routing import Routing

Watcher = Callable[[str, str | None, Routing], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def note_choices(adapter_name: str, layer: str | None, routing: Routing) -> None:
    """Tell of a router's decisions about the tokens, or the sequences, of the batch that the model runs on.

    Args:
        adapter_name: whose router.
        layer: full name of the block that it routes for; None where it decides once for a whole sequence.
        routing: of all tokens (B * S), padding included, or of the batch's sequences in reading order.
    """
    if torch.compiler.is_compiling():
        return  # what is compiled stays whole; who watches runs it eagerly
    watcher = _watcher.get()
    if watcher is not None:
        watcher(adapter_name, layer, routing)


@contextmanager
def watch_choices(watcher: Watcher) -> Iterator[None]:
    """Call `watcher(adapter_name, layer, routing)` for every decision in this thread."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
