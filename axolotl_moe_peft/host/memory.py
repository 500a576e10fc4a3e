"""The memory of a run before it: base model, adapter, gradients, optimiser and activations, beside the GPU's."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from huggingface_hub import HfApi
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import register_parametrization
from transformers import Trainer, TrainingArguments

from ..registration import METHODS
from ..shared import step_memory
from ..shared.summary import format_columns, format_size
from .attach import peft_config
from .base_model import attach_without_weights, model_without_weights
from .quantised import close_cache, stacked_experts

LOG = get_logger(__name__)

_LATER = "its memory is known once it is loaded."
_BLOCK = 64  # weights that share one scale in bitsandbytes' 4 bits
_FUSED_LOSSES = ("liger_fused_linear_cross_entropy", "cut_cross_entropy", "chunked_cross_entropy")


@dataclass(frozen=True)
class Part:
    """What one kind of tensors takes on each process.

    Attributes:
        name: e.g. activations.
        bytes: None if it cannot be told.
        remark: what the number holds for.
    """

    name: str
    bytes: int | None
    remark: str = ""


def estimate(cfg: DictDefault) -> list[Part]:
    """The parts of a training run's memory on each process, found without loading weights.

    What CUDA itself takes is not in it, nor what its allocator loses to fragmentation, nor images, nor the prompts of
    a packed row but the first; activations that `activation_offloading` moves away are.

    Args:
        cfg: the validated YAML, whose `adapter` is one of this package.

    Raises:
        ValueError: the base's architecture is not one of transformers' language models, or is not without values.
    """
    base = _empty(cfg)
    if base is None:
        raise ValueError(f"base_model: {cfg.base_model!r} is built by code of its own or for classification; {_LATER}")
    base_bytes, base_remark = base_size(base, cfg)
    try:
        trained = [p for p in attach_without_weights(base, cfg).parameters() if p.requires_grad]
    except NotImplementedError:
        raise ValueError(f"base_model: the code of {type(base).__name__} asks for values; {_LATER}") from None
    gradients = sum(p.nbytes for p in trained)
    activations = _activations(cfg, gradients)
    other = _activations(_with(cfg, gradient_checkpointing=not cfg.gradient_checkpointing), gradients)
    if activations is None or other is None:
        step = "not known before, with `rl:` or where the base's code reads values"
    else:
        with_it, without = ("without", "with")[:: -1 if cfg.gradient_checkpointing else 1]
        step = (
            f"{cfg.micro_batch_size} x {cfg.sequence_len} tokens, {with_it} gradient checkpointing "
            f"({format_size(other)} {without})"
        )
    states, optimizer = _optimizer_states(cfg, trained)
    return [
        Part("base model", base_bytes, base_remark),
        Part("adapter", gradients, f"{sum(p.numel() for p in trained):,} parameters"),
        Part("gradients", gradients),
        Part("optimiser", states, optimizer),
        Part("activations", activations, step),
    ]


def report(cfg: DictDefault) -> str:
    """The table, and what keys would make of the total.

    Raises:
        ValueError: the adapter is none of this package, or as `estimate` does.
    """
    if cfg.adapter not in METHODS:
        raise ValueError(f"adapter: {cfg.adapter!r} is none of this package; use one of {', '.join(METHODS)}.")
    parts = estimate(cfg)
    others = [f"with {keys}: {format_size(size)}" for keys, size in _with_other_keys(cfg, parts)]
    return "\n".join([format_parts(parts), *others])


def log_estimate(cfg: DictDefault, free: int | None) -> None:
    """Log the table of a run that begins, and warn if the GPU's memory will not hold it.

    Args:
        cfg: as in `estimate`.
        free: bytes of the GPU's memory that are free; None without one.
    """
    try:
        parts = estimate(cfg)
    except ValueError as error:
        LOG.info("%s", error)
        return
    LOG.info("memory that training will take on each process, estimated:\n%s", format_parts(parts))
    total = total_bytes(parts)
    if free is not None and total > free:
        less = [entry for entry in _with_other_keys(cfg, parts) if entry[1] < total][:2]
        LOG.warning(
            "it will not fit: about %s are needed, %s of the GPU are free. What helps most: %s",
            format_size(total),
            format_size(free),
            ", ".join(f"`{keys}` (then {format_size(size)})" for keys, size in less) or "a smaller base model",
        )


def free_memory() -> int | None:
    """Bytes that are free on this process's GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]


def format_parts(parts: list[Part]) -> str:
    """The table of the parts and their sum, one line each."""
    unknown = any(part.bytes is None for part in parts)
    rows = [(p.name, "?" if p.bytes is None else format_size(p.bytes), p.remark) for p in parts]
    rows.append(("total", format_size(total_bytes(parts)), "and what is not known" if unknown else ""))
    return format_columns(rows, right=(1,))


def total_bytes(parts: list[Part]) -> int:
    """The sum of what is known."""
    return sum(part.bytes or 0 for part in parts)


def _with(cfg: DictDefault, **keys: Any) -> DictDefault:
    return DictDefault({**cfg, **keys})


def _with_other_keys(cfg: DictDefault, parts: list[Part]) -> list[tuple[str, int]]:
    """What other keys would make of the total: they as they stand in a YAML, and the total then; the least first."""
    sizes = {part.name: part.bytes for part in parts}
    found = []
    for keys in _other_keys(cfg):
        other = _with(cfg, **keys)
        if "load_in_4bit" in keys:
            size = total_bytes(estimate(other))
        elif sizes["activations"] is None:
            continue
        else:
            size = total_bytes(parts) - sizes["activations"] + _activations(other, sizes["gradients"])
        found.append((", ".join(f"{key}: {str(value).lower()}" for key, value in keys.items()), size))
    return sorted(found, key=lambda entry: entry[1])


def _other_keys(cfg: DictDefault) -> Iterator[dict[str, Any]]:
    if not cfg.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if cfg.micro_batch_size > 1:
        yield {"micro_batch_size": cfg.micro_batch_size // 2}
    yield {"sequence_len": cfg.sequence_len // 2}
    base = _empty(cfg)
    if cfg.fsdp_config or cfg.deepspeed or cfg.load_in_8bit or _is_stored_quantised(base):
        return
    quantised = {"load_in_4bit": True}
    if next(stacked_experts(base), None):
        quantised["quantize_moe_experts"] = True
    if not all(cfg[key] for key in quantised):
        yield quantised


def _empty(cfg: DictDefault, attention: str | None = None) -> nn.Module | None:
    with torch.device("meta"):
        return model_without_weights(cfg, dtype=cfg.torch_dtype, attn_implementation=attention)


def base_size(model: nn.Module, cfg: DictDefault) -> tuple[int | None, str]:
    """Bytes of the base as it is loaded, and as what."""
    count = sum(p.numel() for p in model.parameters())
    remark = f"{count:,} parameters, {str(next(model.parameters()).dtype).removeprefix('torch.')}"
    if _is_stored_quantised(model) and not cfg.model_quantization_config:
        return _stored_bytes(cfg.base_model), f"{remark}, as they are stored"
    sizes = {id(p): p.nbytes for p in (*model.parameters(), *model.buffers())}
    sizes |= {id(p): _quantised_bytes(p, cfg) for p in _quantised(model, cfg)}
    size = sum(sizes.values())
    if next(_quantised(model, cfg), None) is not None:
        remark += f", {8 if cfg.load_in_8bit else 4} bits where it is quantised"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.fsdp_config and processes > 1:
        # each has its part of all layers, and one or two whole layers while they run
        largest = max((sum(p.nbytes for p in layer.parameters()) for layer in _layers(model)), default=0)
        return size // processes + 2 * largest, f"{remark}, divided by {processes} processes, and two whole layers"
    return size, remark


def _is_stored_quantised(model: nn.Module) -> bool:
    return bool(getattr(model.config, "quantization_config", None))


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.get_text_config().num_hidden_layers:
            yield from module
            return


def _quantised(model: nn.Module, cfg: DictDefault) -> Iterator[nn.Parameter]:
    """The parameters that are quantised while they are loaded."""
    # of a base that is dequantised while it loads, the experts alone
    if (cfg.load_in_4bit or cfg.load_in_8bit) and not cfg.model_quantization_config:
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                yield module.weight
    if cfg.quantize_moe_experts:
        yield from (parameter for _, parameter in stacked_experts(model))


def _quantised_bytes(parameter: nn.Parameter, cfg: DictDefault) -> int:
    count = parameter.numel()
    if cfg.load_in_8bit:
        return count + 4 * count // parameter.shape[-1]
    # double quantisation stores a scale in a byte, and one in float32 for every 256 of them
    scales = 4.0 if (cfg.bnb_config_kwargs or {}).get("bnb_4bit_use_double_quant") is False else 1 + 4 / 256
    return math.ceil(count * (0.5 + scales / _BLOCK))


def _stored_bytes(base_model: str) -> int | None:
    """Bytes of a checkpoint's weights, of which nothing is read."""
    if Path(base_model).is_dir():
        return sum(path.stat().st_size for path in Path(base_model).glob("*.safetensors"))
    try:
        files = HfApi().model_info(base_model, files_metadata=True).siblings
    except Exception:  # no network, no access: told as not known
        return None
    # some repositories keep a second copy of the weights in a folder
    return sum(f.size or 0 for f in files if f.rfilename.endswith(".safetensors") and "/" not in f.rfilename)


def _activations(cfg: DictDefault, gradients: int) -> int | None:
    """What a micro-batch's forward and backward pass takes beside its gradients; None if it cannot be told."""
    if cfg.rl:
        return None
    try:
        peak = _peak(cfg)
    except Exception:  # the family's code asks for values, or for what only its own attention has: told as not known
        return None
    # the peak holds the gradients that the step makes; accumulated ones are there beside it
    return max(0, peak - gradients) if (cfg.gradient_accumulation_steps or 1) == 1 else peak


def _peak(cfg: DictDefault) -> int:
    config = peft_config(cfg)
    try:
        model = _empty(cfg, "eager" if cfg.attn_implementation == "eager" else step_memory.ATTENTION)
    except ValueError:  # families that have attention of their own only
        model = _empty(cfg)
    with contextlib.suppress(ValueError):  # families whose experts are a loop
        model.set_experts_implementation("grouped_mm")
    if cfg.quantize_moe_experts:
        _dequantise_on_access(model)
    length, step = cfg.sequence_len, step_memory.loss_of_logits
    if any(cfg[key] for key in _FUSED_LOSSES):
        step = step_memory.loss_of_hidden_states
    model.requires_grad_(False)
    if config.loss_of_its_own:
        step = step_memory.hidden_states_only
    elif config.positions_before_text:  # a prompt takes next to nothing but its positions
        length, step = length + config.positions_before_text, step_memory.loss_of_embeddings
    else:
        model = attach_without_weights(model, cfg)
    if cfg.gradient_checkpointing and not config.loss_of_its_own:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(cfg.gradient_checkpointing_kwargs or {"use_reentrant": False})
    # the run that follows has its own warnings, and its random numbers
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return step_memory.peak_bytes(model.train(), step, cfg.micro_batch_size, length)


class _Dequantise(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(weight)


def _dequantise_on_access(model: nn.Module) -> None:
    # as the host does it, so that what autograd keeps of the dequantised weights is counted
    modules = set()
    for name, _ in list(stacked_experts(model)):
        path, _, name = name.rpartition(".")
        register_parametrization(model.get_submodule(path), name, _Dequantise(), unsafe=True)
        modules.add(path)
    for path in modules:
        model.get_submodule(path).register_forward_pre_hook(_open_cache)
        model.get_submodule(path).register_forward_hook(close_cache, always_call=True)


def _open_cache(module: nn.Module, args: tuple) -> None:
    parametrize._cache_enabled += 1


def _optimizer_states(cfg: DictDefault, parameters: list[nn.Parameter]) -> tuple[int, str]:
    """Bytes of what the optimiser keeps, found by a step of it on a small matrix, and its name."""
    name = str(getattr(cfg.optimizer, "value", cfg.optimizer))
    matrix = nn.Parameter(torch.zeros(256, 256))
    matrix.grad = torch.zeros_like(matrix)
    arguments = TrainingArguments.__new__(TrainingArguments)  # its __init__ would set up the run's processes
    arguments.optim = name
    try:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = optimizer_class([matrix], **settings)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        share = (
            sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim()) / matrix.nbytes
        )
        remark = name
    except Exception:  # the host's own, those of packages that are not there, those that need a GPU
        share, remark = 2.0, f"{name}, counted as AdamW"
    return round(share * sum(p.numel() * 4 for p in parameters)), remark
