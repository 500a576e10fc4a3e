"""Where a model's decoder is: its part from embeddings to last hidden states."""

from __future__ import annotations

from torch import nn


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder of a model of transformers; the model itself if it is nothing more."""
    if model.base_model is not model:
        return model.base_model
    # a model whose prefix is not where its decoder is, as Llama4ForCausalLM's
    return model.get_decoder() or model
