"""The units of an adapter, LoRAs or parallel adapters: which tokens go through which, and with what weight.

Shape suffixes: T tokens, D model width, N units, K units per token, S = T * K slots (see dispatch.py), R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from ..shared.precision import compute_dtype
from .config import PerftConfig
from .dispatch import dispatch, gather_mm, pad_rank, scatter_mm


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
        self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, weights_scale_inputs: bool = False
    ) -> Tensor:
        """Sum over each token's K units of weight * unit(x), or of unit(weight * x): (T, D)."""
        config, dtype = self.config, compute_dtype(x_TD)
        down_NRD = pad_rank(self.down_NRD.to(dtype))
        up_NRD = pad_rank(self.up_NDR.to(dtype).transpose(1, 2))
        slots = dispatch(indices_TK, len(down_NRD))
        x, x_slots = x_TD.to(dtype), slots
        if self._drops_input:
            x = F.dropout(x[slots.token_S], config.dropout)  # each unit has its own mask
            in_order = torch.arange(len(x), device=x.device)
            x_slots = slots._replace(token_S=in_order, order_S=in_order)
        z_SR = gather_mm(x, down_NRD, x_slots)
        weights_S1 = weights_TK.flatten()[slots.order_S].unsqueeze(-1).to(dtype)
        if weights_scale_inputs:
            z_SR = self._bottleneck(z_SR * weights_S1)
        else:
            z_SR = self._bottleneck(z_SR) * weights_S1
        return scatter_mm(z_SR, up_NRD, slots, len(x_TD))

    def always_on(self, x_TD: Tensor) -> Tensor:
        """Sum over all N units of unit(x): (T, D)."""
        dtype = compute_dtype(x_TD)
        down_NRD, up_NDR, x_TD = self.down_NRD.to(dtype), self.up_NDR.to(dtype), x_TD.to(dtype)
        if self._drops_input:
            x_NTD = F.dropout(x_TD.expand(len(down_NRD), *x_TD.shape), self.config.dropout)
            z_NTR = self._bottleneck(x_NTD @ down_NRD.transpose(1, 2))
            return (z_NTR @ up_NDR.transpose(1, 2)).sum(0)
        # the units' bottlenecks side by side are one bottleneck of width N * R
        z = self._bottleneck(F.linear(x_TD, down_NRD.flatten(0, 1)))
        return F.linear(z, up_NDR.transpose(0, 1).flatten(1))

    @property
    def _drops_input(self) -> bool:
        return self.training and self.config.dropout > 0 and self.config.expert_type == "lora"

    def _bottleneck(self, z: Tensor) -> Tensor:
        if self.config.expert_type == "lora":
            return z * (self.config.alpha / self.config.rank)
        return ACT2FN[self.config.hidden_act](F.dropout(z, self.config.dropout, self.training))
