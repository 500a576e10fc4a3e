"""Where the tokens and sequences of a batch are, whatever the collator did: padding on either side, or packing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

IGNORE_INDEX = -100


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a model's labels are the next tokens; else they are classes, of rows or of tokens."""
    return LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss) is ForCausalLMLoss


def real_token_mask(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
) -> Tensor | None:
    """Tell real tokens from padding.

    With a 2-D attention mask (segment numbers included) the mask decides. Packed rows come without one: their
    positions restart at every segment, and the padding that fills the row up is a segment of its own (or several),
    first or last, of one repeated token and without a label. A text of that kind would add nothing to the loss either.

    Args:
        input_ids: (B, S), or None where embeddings are given.
        attention_mask: (B, S), 0 for padding. Other shapes (4-D, block masks) say nothing about padding here.
        position_ids: (B, S), or several kinds of positions, (3, B, S) or (4, B, S).
        labels: (B, S), -100 where there is nothing to predict. Other shapes (a class for each row) say nothing.

    Returns:
        bool (B, S), or None if every token is real as far as can be told.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask > 0
    if input_ids is None or labels is None or position_ids is None or labels.shape != input_ids.shape:
        return None
    starts = torch.ones_like(input_ids, dtype=torch.bool)
    starts[:, 1:] = _position_breaks(position_ids).expand_as(starts[:, 1:])
    # a position is filler if its segment has one token id and no label: count the segment's exceptions
    segment = starts.cumsum(dim=1) - 1
    exception = labels != IGNORE_INDEX
    exception[:, 1:] |= (input_ids[:, 1:] != input_ids[:, :-1]) & ~starts[:, 1:]
    exceptions = torch.zeros_like(input_ids).scatter_add_(1, segment, exception.to(input_ids.dtype))
    text = exceptions.gather(1, segment) > 0
    # at an edge, and all in a row there: a collator may give every position of the padding the same number
    return (text.cumsum(dim=1) > 0) & (text.flip(1).cumsum(dim=1).flip(1) > 0)


def _position_breaks(position_ids: Tensor) -> Tensor:
    """Where a token does not go on from the one before: bool (B, S - 1)."""
    if position_ids.dim() == 3 and len(position_ids) == 4:
        position_ids = position_ids[0]  # those of the text, before time, height and width
    if position_ids.dim() == 2:
        return position_ids[:, 1:] != position_ids[:, :-1] + 1
    # within an image time stands still, and after it text goes on behind the largest of the three
    time = position_ids[0]
    return time[:, 1:] < time[:, :-1]


def _at_zero(position_ids: Tensor) -> Tensor:
    """Where a sequence's first token is, of packed rows: bool (B, S)."""
    return position_ids == 0 if position_ids.dim() == 2 else (position_ids == 0).all(0)


@dataclass(frozen=True)
class Sequences:
    """The sequences of a batch: its rows, or the segments of packed rows. Padding belongs to none.

    Attributes:
        index_BS: int64 (B, S), the number of each token's sequence in reading order; -1 for padding.
        prompt_BS: bool (B, S), true for the tokens that a router may read.
        count: N, how many sequences there are. A row of nothing but padding has none.
    """

    index_BS: Tensor
    prompt_BS: Tensor
    count: int

    def last_prompt_token(self) -> Tensor:
        """Positions in the flattened batch (B * S) of each sequence's last prompt token: int64 (N,)."""
        positions = torch.arange(self.index_BS.numel(), device=self.index_BS.device)
        last = positions.new_zeros(self.count + 1).scatter_reduce(0, self._prompt_slots(), positions, "amax")
        return last[:-1]

    def prompt_mean(self, x_BSD: Tensor) -> Tensor:
        """Mean of x (B, S, D) over each sequence's prompt tokens: float32 (N, D)."""
        slots = self._prompt_slots()
        sums = x_BSD.new_zeros(self.count + 1, x_BSD.shape[-1], dtype=torch.float32)
        sums = sums.index_add(0, slots, x_BSD.flatten(0, 1).float())
        counts = sums.new_zeros(self.count + 1).index_add(0, slots, torch.ones_like(slots, dtype=torch.float32))
        return sums[:-1] / counts[:-1].unsqueeze(-1)

    def _prompt_slots(self) -> Tensor:
        """Each token's sequence, (B * S,); what is not prompt goes to a slot of its own behind the last."""
        return torch.where(self.prompt_BS, self.index_BS, self.count).flatten()


def find_sequences(batch: Mapping[str, Any], router_input: str = "prompt") -> Sequences:
    """Find the sequences of a batch and the prompt of each, which is what a per-sequence router reads.

    A sequence begins with a row's first real token, and in packed rows where the positions restart at 0 or the number
    in the attention mask changes. Its prompt ends before its first supervised label; without labels (generation) it
    is the whole sequence.

    Args:
        batch: the arguments of the model's call: input_ids (B, S) or inputs_embeds (B, S, D), and if given
            attention_mask, position_ids and labels, each (B, S); positions of several kinds are (3 or 4, B, S).
        router_input: prompt, or sequence for all real tokens whatever the labels.

    Raises:
        ValueError: a sequence begins with a supervised label, so that there is no prompt to read.
    """
    attention_mask, position_ids, labels = (batch.get(k) for k in ("attention_mask", "position_ids", "labels"))
    input_ids = batch.get("input_ids")
    tokens_BS = input_ids if input_ids is not None else batch["inputs_embeds"][..., 0]
    real_BS = real_token_mask(input_ids, attention_mask, position_ids, labels)
    if real_BS is None:
        real_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    starts_BS = real_BS & (real_BS.cumsum(1) == 1)
    if position_ids is not None:
        starts_BS |= real_BS & _at_zero(position_ids)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        starts_BS[:, 1:] |= real_BS[:, 1:] & real_BS[:, :-1] & (attention_mask[:, 1:] != attention_mask[:, :-1])
    index_BS = (starts_BS.flatten().cumsum(0) - 1).view_as(starts_BS)
    if labels is None or router_input == "sequence":
        prompt_BS = real_BS
    else:
        supervised = ((labels != IGNORE_INDEX) & real_BS).flatten().long()
        before = supervised.cumsum(0) - supervised
        # how many labels came before the sequence: their number at its start, which never falls
        before_start = torch.where(starts_BS.flatten(), before, 0).cummax(0).values
        prompt_BS = real_BS & (before + supervised == before_start).view_as(starts_BS)
    count, without_prompt = torch.stack([starts_BS.sum(), (starts_BS & ~prompt_BS).sum()]).tolist()
    if without_prompt:
        raise ValueError(
            f"{without_prompt} of {count} sequences have a label on their first token, so there is no prompt that the "
            "router could read (`router_input: prompt`). Mask the prompts (`train_on_inputs: false`, a `type:` with "
            "prompts instead of completion), or let the router read whole sequences with `router_input: sequence`, "
            "in training and at inference."
        )
    return Sequences(torch.where(real_BS, index_BS, -1), prompt_BS, count)
