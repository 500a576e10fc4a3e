"""The units of an adapter, LoRAs or parallel adapters: which tokens go through which, and with what weight.

Shape suffixes: T tokens, D model width, N units, K units per token, S slots (see dispatch.py), R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from ..shared.dropout import Mask
from ..shared.linear import linear
from ..shared.precision import compute_dtype
from .config import PerftConfig
from .dispatch import Slots, pad_rank
from .products import gated_mm, gather_mm, scatter_mm, slots_for, tokens_at_once


class Units(NamedTuple):
    """N units of one adapter in one layer.

    Attributes:
        config: of the adapter.
        down_NRD, up_NDR: their weights.
        training: whether dropout acts.
    """

    config: PerftConfig
    down_NRD: Tensor
    up_NDR: Tensor
    training: bool

    def routed(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        indices_TK: Tensor,
        weights_scale_inputs: bool = False,
        partial: bool = False,
    ) -> Tensor:
        """Sum over each token's K units of weight * unit(x), or of unit(weight * x): (T, D).

        With `partial` some of the choices are of no unit: their index is N.
        """
        dtype, num_active = compute_dtype(x_TD), indices_TK.shape[1]
        down_NRD = self.down_NRD.to(dtype)
        linear_units = self.config.expert_type == "lora"  # of which weight * unit(x) is unit(weight * x)
        gateable = not self._input_dropout and (linear_units or not weights_scale_inputs)
        kind = slots_for(x_TD, down_NRD, num_active, gateable)
        if kind is None:
            num_units = len(down_NRD)
            gate_TN = weights_TK.new_zeros(len(x_TD), num_units + partial).scatter_add(1, indices_TK, weights_TK)
            return self._gated(x_TD, gate_TN[:, :num_units], down_NRD)
        step = tokens_at_once(kind, x_TD, down_NRD, num_active)
        parts = zip(*(tensor.split(step) for tensor in (x_TD, weights_TK, indices_TK)))
        sums = [self._by_slots(kind.of(i, len(down_NRD), partial), x, w, weights_scale_inputs) for x, w, i in parts]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def _gated(self, x_TD: Tensor, gate_TN: Tensor, down_NRD: Tensor) -> Tensor:
        z = self._bottleneck(linear(x_TD, down_NRD.flatten(0, 1)))
        return gated_mm(z, self.up_NDR.to(z.dtype).transpose(1, 2), gate_TN.to(z.dtype))

    def _by_slots(self, slots: Slots, x_TD: Tensor, weights_TK: Tensor, weights_scale_inputs: bool) -> Tensor:
        dtype = compute_dtype(x_TD)
        mask = Mask.draw(self._input_dropout) if self._input_dropout else None
        z_SR = gather_mm(x_TD, pad_rank(self.down_NRD.to(dtype)), slots, mask)
        if mask is not None:
            z_SR = z_SR * mask.scale
        # the weight 0 behind the last is that of padding
        weights_S1 = F.pad(weights_TK.flatten(), (0, 1)).index_select(0, slots.choice_S).unsqueeze(-1).to(dtype)
        if weights_scale_inputs:
            z_SR = self._bottleneck(z_SR * weights_S1)
        else:
            z_SR = self._bottleneck(z_SR) * weights_S1
        return scatter_mm(z_SR, pad_rank(self.up_NDR.to(dtype).transpose(1, 2)), slots, len(x_TD))

    def always_on(self, x_TD: Tensor) -> Tensor:
        """Sum over all N units of unit(x): (T, D)."""
        dtype = compute_dtype(x_TD)
        down_NRD, up_NDR = self.down_NRD.to(dtype), self.up_NDR.to(dtype)
        # the units' bottlenecks side by side are one bottleneck of width N * R
        if self._input_dropout:  # each unit has its own mask
            z = torch.cat([linear(x_TD, down_RD, dropout=self._input_dropout) for down_RD in down_NRD], dim=-1)
        else:
            z = linear(x_TD, down_NRD.flatten(0, 1))
        return F.linear(self._bottleneck(z), up_NDR.transpose(0, 1).flatten(1))

    @property
    def _input_dropout(self) -> float:
        return self.config.dropout if self.training and self.config.expert_type == "lora" else 0.0

    def _bottleneck(self, z: Tensor) -> Tensor:
        if self.config.expert_type == "lora":
            return z * (self.config.alpha / self.config.rank)
        return ACT2FN[self.config.hidden_act](F.dropout(z, self.config.dropout, self.training))
