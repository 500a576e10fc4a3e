"""Where tokens and prompts are in a batch's rows once a prompt stands before every sequence.

Shape suffixes: B rows, S their length, L their length with the prompts in, Q sequences (rows, or the segments of
packed rows), T virtual tokens, D model width, K kinds of positions (mrope).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.batches import Sequences


@dataclass(frozen=True)
class Layout:
    """Where things are in the rows with the prompts in; positions in the flattened rows (B * L).

    A prompt comes directly before its sequence's first token, so padding stays outside on either side. Rows with
    fewer sequences than others are filled up at their end.

    With prompts of two tokens (P, Q) before two packed sequences (a b c, d e) in one row, and before one sequence that
    is padded on the left (. f g h i) in the other:

        tokens (B, S)    a b c d e                index_BS      0 0 0 1 1
                         . f g h i                             -1 2 2 2 2
        rows (B, L)      P Q a b c P Q d e        position_BL   0 1 2 3 4 0 1 2 3
                         . P Q f g h i - -                      0 0 1 2 3 4 5 0 0
        token_BS         2 3 4 7 8                prompt_QT     0 1, 5 6, 10 11
                         9 12 13 14 15

    so B = 2, S = 5, L = 5 + 2 * 2 = 9 (- fills up), the second row begins at 9 in the flattened rows, and the longest
    sequence has 6 positions.

    Attributes:
        shape: (B, L).
        index_BS: the number of each token's sequence; -1 for padding.
        token_BS: where each token went.
        prompt_QT: where the prompts are.
        position_BL: counts from 0 at each prompt's start; 0 for padding, which so is a segment of its own.
        longest: of the sequences, prompt included.
        isolated: more than one sequence in a row, or padding, so that positions have to keep them apart if no
            attention mask does.
        packed: more than one sequence in a row.
    """

    shape: tuple[int, int]
    index_BS: Tensor
    token_BS: Tensor
    prompt_QT: Tensor
    position_BL: Tensor
    longest: int
    isolated: bool
    packed: bool

    @classmethod
    def of(cls, sequences: Sequences, num_virtual_tokens: int) -> Layout:
        """The layout of a batch with a prompt of so many tokens before each of its sequences."""
        index_BS = sequences.index_BS
        batch, length = index_BS.shape
        starts_BS = index_BS >= 0
        starts_BS[:, 1:] &= index_BS[:, 1:] != index_BS[:, :-1]
        ordinal_BS = starts_BS.cumsum(1)
        slot_BS = torch.arange(length, device=index_BS.device) + num_virtual_tokens * ordinal_BS
        begin_Q = slot_BS[starts_BS] - num_virtual_tokens
        position_BS = torch.where(index_BS >= 0, slot_BS - F.pad(begin_Q, (0, 1))[index_BS], 0)
        most, longest, padding = torch.stack(
            [ordinal_BS[:, -1].max(), position_BS.max() + 1, (index_BS < 0).sum()]
        ).tolist()
        shape = (batch, length + num_virtual_tokens * most)
        row_B1 = torch.arange(batch, device=index_BS.device).unsqueeze(1) * shape[1]
        token_BS = slot_BS + row_B1
        within_T = torch.arange(num_virtual_tokens, device=index_BS.device)
        prompt_QT = token_BS[starts_BS].unsqueeze(1) - num_virtual_tokens + within_T
        position = index_BS.new_zeros(shape).flatten()
        position[token_BS] = position_BS
        position[prompt_QT] = within_T
        isolated, packed = most > 1 or padding > 0, most > 1
        return cls(shape, index_BS, token_BS, prompt_QT, position.view(shape), longest, isolated, packed)

    def insert(self, embeds_BSD: Tensor, prompts_QTD: Tensor) -> Tensor:
        """Embeddings (B, S, D) with the prompts (Q, T, D), of one dtype, where they belong: (B, L, D)."""
        # one selection, of which backward needs no rows; the last is what fills up
        parts = [embeds_BSD.flatten(0, 1), prompts_QTD.flatten(0, 1), embeds_BSD.new_zeros(1, embeds_BSD.shape[-1])]
        rows = torch.cat(parts)
        places = torch.cat([self.token_BS.flatten(), self.prompt_QT.flatten()])
        source = places.new_full((self.shape[0] * self.shape[1],), len(rows) - 1)
        source[places] = torch.arange(len(places), device=places.device)
        return rows.index_select(0, source).view(*self.shape, -1)

    def move(self, position_KBS: Tensor) -> Tensor:
        """Positions of several kinds with those of the prompts, text that moves all that follows it: (K, B, L)."""
        position_KBS = position_KBS.expand(-1, self.index_BS.shape[0], -1)
        count = self.prompt_QT.shape[1]
        rows = position_KBS.new_zeros(len(position_KBS), self.shape[0] * self.shape[1])
        rows[:, self.token_BS] = position_KBS
        first_KQ = rows[:, self.prompt_QT[:, -1] + 1]
        moved_KBS = position_KBS - F.pad(first_KQ, (0, 1))[:, self.index_BS] + count
        rows[:, self.token_BS] = moved_KBS.masked_fill(self.index_BS < 0, 0)
        rows[:, self.prompt_QT] = torch.arange(count, device=rows.device)
        return rows.view(-1, *self.shape)

    def ahead(self, position_KBL: Tensor) -> Tensor:
        """How far the positions of each row, after `move`, are ahead of the number of its tokens: int64 (B,).

        Images make them fall behind (or run ahead), and text that follows goes on from there. The first of four kinds
        is the text's own count.
        """
        position_KBL = position_KBL[1:] if len(position_KBL) == 4 else position_KBL
        return position_KBL.amax((0, 2)) - self.position_BL.amax(1)

    def grow_mask(self, mask_BS: Tensor, of_prompts: int = 1) -> Tensor:
        """An attention mask (B, S) with ones for the prompts, or another one with what they are in it: (B, L)."""
        mask = mask_BS.new_zeros(self.shape).flatten()
        mask[self.token_BS] = mask_BS
        mask[self.prompt_QT] = of_prompts
        return mask.view(self.shape)

    def ends(self) -> Tensor:
        """Where each row's prompt ends, of rows with one sequence at most: int64 (B,), 0 without one."""
        last_Q = self.prompt_QT[:, -1]
        return last_Q.new_zeros(self.shape[0]).index_copy(0, last_Q // self.shape[1], last_Q % self.shape[1] + 1)

    def strip(self, output: Any) -> Any:
        """Take the prompts' positions out of (B, L, ...) states and (B * L, ...) router logits, tuples of them too."""
        if isinstance(output, tuple):
            return tuple(self.strip(part) for part in output)
        if not isinstance(output, Tensor):
            return output
        if output.dim() == 3 and output.shape[:2] == self.shape:
            # not output[...]: the gradient of that adds up repeated indices, which takes longer
            return output.flatten(0, 1).index_select(0, self.token_BS.flatten()).view(*self.token_BS.shape, -1)
        if output.dim() == 2 and len(output) == self.shape[0] * self.shape[1]:
            return output[self.token_BS.flatten()]
        return output


def insert_ones(mask_BS: Tensor, count: int) -> Tensor:
    """Insert `count` ones directly before each row's first token: 0 1 1 and two become 0 1 1 1 1."""
    first_B1 = (mask_BS > 0).int().argmax(1, keepdim=True)
    position = torch.arange(mask_BS.shape[1] + count, device=mask_BS.device)
    prompt = (position >= first_B1) & (position < first_B1 + count)
    source = torch.where(position < first_B1, position, position - count).clamp(min=0)
    return mask_BS.gather(1, source).masked_fill(prompt, 1)
