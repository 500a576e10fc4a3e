"""lm_eval's log-likelihoods, for routers that choose once for a sequence.

For the probability of a continuation after a context lm_eval calls the model with the two as one row, filled up to the
longest row of the batch, and with nothing that tells context, continuation and filling apart. A router that reads the
prompt would read all of it: an answer would choose the expert that judges it, and rows would change with their batch.
Only the method that is given the requests knows better. So it is wrapped here once lm_eval is there: requests are run
in groups of equal lengths, which need no filling and whose continuations begin at one place, and the model is told of
it by labels, as in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..after_import import after_import
from .batches import IGNORE_INDEX

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

    # the two as texts; the context's tokens; the continuation's
    Request = tuple[tuple[str, str] | None, list[int], list[int]]

_MARK = "_of_axolotl_moe_peft"


def watch_evaluation() -> None:
    """Have lm_eval's `hf` models tell routers what their prompt is, from now on or once lm_eval is imported."""
    after_import("lm_eval.models.huggingface", _wrap)


def _wrap() -> None:
    from lm_eval.models.huggingface import HFLM

    if not hasattr(HFLM._loglikelihood_tokens, _MARK):
        HFLM._loglikelihood_tokens = _by_lengths(HFLM._loglikelihood_tokens)


def _by_lengths(method: Callable[..., list[tuple[float, bool]]]) -> Callable[..., list[tuple[float, bool]]]:
    @functools.wraps(method)
    def wrapper(
        self: HFLM, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        configs = getattr(self.model, "peft_config", {})
        if not any(hasattr(config, "router_input") for config in configs.values()):
            return method(self, requests, disable_tqdm, override_bs)
        from tqdm import tqdm

        if self.batch_size == "auto" and not override_bs and requests:
            # once for all groups, which are too small for what lm_eval does by itself
            override_bs = self._detect_batch_size([max(requests, key=lambda r: len(r[1]) + len(r[2]))])
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            groups.setdefault((len(context), len(continuation)), []).append(i)
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Log-likelihoods") as progress:
            for context, continuation in sorted(groups, key=sum, reverse=True):  # what needs most memory first
                group = groups[context, continuation]
                with _last_tokens_are_answers(self.model, continuation - 1):  # its last token is not in the input
                    for i, answer in zip(group, method(self, [requests[i] for i in group], True, override_bs)):
                        answers[i] = answer
                progress.update(len(group))
        return answers

    setattr(wrapper, _MARK, True)
    return wrapper


@contextmanager
def _last_tokens_are_answers(model: nn.Module, count: int) -> Iterator[None]:
    """Within it, calls of the model have labels for the last tokens of each row."""

    def add_labels(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        input_ids = args[0] if args else kwargs["input_ids"]
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[:, -count:] = input_ids[:, -count:]
        return args, kwargs | {"labels": labels}

    handle = model.register_forward_pre_hook(add_labels, with_kwargs=True) if count else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
