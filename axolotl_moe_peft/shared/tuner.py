"""What the tuners of this package share beyond PEFT's BaseTuner: all or nothing, and the adapter's dtype."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..versions import warn_of_newer_versions
from .config import enumerate_names
from .four_bits import keep_trainable
from .model_card import describe_adapters_in_cards
from .rollback import unchanged_on_failure, undo_failed_loads
from .summary import ParameterRow, parameter_row
from .transformers_loader import note_attached

_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."  # in modules' names; torch leaves it out of state dicts


class Tuner(BaseTuner):
    """A BaseTuner whose adapters are float32, and are attached, saved and loaded completely or not at all.

    Every parameter of an adapter is called `prefix` and more, and ends with the adapter's name (parameter dicts).
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        warn_of_newer_versions()
        undo_failed_loads()
        describe_adapters_in_cards()
        with unchanged_on_failure(model) as before:
            super().__init__(model, *args, **kwargs)
        self._unloaded = {self.active_adapters[0]: (before, self._versions(self.active_adapters[0]))}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with unchanged_on_failure(self) as before:
            keep_trainable(model)
            self._attach(model, adapter_name, *args, **kwargs)
            self.peft_config[adapter_name]._tensor_names = frozenset(self._tensor_names(adapter_name))
        note_attached(self, adapter_name)
        if adapter_name not in self.active_adapters:
            self._unloaded[adapter_name] = (before, self._versions(adapter_name))

    def _attach(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """What `inject_adapter` does in a BaseTuner; if it fails, the model stays as it was."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return (
            peft_config  # BaseTuner would look up target modules by the model's type; ours have a default or need none
        )

    def measure_on(self, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default") -> None:
        """Measure what an adapter has to know of its training data before it is trained; most need nothing.

        Args:
            batches: arguments of the model's calls, on every process the same.
            adapter_name: the adapter.
        """

    def row_of_others(self, adapter_name: str) -> ParameterRow:
        """What is trainable beside the adapter's own parameters: heads and tokens that PEFT trains, or nothing."""
        own = {id(p) for p in self._own(adapter_name).values()}
        return parameter_row("other", [p for p in self.model.parameters() if p.requires_grad and id(p) not in own])

    def trainable_strangers(self, adapter_name: str) -> list[str]:
        """Names of trainable parameters that are not saved with the adapter."""
        saved = {id(p) for p in self._own(adapter_name).values()}
        saved |= {id(p) for _, wrapper in self._wrappers() for p in wrapper.parameters()}
        return [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in saved]

    def num_saved_parameters(self, adapter_name: str) -> int:
        """How many numbers the adapter's file holds, but for embeddings that PEFT may write beside it."""
        parameters = {_in_state_dict(name): p for name, p in self.named_parameters(remove_duplicate=False)}
        saved = (parameters[key] for key in self._state_dict_keys(adapter_name, "") if key in parameters)
        return sum(getattr(p, "ds_numel", p.numel()) for p in saved)  # whole, also where ZeRO-3 divides it

    def is_unused(self, adapter_name: str) -> bool:
        """Whether the adapter is not there, or neither loaded nor trained since it was attached."""
        if adapter_name not in self.peft_config:
            return True
        return adapter_name in self._unloaded and self._unloaded[adapter_name][1] == self._versions(adapter_name)

    def undo_attaching(self, adapter_name: str) -> None:
        """Make the model what it was before this adapter."""
        if adapter_name in self._unloaded:
            self._unloaded.pop(adapter_name)[0].restore()
            self.peft_config.pop(adapter_name, None)

    def _own(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name in the state dict."""
        return {_in_state_dict(name): p for name, p in self.named_parameters() if self._is_own(name, adapter_name)}

    @classmethod
    def _is_own(cls, name: str, adapter_name: str) -> bool:
        parameter_name = name.removesuffix(f".{adapter_name}")
        return parameter_name != name and parameter_name.rpartition(".")[2].startswith(cls.prefix)

    def _versions(self, adapter_name: str) -> list[int]:
        return [0 if p.is_inference() else p._version for p in self._own(adapter_name).values()]

    def _wrappers(self) -> Iterator[tuple[str, AuxiliaryTrainingWrapper]]:
        """What PEFT itself trains beside the adapter: heads, embeddings. By name in the state dict."""
        for name, module in self.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                yield _in_state_dict(name), module

    def _tensor_names(self, adapter_name: str) -> Iterator[str]:
        """The names that the adapter's tensors have in its file."""
        for name in self._own(adapter_name):
            yield f"base_model.{name.removesuffix(f'.{adapter_name}')}"
        for name, wrapper in self._wrappers():
            yield from (f"base_model.{name}.{key}" for key in wrapper.adapter_state_dict_load_map(adapter_name))

    # PEFT 0.21 finds an adapter's tensors by the names of its layers, which have a part more than the tensors' where
    # torch's activation checkpointing wraps a layer around them, and so finds none. 0.20 goes by the tensors' names.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in state_dict.items() if cls._is_own(key, adapter_name)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            f"{key}.{adapter_name}" if key.rpartition(".")[2].startswith(cls.prefix) else key: tensor
            for key, tensor in state_dict.items()
        }

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for name in ("statistics", "eval_statistics"):
            if (statistics := getattr(self, name, None)) is not None:
                statistics.discard(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # the layers create float32; PEFT's flag is the way to ask for the base's dtype
        if autocast_adapter_dtype:
            return
        narrow = set()
        for layer in self._layers_of_any_dtype():
            dtype = _floating_dtype(layer.base_layer if hasattr(layer, "base_layer") else self.model)
            for name, parameter in layer.named_parameters():
                if self._is_own(name, adapter_name):
                    parameter.data = parameter.data.to(dtype)
                    narrow |= {dtype} if dtype.itemsize < torch.float32.itemsize else set()
        for dtype in narrow:
            warnings.warn(
                f"autocast_adapter_dtype=False: adapter {adapter_name!r} trains in {dtype}; at usual learning rates "
                "most updates of a router then round away, and many of any other parameter.",
                stacklevel=2,
            )

    def _layers_of_any_dtype(self) -> Iterator[BaseTunerLayer]:
        """The layers whose parameters may have the base's dtype."""
        return (layer for layer in self.modules() if isinstance(layer, BaseTunerLayer))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names: a batch cannot mix adapters of type {self._peft_type}; PEFT does so for LoRA, and "
                "here TT_LORA does. Call the model for each adapter's rows after `set_adapter`, and in "
                "`disable_adapter()` for those of the base."
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: PEFT adds adapters up for LoRA, in its weights.

        Raises:
            TypeError: always, as from PEFT's other tuners.
        """
        raise TypeError(
            f"add_weighted_adapter: adapters of type {self._peft_type} cannot be added up; PEFT does so for LoRA, to "
            "which those of type TT_LORA can be exported."
        )

    def missing_from_file(self, adapter_name: str, error: BaseException) -> str | None:
        """In words, PEFT's error of a file that lacks what is trained beside this adapter; None: it is another one."""
        if not isinstance(error, KeyError) or error.args[0] not in self._tensor_names(adapter_name):
            return None
        return (
            f"adapter tensors missing: {error.args[0]}, which is trained and saved with adapter {adapter_name!r} (a "
            "classification head, `modules_to_save`, `trainable_token_indices`). Its file is not whole."
        )

    def add_what_is_new(self, config: PeftConfig) -> None:
        """Add to a loaded adapter what a config that continues it has beside it; see `Method.added_to`."""

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for config in self.peft_config.values():
            if config.unmergeable:
                raise ValueError(
                    f"An adapter of type {config.peft_type.value} cannot be merged: {config.unmergeable}. Keep the "
                    "adapter beside the base model (PeftModel.from_pretrained(base, folder)); `unload()` gives the "
                    "base model back."
                )

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
        expected = {name: set(self._state_dict_keys(name, prefix)) for name in self.peft_config}
        loaded = [name for name in expected if any(self._is_own(key, name) for key in state_dict)]
        missing = {key for name in loaded for key in expected[name]} - set(state_dict)
        unexpected = set(state_dict) - set(self.state_dict(prefix=prefix, keep_vars=True))
        # PEFT writes embeddings that were resized a second time, by their names inside a wrapper
        wrappers = tuple(f"{prefix}{name}." for name, _ in self._wrappers())
        unexpected = {key for key in unexpected if not key.startswith(wrappers)}
        if not loaded:
            error_msgs.append(f"no tensor of a {self._peft_type} adapter in it.")
        if missing:
            error_msgs.append(f"adapter tensors missing: {enumerate_names(missing)}.")
        if unexpected:
            error_msgs.append(f"tensors that this adapter does not have: {enumerate_names(unexpected)}.")

    def _state_dict_keys(self, adapter_name: str, prefix: str) -> Iterator[str]:
        """The names that the adapter's tensors have in the model's state dict."""
        yield from (f"{prefix}{name}" for name in self._own(adapter_name))
        for name, wrapper in self._wrappers():
            keys = wrapper.adapter_state_dict_load_map(adapter_name).values()
            yield from (f"{prefix}{name}.{key}" for key in keys)

    @property
    def _peft_type(self) -> str:
        return next(iter(self.peft_config.values())).peft_type.value

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_unloaded": {}}  # a copy has nothing to undo


class TunerLayer(BaseTunerLayer):
    """A layer whose adapters keep their dtype where PEFT moves them to its base layer (low_cpu_mem_usage)."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        parameter = next(base_layer.parameters(), None)
        return None if parameter is None else parameter.device, None


def adapter_device(base_layer: nn.Module) -> torch.device:
    """Where what is beside a layer goes: where its weight is, or where accelerate brings an offloaded one in calls."""
    device = base_layer.weight.device
    called_on = getattr(getattr(base_layer, "_hf_hook", None), "execution_device", None)
    return torch.device(called_on) if device.type == "meta" and called_on is not None else device


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


def _in_state_dict(name: str) -> str:
    return name.replace(_CHECKPOINT_WRAPPER, "")


def _floating_dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
