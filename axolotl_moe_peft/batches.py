"""Which positions of a batch are real tokens, whatever the collator did: padding on either side, or packing."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100


def real_token_mask(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
) -> Tensor | None:
    """Tell real tokens from padding.

    With a 2-D attention mask (segment numbers included) the mask decides. Packed rows come without one: their
    positions restart at every segment, and the padding that fills the row up is a segment of its own, first or last,
    of one repeated token and without a label. A text of that kind would add nothing to the loss either.

    Args:
        input_ids: (B, S), or None where embeddings are given.
        attention_mask: (B, S), 0 for padding. Other shapes (4-D, block masks) say nothing about padding here.
        position_ids: (B, S).
        labels: (B, S), -100 where there is nothing to predict.

    Returns:
        bool (B, S), or None if every token is real as far as can be told.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask > 0
    if input_ids is None or labels is None or position_ids is None or position_ids.dim() != 2:
        return None
    position_ids = position_ids.expand_as(input_ids)
    starts = torch.ones_like(input_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    # a position is filler if its segment has one token id and no label: count the segment's exceptions
    segment = starts.cumsum(dim=1) - 1
    exception = labels != IGNORE_INDEX
    exception[:, 1:] |= (input_ids[:, 1:] != input_ids[:, :-1]) & ~starts[:, 1:]
    exceptions = torch.zeros_like(input_ids).scatter_add_(1, segment, exception.to(input_ids.dtype))
    filler = exceptions.gather(1, segment) == 0
    at_edge = (segment == 0) | (segment == segment[:, -1:])
    return ~(filler & at_edge)
