"""Where a model's decoder is: its part from embeddings to last hidden states."""

from __future__ import annotations

from torch import nn

from .generation import arguments_of


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder of a model of transformers; the model itself if it is nothing more."""
    decoder = model.base_model
    if decoder is model:  # its prefix is not where its decoder is, as Llama4ForCausalLM's
        return around_embeddings(model) or model
    children = list(decoder.children())
    if len(children) == 1 and _takes_embeddings(children[0]):
        return children[0]  # the head calls what OPTModel or BartDecoderWrapper only wraps
    return decoder


def around_embeddings(model: nn.Module) -> nn.Module | None:
    """The outermost part of a model that takes embeddings and has their table."""
    table = model.get_input_embeddings()
    parts = (module for module in model.modules() if module is not model and _takes_embeddings(module))
    return next((part for part in parts if any(module is table for module in part.modules())), None)


def _takes_embeddings(module: nn.Module) -> bool:
    return "inputs_embeds" in arguments_of(type(module).forward)
