"""How the base model of a YAML is quantised: as it loads, or as it was published."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from axolotl.utils.dict import DictDefault
from torch import nn
from torch.nn.utils import parametrize
from transformers import PretrainedConfig
from transformers.quantizers import AutoHfQuantizer

# Formats that bases are published in and whose layers let gradients through: what is tested.
_TRAINED_THROUGH = ("bitsandbytes",)
# Those that transformers can dequantise while it loads, and its class for the YAML's `model_quantization_config`.
DEQUANTISED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
_UNQUANTISED = "Use the model as it is published in bf16, with `load_in_4bit: true`"


def quantise(cfg: DictDefault) -> None:
    """Let `load_in_4bit` or `load_in_8bit` mean what they do with `adapter: qlora` and `adapter: lora`."""
    if cfg.model_quantization_config:
        # what the loader takes for granted where experts are quantised and no width is given, but for its preparations
        cfg.load_in_4bit = bool(cfg.quantize_moe_experts)
    elif cfg.load_in_4bit or cfg.load_in_8bit:
        # Axolotl's loader, which quantises for its own adapters only, already holds this dict
        cfg.overrides_of_model_kwargs["quantization_config"].update(_bits_and_bytes(cfg))


def _bits_and_bytes(cfg: DictDefault) -> dict[str, Any]:
    settings: dict[str, Any] = {"load_in_8bit": True}
    if cfg.load_in_4bit:
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": cfg.torch_dtype,
            **(cfg.bnb_config_kwargs or {}),
        }
    # these families' code reads the weights of some linear layers
    skipped = {"jamba": ["mamba"], "falcon_h1": ["out_proj"]}.get(cfg.model_config_type)
    return settings | ({"llm_int8_skip_modules": skipped} if skipped else {})


def check_published_format(cfg: DictDefault, architecture: PretrainedConfig) -> None:
    """Check how the base was published against what the YAML asks for.

    Args:
        cfg: the validated YAML.
        architecture: the base's configuration.

    Raises:
        ValueError: no gradient comes through that format, it does not go with the YAML's keys, or they are of another
            format.
    """
    method = _published_method(architecture)
    if cfg.model_quantization_config and DEQUANTISED.get(method) != cfg.model_quantization_config:
        found = f"published in {method}" if method else "not quantised"
        raise ValueError(
            f"`model_quantization_config: {cfg.model_quantization_config}` dequantises a base of that format, but "
            f"{cfg.base_model!r} is {found}. Remove the key."
        )
    if method is None:
        return
    if cfg.merge_lora:
        # transformers writes a dequantised model in parts of the published format: it fails, or reads back as another
        raise ValueError(
            f"base_model: {cfg.base_model!r} is published in {method}, and an adapter merges into a base in full "
            "precision only. Nothing was written. Set `base_model` to the model as it is published in bf16, and "
            "remove `model_quantization_config`."
        )
    bits = next((key for key in ("load_in_4bit", "load_in_8bit") if cfg[key]), None)
    if method in DEQUANTISED and not cfg.model_quantization_config:
        raise ValueError(
            f"base_model: {cfg.base_model!r} is published in {method}, and no gradient comes through its kernels. "
            f"Write `model_quantization_config: {DEQUANTISED[method]}` and `model_quantization_config_kwargs: "
            "{dequantize: true}`, which loads it in bf16; with `quantize_moe_experts: true` beside them its experts "
            f"are 4-bit again as they load{f'. Remove `{bits}`' if bits else ''}."
        )
    if method in DEQUANTISED:
        _check_that_it_is_read(cfg, architecture)
    elif method not in _TRAINED_THROUGH:
        raise ValueError(
            f"base_model: {cfg.base_model!r} is published in {method}, through which no adapter of this package has "
            f"been seen to train. {_UNQUANTISED} (an MoE: and `quantize_moe_experts: true`), which takes as little "
            "memory."
        )
    if method in _TRAINED_THROUGH and cfg.quantize_moe_experts:
        raise ValueError(
            f"`quantize_moe_experts` does not go with {cfg.base_model!r}, which is quantised already ({method}). "
            f"{_UNQUANTISED}."
        )


def _check_that_it_is_read(cfg: DictDefault, architecture: PretrainedConfig) -> None:
    # transformers 5.16 trips over the plans for tensor parallelism that configurations of FP8 bases bring
    quantizer = AutoHfQuantizer.from_config(architecture.quantization_config)
    try:
        quantizer.update_tp_plan(copy.deepcopy(architecture))
    except AttributeError:
        raise ValueError(
            f"base_model: {cfg.base_model!r} cannot be read by transformers {transformers.__version__} in "
            f"{architecture.quantization_config['quant_method']}; 5.20 can, with axolotl 0.21. {_UNQUANTISED}."
        ) from None


def check_stacked_experts(cfg: DictDefault, model: nn.Module) -> None:
    """Check that `quantize_moe_experts` has something to quantise.

    Raises:
        ValueError: the base has no stacked experts.
    """
    if cfg.quantize_moe_experts and not any(stacked_experts(model)):
        raise ValueError(
            f"`quantize_moe_experts` does not go with {type(model).__name__}, which has no experts in stacks of three "
            "dimensions. Remove the key; `load_in_4bit` and `load_in_8bit` quantise its linear layers."
        )


def check_routers_read_float16(cfg: DictDefault, model: nn.Module) -> None:
    """Check that routers can read what the rest of the base gives them.

    The host's loader takes float16 where a base is in 8 bits and the YAML sets no precision, but keeps routers in
    float32; autocast would bring the two together.

    Raises:
        ValueError: they cannot.
    """
    if cfg.torch_dtype != torch.float16 or cfg.fp16:
        return
    key = "load_in_8bit" if cfg.load_in_8bit else "float16"
    for name, router in model.named_modules():
        if name.endswith(".gate") and not _reads_float16(router):
            raise ValueError(
                f"`{key}: true` without `bf16: true` or `fp16: true` loads {cfg.base_model!r} in float16, but its "
                f"routers ({name}) in float32, which then cannot read it. Add `bf16: true` or `fp16: true`; on a CPU, "
                "which has neither, use `load_in_4bit: true`."
            )


def _reads_float16(router: nn.Module) -> bool:
    weight = getattr(router, "weight", None)
    if weight is None or isinstance(router, nn.Linear):  # those are quantised
        return True
    router = copy.deepcopy(router).to_empty(device="cpu").float()
    try:
        router(torch.zeros(1, 1, weight.shape[-1], dtype=torch.float16))
    except RuntimeError as error:
        return "dtype" not in str(error)
    except (AttributeError, TypeError, ValueError):  # it takes more than hidden states
        pass
    return True


def check_quantised_experts(model: nn.Module) -> None:
    """Check a base loaded with `quantize_moe_experts`; experts that come to a CPU the host passes over in silence.

    Raises:
        ValueError: experts were not quantised.
    """
    left = [name for name, _ in stacked_experts(model)]
    if left or not any(map(parametrize.is_parametrized, model.modules())):
        raise ValueError(
            f"`quantize_moe_experts`: {len(left)} expert weights were not quantised ({', '.join(left[:2])} ...). "
            "Axolotl quantises them as they reach a CUDA device: train on one, and leave out `device_map`."
        )


def end_caches_with_calls(model: nn.Module) -> None:
    """Let experts forget what they dequantised when checkpointing ends the recomputation of their call early.

    bitsandbytes' own hooks and Axolotl 0.21's do. Those of Axolotl 0.19 for 8 bits are skipped then, after which
    torch's cache is never emptied and all experts of the model stay dequantised.
    """
    from axolotl.monkeypatch import moe_quant  # with bitsandbytes, which not every machine has

    for module in filter(parametrize.is_parametrized, model.modules()):
        for key, hook in list(module._forward_hooks.items()):
            if hook is moe_quant._disable_parametrization_cache and key not in module._forward_hooks_always_called:
                del module._forward_hooks[key]
                module.register_forward_hook(close_cache, always_call=True)


def close_cache(module: nn.Module, args: tuple, output: Any) -> None:
    """A forward hook: what a module's call has dequantised is forgotten with it."""
    # not below 0: it also comes after a call that ended before its cache was opened
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)
    if not parametrize._cache_enabled:
        parametrize._cache = {}


def stacked_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What the host's loader quantises with `quantize_moe_experts`."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 3 and parameter.is_floating_point() and "expert" in name.lower():
            yield name, parameter


def _published_method(architecture: PretrainedConfig) -> str | None:
    settings = getattr(architecture, "quantization_config", None)
    if not settings:
        return None
    settings = settings if isinstance(settings, Mapping) else settings.to_dict()
    return str(settings.get("quant_method", "bitsandbytes"))
