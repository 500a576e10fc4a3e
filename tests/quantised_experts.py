"""The host's quantising of stacked experts while they load, on a CPU too, where it leaves them as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import bitsandbytes
from axolotl.monkeypatch import moe_quant
from axolotl.utils.dict import DictDefault
from torch import Tensor
from transformers import core_model_loading, modeling_utils


def quantise_experts_as_they_load(cfg: DictDefault) -> None:
    """Let from_pretrained quantise stacked experts to the bits of `cfg`, whatever device they come to."""
    moe_quant.patch_moe_quantization_on_load(cfg)
    set_param, quantise_int8 = core_model_loading.set_param_for_module, bitsandbytes.functional.int8_vectorwise_quant

    def set_param_for_module(*args: Any, **kwargs: Any) -> None:
        with patch.object(Tensor, "is_cuda", True):
            set_param(*args, **kwargs)

    def int8_vectorwise_quant(weight: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, scales, outliers = quantise_int8(weight.flatten(0, -2), threshold)  # on CPUs it takes matrices only
        return rows.view(weight.shape), scales, outliers

    core_model_loading.set_param_for_module = set_param_for_module
    bitsandbytes.functional.int8_vectorwise_quant = int8_vectorwise_quant


@contextmanager
def quantised_experts(bits: str) -> Iterator[None]:
    """Within it, from_pretrained quantises stacked experts; `bits` is 4bit or 8bit."""
    places = (
        (core_model_loading, "set_param_for_module"),
        (modeling_utils, "caching_allocator_warmup"),
        (bitsandbytes.functional, "int8_vectorwise_quant"),
    )
    before = [getattr(*place) for place in places]
    try:
        quantise_experts_as_they_load(DictDefault({f"load_in_{bits}": True}))
        yield
    finally:
        for place, value in zip(places, before):
            setattr(*place, value)
        moe_quant._moe_load_state["patched"] = False
