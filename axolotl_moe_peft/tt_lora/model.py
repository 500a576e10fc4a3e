"""TTLoraModel: attaches TT-LoRA adapters to the linear layers of a model."""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..shared.summary import ParameterRow, parameter_row
from ..shared.tuner import Tuner
from .config import TTLoraConfig
from .factors import Factors, auto_factors, check_product
from .layer import TTLoraLinear, linear_shape


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

    def _prepare_adapter_config(self, peft_config: TTLoraConfig, model_config: dict) -> TTLoraConfig:
        return peft_config

    def _prepare_model(self, peft_config: TTLoraConfig, model: nn.Module) -> None:
        """Check the targets and their factors, before any layer is replaced."""
        layers = target_layers(peft_config, model)
        names: dict[Factors, list[str]] = {}
        for name, layer in layers.items():
            names.setdefault(factors_of(name, layer, peft_config), []).append(name)
        for key in peft_config.factors if isinstance(peft_config.factors, dict) else ():
            if not any(_has_suffix(name, key) for name in layers):
                raise ValueError(
                    f"tt_lora.factors: {key!r} is none of the target modules, whose names end with {_endings(layers)}."
                )
        if not peft_config.inference_mode:
            _warn_of_waste(names, peft_config.rank)

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
        for layer in self.model.modules():  # all of them before any is merged
            if isinstance(layer, TTLoraLinear):
                layer.check_mergeable()

    def parameter_rows(self, adapter_name: str = "default") -> list[ParameterRow]:
        """What is trainable in the model, by part: the adapter's cores, and anything else (nothing)."""
        cores = []
        for layer in self.model.modules():
            if isinstance(layer, TTLoraLinear) and adapter_name in layer.tt_config:
                cores += [core for side in layer.cores(adapter_name) for core in side]
        own = {id(core) for core in cores}
        other = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        return [parameter_row("cores", cores), parameter_row("other", other)]


def target_layers(config: TTLoraConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that `config.target_modules` matches, by name, as they were before any adapter.

    Raises:
        ValueError: a target matches nothing, or something else than linear layers.
    """
    modules = _unwrapped_modules(model)
    linear = {name: module for name, module in modules.items() if linear_shape(module) is not None}
    targets = config.target_modules
    if targets == "all-linear":
        output_layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return {name: module for name, module in linear.items() if module is not output_layer}
    matched = {n: module for n, module in modules.items() if n and BaseTuner._check_target_module_exists(config, n)}
    if isinstance(targets, list):
        unmatched = [repr(t) for t in targets if not any(_has_suffix(name, t) for name in matched)]
    else:
        unmatched = [] if matched else [f"the regular expression {targets!r}"]
    if unmatched:
        raise ValueError(
            f"tt_lora.target_modules: {', '.join(unmatched)} matches no module of {type(model).__name__}. The "
            f"names of its linear layers end with {_endings(linear)}."
        )
    for name in matched:
        if name not in linear:
            raise ValueError(
                f"tt_lora.target_modules: {targets!r} matches {name}, which is no linear layer but "
                f"{type(matched[name]).__name__}. The names of the linear layers end with {_endings(linear)}."
            )
    return matched


def _unwrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name as they were before any adapter."""
    modules, inside = {}, ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            module = module.get_base_layer()
        modules[name] = module
    return modules


def factors_of(name: str, layer: nn.Module, config: TTLoraConfig) -> Factors:
    """The factors that `config` gives the linear layer of this name.

    Raises:
        ValueError: given factors do not multiply to its shape.
    """
    in_features, out_features = linear_shape(layer)
    keys = [key for key in config.factors if _has_suffix(name, key)] if isinstance(config.factors, dict) else []
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


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _endings(layers: dict[str, nn.Module]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
