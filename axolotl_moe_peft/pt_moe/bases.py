"""Which base models a prompt can be put into: what the insertion assumes of one is asked of it, before it is changed.

What a model does with embeddings and positions is seen at its first layer, so that the question costs an embedding
and no more, however large the model: the pass ends there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..shared.generation import CACHE_NAMES, arguments_of
from ..shared.precision import autocast_as_in_training
from .config import PTMoeConfig
from .mrope import prompted_part, without_earlier_positions

_NEEDED_ARGUMENTS = ("inputs_embeds", "attention_mask")
# What reads token ids beside the embeddings: Gemma's embeddings per layer, DeepSeek-V4's routing by token.
_READERS_OF_IDS = ("embed_tokens_per_layer", "tid2eid")
_INSTEAD = "Use `adapter: lora`."


def check_base(model: nn.Module, config: PTMoeConfig) -> None:
    """Check that a model can have a prompt of this configuration.

    Raises:
        ValueError: it cannot, with the reason.
    """
    decoder = prompted_part(model)
    _check_kind(model, decoder)
    _check_sizes(model, config)
    weight = decoder.get_input_embeddings().weight
    if _has_values(weight):
        _check_inputs(model, decoder, weight.device)


def _has_values(weight: Tensor) -> bool:
    """Whether a pass can be made here and now; not on the meta device, nor with what ZeRO-3 has in parts."""
    return not weight.is_meta and not hasattr(weight, "ds_id")


def _check_kind(model: nn.Module, decoder: nn.Module) -> None:
    name = type(decoder).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"pt_moe: {type(model).__name__} is an encoder-decoder; the prompt goes before the text of a decoder. Use "
            "a decoder-only model, or `adapter: lora`."
        )
    taken = arguments_of(type(decoder).forward)
    missing = [n for n in _NEEDED_ARGUMENTS if n not in taken]
    if not {"past_key_values", "cache"}.intersection(taken):
        missing.append("past_key_values")
    if missing:
        raise ValueError(
            f"pt_moe: {name} takes no {', '.join(missing)}, without which no prompt can be put before its tokens. "
            + _INSTEAD
        )
    inside = [n.rpartition(".")[2] for n, _ in (*decoder.named_modules(), *decoder.named_buffers())]
    if any(name in inside for name in _READERS_OF_IDS):
        raise ValueError(
            f"pt_moe: layers of {name} read the token ids themselves, which a prompt does not have. {_INSTEAD}"
        )
    if _is_encoder(model):
        raise ValueError(
            f"pt_moe: {name} is an encoder: its first token stands for the whole text, and with a prompt that is the "
            f"prompt's. Use a decoder, or `adapter: lora`."
        )


def _is_encoder(model: nn.Module) -> bool:
    """Whether its tokens see those behind them."""
    config = model.config.get_text_config()
    if getattr(config, "is_decoder", False):
        return False
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return True
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _check_sizes(model: nn.Module, peft_config: PTMoeConfig) -> None:
    config, name = model.config.get_text_config(), type(model).__name__
    width = embedding_width(model)
    if peft_config.rank is not None and peft_config.rank > width:
        raise ValueError(
            f"pt_moe.rank: {peft_config.rank} is more than the hidden size of {name} ({width}). Use a smaller rank, "
            "or null for a prompt that is not factorised."
        )
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is not None and peft_config.num_virtual_tokens >= max_positions:
        raise ValueError(
            f"pt_moe.num_virtual_tokens: {peft_config.num_virtual_tokens} leaves no room for a text: {name} has "
            f"{max_positions} positions. Use fewer."
        )


def embedding_width(model: nn.Module) -> int:
    """D, the width of what goes into the decoder; in some models not that of its hidden states."""
    embedding = prompted_part(model).get_input_embeddings()
    return getattr(embedding, "embedding_dim", None) or embedding.weight.shape[-1]


def keeps_apart(decoder: nn.Module, kinds: int | None = None) -> bool:
    """Whether positions that begin again keep the segments of a row apart; positions (B, S), or of several kinds.

    They do where the attention mask is made of them, and where the attention itself reads them; not where neither
    does, nor in layers that go from token to token by a state (Mamba's, linear attention's, convolutions).
    """
    config = decoder.config.get_text_config()
    layers = [*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())]
    if any("attention" not in layer or "linear" in layer or "hybrid" in layer for layer in layers):
        return False
    weight = decoder.get_input_embeddings().weight
    if "position_ids" not in arguments_of(type(decoder).forward):
        return False
    if config._attn_implementation not in ("eager", "sdpa") or not _has_values(weight):
        return True
    embeds, position_BS = weight.new_zeros(1, 4, weight.shape[1]), torch.tensor([[0, 1, 0, 1]], device=weight.device)
    position_ids = position_BS if kinds is None else position_BS.expand(kinds, -1, -1)
    with _in_evaluation(decoder), torch.no_grad():
        _, arrived = _arriving(decoder, decoder, True, inputs_embeds=embeds, position_ids=position_ids)
    masks = [part for part in arrived if part is not None and part.dim() == 4 and part.shape[-2:] == (4, 4)]
    if masks:
        within, across = (2, 2), (2, 0)
        return all(bool(mask[0, 0][within] != mask[0, 0][across]) for mask in masks)
    placed = any(part is not None and part.shape == position_BS.shape and part.equal(position_BS) for part in arrived)
    return placed and _attention_keeps_apart(config._attn_implementation, position_BS, weight.dtype)


def _attention_keeps_apart(implementation: str, position_BS: Tensor, dtype: torch.dtype) -> bool:
    """Whether the attention by that name, which may not be transformers' own, looks at positions without a mask.

    Args:
        implementation: as a config has it.
        position_BS: of two segments of two tokens.
        dtype: of the model; kernels differ by it.
    """
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        return False
    layer = nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, 1
    query = torch.ones(1, 1, 4, 64, dtype=dtype, device=position_BS.device)
    value = torch.zeros_like(query)
    value[:, :, :2] = 1  # what the second segment must not see
    with torch.no_grad():
        out, *_ = ALL_ATTENTION_FUNCTIONS[implementation](layer, query, query, value, None, position_ids=position_BS)
    return not bool(out[:, 2:].any())


# ------------------------------------------------------------------------------------------------ at the first layer


def _check_inputs(model: nn.Module, decoder: nn.Module, device: torch.device) -> None:
    """Check that prompts that are put into the decoder arrive at its layers as text would."""
    ids = torch.arange(1, 4, device=device).unsqueeze(0) % decoder.get_input_embeddings().weight.shape[0]
    position_ids = torch.arange(3, device=device).unsqueeze(0)
    with _in_evaluation(model), without_earlier_positions(model), torch.no_grad():
        embeds = decoder.get_input_embeddings()(ids)  # CTRL scales those that it is given in place
        calls, from_ids = _arriving(model, decoder, input_ids=ids)
        if not calls:
            raise ValueError(
                f"pt_moe: {type(model).__name__} does not call its {type(decoder).__name__} as a whole, where the "
                f"prompt would be put in. {_INSTEAD}"
            )
        if "position_ids" in arguments_of(type(decoder).forward):
            # of the decoder, as not every model hands positions on
            _, placed = _arriving(decoder, decoder, inputs_embeds=embeds.clone(), position_ids=position_ids)
            _, unplaced = _arriving(decoder, decoder, inputs_embeds=embeds.clone())
            if not _equal(placed, unplaced):
                raise ValueError(
                    f"pt_moe: {type(decoder).__name__} does not count a text's positions 0, 1, 2, as a prompt's "
                    f"and its text's would be. {_INSTEAD}"
                )
        _, from_embeds = _arriving(model, decoder, inputs_embeds=embeds.clone())
        if not _equal(from_ids, from_embeds):
            raise ValueError(
                f"pt_moe: {type(decoder).__name__} makes something else of token ids than of their embeddings, which "
                f"is all that a prompt has. {_INSTEAD}"
            )

        if _sees_what_follows(decoder, embeds):
            implementation = model.config.get_text_config()._attn_implementation
            raise ValueError(
                f"pt_moe: with `attn_implementation: {implementation}` a token of {type(decoder).__name__} sees those "
                "behind it wherever transformers makes no mask, as of rows without padding. Use "
                "`attn_implementation: eager`."
            )


def _sees_what_follows(decoder: nn.Module, embeds: Tensor) -> bool:
    """Whether what the first layer makes of a token depends on the one behind it."""
    other = embeds.clone()
    other[:, -1] = -embeds[:, -1]
    try:
        with autocast_as_in_training(embeds):
            outputs = [_first_output(decoder, inputs_embeds=given) for given in (embeds, other)]
    except RuntimeError:
        return False  # a layer that does not run here as it is, or in this precision
    if any(output is None for output in outputs):
        return False
    before, after = (output.float()[:, :-1] for output in outputs)
    # experts that other tokens come to round otherwise
    return bool((before - after).abs().max() > 16 * torch.finfo(embeds.dtype).eps * before.abs().max())


def _first_output(decoder: nn.Module, **call: Any) -> Tensor | None:
    """The hidden states behind the first layer; None if it has others than (B, S, D)."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple, output: Any) -> None:
        found.extend(part for part in _tensors(output) if part is not None)
        raise _Arrived

    layers = [layer for module in decoder.modules() if isinstance(module, nn.ModuleList) for layer in module]
    handles = [layer.register_forward_hook(stop) for layer in layers]
    try:
        decoder(**call, use_cache=False)
    except _Arrived:
        pass
    finally:
        for handle in handles:
            handle.remove()
    shape = call["inputs_embeds"].shape
    return found[0] if found and found[0].dim() == 3 and found[0].shape[:2] == shape[:2] else None


class _Arrived(Exception):
    """A pass has come to the first layer."""


def _arriving(
    model: nn.Module, decoder: nn.Module, with_mask: bool = False, **call: Any
) -> tuple[int, list[Tensor | None]]:
    """How often the decoder was called on the way to the first layer, and the tensors that arrived there."""
    calls, arrived, handles = 0, [], []

    def count(module: nn.Module, args: tuple) -> None:
        nonlocal calls
        calls += 1

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = next(iter((*args, *kwargs.values())), None)
        if isinstance(states, Tensor) and states.is_floating_point() and states.dim() > 2:
            left_out = CACHE_NAMES if with_mask else (*CACHE_NAMES, "attention_mask")
            named = {name: kwargs[name] for name in sorted(kwargs) if name not in left_out}
            arrived.extend(_tensors((args, named)))
            raise _Arrived

    handles.append(decoder.register_forward_pre_hook(count))
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            handles += [layer.register_forward_pre_hook(stop, with_kwargs=True) for layer in module]
    try:
        arrived.extend(_tensors(model(**call, use_cache=False)))
    except _Arrived:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls, arrived


def _tensors(value: Any) -> Iterator[Tensor | None]:
    if isinstance(value, Tensor) or value is None:
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _equal(these: list[Tensor | None], those: list[Tensor | None]) -> bool:
    return len(these) == len(those) and all(
        a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
        for a, b in zip(these, those)
    )


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
