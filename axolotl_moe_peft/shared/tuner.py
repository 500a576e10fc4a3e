"""What the tuners of this package share beyond PEFT's BaseTuner: strict loading, and the adapter's dtype."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..versions import warn_of_newer_versions


class Tuner(BaseTuner):
    """A BaseTuner whose adapters are float32 and load completely or not at all.

    Every parameter of an adapter has `prefix` in its name and ends with the adapter's name (parameter dicts).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warn_of_newer_versions()
        super().__init__(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for name in ("statistics", "eval_statistics"):
            if (statistics := getattr(self, name, None)) is not None:
                statistics.discard(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # the layers create float32; PEFT's flag is the way to ask for the base's dtype
        if autocast_adapter_dtype or self.model.dtype == torch.float32:
            return
        warnings.warn(
            f"autocast_adapter_dtype=False: adapter {adapter_name!r} trains in {self.model.dtype}; at usual learning "
            "rates most updates of a router then round away, and many of any other parameter.",
            stacklevel=2,
        )
        for name, parameter in self.model.named_parameters():
            if self.prefix in name and name.endswith(f".{adapter_name}"):
                parameter.data = parameter.data.to(self.model.dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # PEFT loads with strict=False and only warns; an adapter that is not all there must not pass for one
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = set(self.state_dict(prefix=prefix, keep_vars=True))
        loaded = {key.rpartition(".")[2] for key in state_dict if self.prefix in key}
        missing = {key for key in own if self.prefix in key and key.rpartition(".")[2] in loaded} - set(state_dict)
        unexpected = set(state_dict) - own
        if not loaded:
            peft_type = next(iter(self.peft_config.values())).peft_type.value
            error_msgs.append(f"no tensor of a {peft_type} adapter in it.")
        if missing:
            error_msgs.append(f"adapter tensors missing: {_enumerate(missing)}.")
        if unexpected:
            error_msgs.append(f"tensors that this adapter does not have: {_enumerate(unexpected)}.")


class TunerLayer(BaseTunerLayer):
    """A layer whose adapters keep their dtype where PEFT moves them to its base layer (low_cpu_mem_usage)."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        parameter = next(base_layer.parameters(), None)
        return None if parameter is None else parameter.device, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x, as autocast would have it for its own operations."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Where a base's parameters can be read outside its forward pass: DeepSpeed's ZeRO-3 loads it in parts.

    Every process must enter with the same parameters.
    """
    # PEFT's own gather_params_ctx asks transformers, which under Axolotl has forgotten by then
    parts = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parts:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts)


def _enumerate(keys: set[str], most: int = 6) -> str:
    return ", ".join(sorted(keys)[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
