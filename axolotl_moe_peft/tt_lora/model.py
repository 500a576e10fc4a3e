"""TTLoraModel: attaches TT-LoRA adapters to the linear layers of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..shared.linear import linear_shape
from ..shared.summary import ParameterRow, parameter_row
from ..shared.targets import endings, has_suffix, idle_layers, layers_of_version_0_1, read_layers, target_layers
from ..shared.tuner import Tuner
from .config import TTLoraConfig
from .factors import Factors, auto_factors, check_product
from .layer import TTLoraLinear, kept_matrices


class TTLoraModel(Tuner):
    """TT-LoRA: low-rank updates of linear layers whose factors are tensor trains (arXiv 2504.21190, stage 1).

    Args:
        model: any model.
        config: a TTLoraConfig.
        adapter_name: name of the adapter.

    Raises:
        ValueError: a target matches no linear layer, or given factors do not multiply to its shape.
    """

    # occurs in no base model; `tt_` does, in `att_`
    prefix = "ttcore_"
    tuner_layer_cls = TTLoraLinear

    def _attach(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        given = config.target_modules
        super()._attach(model, adapter_name, *args, **kwargs)
        config.target_modules = given  # BaseTuner writes in what all-linear means for this model

    def _prepare_model(self, peft_config: TTLoraConfig, model: nn.Module) -> None:
        """Check the targets and their factors, before any layer is replaced."""
        layers = self._targets = target_layers(peft_config, model)
        names: dict[Factors, list[str]] = {}
        for name, layer in layers.items():
            names.setdefault(factors_of(name, layer, peft_config), []).append(name)
        for key in peft_config.factors if isinstance(peft_config.factors, dict) else ():
            if not any(has_suffix(name, key) for name in layers):
                raise ValueError(
                    f"tt_lora.factors: {key!r} is none of the target modules, whose names end with {endings(layers)}."
                )
        if not peft_config.inference_mode:
            _warn_of_waste(names, peft_config.rank)
        if peft_config.is_saved:
            _warn_of_idle(idle_layers(model, layers))

    def _check_target_module_exists(self, peft_config: TTLoraConfig, key: str) -> bool:
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: TTLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(target, TTLoraLinear):
            layer = TTLoraLinear(target)
            self._replace_module(parent, target_name, layer, target)
        factors = factors_of(current_key, layer.get_base_layer(), peft_config)
        layer.update_layer(adapter_name, peft_config, factors)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        layers = self._layers()
        for layer in layers.values():  # all of them before any is merged
            layer.check_mergeable()
        if read := read_layers(self.model, layers):
            raise ValueError(
                f"an adapter of version 0.1 beside {', '.join(read)} cannot be merged: the model reads the weights of "
                "these layers where it does not call them, so that the merged model would compute something else."
            )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, for which the adapters' matrices are built once."""
        with kept_matrices():
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within it, `adapter_names` says which adapter each row gets, `__base__` being none, as for LoRA."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names: a batch can mix adapters in evaluation only; call model.eval() first.")
        unknown = sorted(set(names) - {"__base__", *self.peft_config})
        if unknown:
            raise ValueError(
                f"adapter_names: there is no adapter {', '.join(map(repr, unknown))}; there are "
                f"{', '.join(map(repr, self.peft_config))}, and '__base__'."
            )
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if getattr(self.config, "is_encoder_decoder", False) else None
        once = set() if encoder is None else set(encoder.modules())  # an encoder's rows are not repeated for the beams
        handles = [
            module.register_forward_pre_hook(_with_names(names, 1 if module in once else beams), with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (TTLoraLinear, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for adapter_name, config in self.peft_config.items():
            if config.is_saved:
                self._add_layers_of_the_file(adapter_name, config, state_dict, f"{prefix}model.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _add_layers_of_the_file(
        self, adapter_name: str, config: TTLoraConfig, state_dict: dict[str, Any], prefix: str
    ) -> None:
        """Adapt the layers that the same targets meant in version 0.1, if the adapter in this file has them."""
        own = f".{self.prefix}in_0.{adapter_name}"
        in_file = {key.removeprefix(prefix).removesuffix(own) for key in state_dict if key.endswith(own)}
        adapted = {name for name, layer in self._layers().items() if adapter_name in layer.tt_config}
        more = [n for n in layers_of_version_0_1(config, self.model) if n in in_file and n not in adapted]
        others = next(iter(self._layers().values()))
        for name in more:
            parent_name, _, child = name.rpartition(".")
            parent = self.model.get_submodule(parent_name)
            self._create_and_replace(config, adapter_name, getattr(parent, child), child, parent, name)
            layer = getattr(parent, child)
            layer.enable_adapters(not others.disable_adapters)
            layer.set_adapter(others.active_adapters, inference_mode=config.inference_mode)
        config._tensor_names = frozenset(self._tensor_names(adapter_name))
        _warn_of_idle(idle_layers(self.model, more))

    def _layers(self) -> dict[str, TTLoraLinear]:
        """The adapted layers by name in the model."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, TTLoraLinear)}

    def parameter_rows(self, adapter_name: str = "default") -> list[ParameterRow]:
        """What is trainable in the model, by part: the adapter's cores, and anything else (nothing)."""
        cores = []
        for layer in self.model.modules():
            if isinstance(layer, TTLoraLinear) and adapter_name in layer.tt_config:
                cores += [core for side in layer.cores(adapter_name) for core in side]
        return [parameter_row("cores", cores), self.row_of_others(adapter_name)]


def _warn_of_idle(layers: dict[str, str]) -> None:
    """Say that a saved adapter has parts beside layers, by name, that a new one is refused beside, for a reason."""
    if layers:
        warnings.warn(
            f"tt_lora: this adapter of version 0.1 has parts beside layers that a new one would leave out "
            f"({endings(layers)}). They are loaded, and act where the model calls the layers: "
            f"{next(iter(layers.values()))}.",
            stacklevel=2,
        )


def _with_names(names: list[str], repeats: int) -> Callable[..., tuple[tuple, dict[str, Any]]]:
    repeated = [name for name in names for _ in range(repeats)]
    return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": repeated})


def factors_of(name: str, layer: nn.Module, config: TTLoraConfig) -> Factors:
    """The factors that `config` gives the linear layer of this name.

    Raises:
        ValueError: given factors do not multiply to its shape.
    """
    in_features, out_features = linear_shape(layer)
    keys = [key for key in config.factors if has_suffix(name, key)] if isinstance(config.factors, dict) else []
    if not keys:
        return auto_factors(in_features, out_features, config.rank, config.num_cores)
    key = max(keys, key=len)  # the most specific one
    factors = Factors(tuple(config.factors[key]["in"]), tuple(config.factors[key]["out"]))
    for side, size, values in (("in", in_features, factors.inputs), ("out", out_features, factors.outputs)):
        check_product(values, size, f"tt_lora.factors: {key}.{side}: {name} has {size} {side}puts")
    return factors


def _warn_of_waste(names: dict[Factors, list[str]], rank: int) -> None:
    """Warn of factors, and name one of the layers that have them, with a cut that cannot hold the rank."""
    for factors, (name, *others) in names.items():
        lowest = min(factors.true_ranks(rank))
        if lowest < rank:
            among = f" (one of {len(others) + 1} such layers)" if others else ""
            warnings.warn(
                f"tt_lora.rank: {rank} is more than the cores {list(factors.tt_shape)} of {name}{among} can hold: one "
                f"of their cuts has rank {lowest}, and {factors.num_wasted(rank):,} of the "
                f"{factors.num_parameters(rank):,} parameters of a layer are wasted. Use a lower rank, or larger "
                "factors at the beginning of `in` and of `out`.",
                stacklevel=2,
            )
