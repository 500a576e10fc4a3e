"""Calls that no prompt can be put into, each refused with what to do instead."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .config import PTMoeConfig

_PER_TOKEN_ARGUMENTS = ("token_type_ids", "cache_position", "read_index")


def check_arguments(call: dict[str, Any], several_kinds: bool) -> None:
    """Check that nothing says of each token what is not known of the prompt's.

    Args:
        call: the decoder's arguments.
        several_kinds: whether its positions may be of several kinds.
    """
    for name in _PER_TOKEN_ARGUMENTS:
        if call.get(name) is not None:
            raise ValueError(f"pt_moe: `{name}` is not supported, as it says nothing of the prompt's positions.")
    mask = call.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        shape = tuple(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
        raise ValueError(
            f"pt_moe: an attention mask of shape {shape} is not supported, as it has no room for the prompt. Give one "
            "of shape (batch, length), or none and positions that restart at every segment."
        )
    position_ids = call.get("position_ids")
    if position_ids is not None and position_ids.dim() != 2 and not (several_kinds and position_ids.dim() == 3):
        raise ValueError(
            f"pt_moe: position_ids of shape {tuple(position_ids.shape)} are not supported, only (batch, length)."
        )


def check_images(decoder: nn.Module, position_KBS: Tensor) -> None:
    """Check that there are no images in a call of a decoder whose images do not move with the text before them."""
    if bool((position_KBS != position_KBS[:1]).any()):
        raise ValueError(
            f"pt_moe: {type(decoder).__name__} is given positions of images that do not move with the text before "
            "them, or not as far as can be told, so that a prompt's are not known. Call it on text alone."
        )


def check_cache(cache: Any) -> None:
    """Check that there is room for the prompt in a cache."""
    if cache is not None and cache.is_compileable and not all(getattr(cache, "is_linear", [False])):
        raise ValueError(
            f"pt_moe: a {type(cache).__name__} has its length and its masks fixed without room for the prompt. "
            "Leave `cache_implementation` out (a DynamicCache)."
        )


def check_isolation(decoder: nn.Module, by_positions: bool, has_cache: bool, rows: int) -> None:
    """Check that positions alone keep the segments of a row apart."""
    if has_cache:
        raise ValueError("pt_moe: packed rows cannot be continued; call the model with `use_cache=False`.")
    if not by_positions:
        raise ValueError(
            f"pt_moe: {type(decoder).__name__} takes no position_ids, or does not look at them everywhere, so that "
            "nothing would keep the segments of a packed row apart. Pad the rows instead of packing them."
        )
    if "flash" in decoder.config._attn_implementation and rows > 1:
        raise ValueError(
            f"pt_moe: flash attention keeps the segments of one packed row apart, not of {rows}. Give "
            'one longer row at a time, or load the base with `attn_implementation="sdpa"`.'
        )


def check_mask_length(mask: Tensor, past: int, new: int, config: PTMoeConfig) -> None:
    """Check that a mask is for the cached tokens and the new ones."""
    if mask.shape[1] + config.num_virtual_tokens != past + new:
        raise ValueError(
            f"pt_moe: the cache holds {past} positions, {config.num_virtual_tokens} of them the prompt's, and "
            f"{new} tokens are new, but the attention mask is for {mask.shape[1]} tokens. Give a mask for all tokens, "
            "cached and new, and only the new ones as input_ids."
        )


def check_length(length: int, most: int | None, config: PTMoeConfig) -> None:
    """Check that a sequence and its prompt fit into the model's positions."""
    if most is not None and length > most:
        raise ValueError(
            f"pt_moe: a sequence of {length - config.num_virtual_tokens} tokens and its prompt of "
            f"{config.num_virtual_tokens} take {length} positions, but the model has {most}. Use sequences of at most "
            f"{most - config.num_virtual_tokens} tokens, or fewer num_virtual_tokens."
        )
