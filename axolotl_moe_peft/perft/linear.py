"""PerftLinear: a linear layer with plain low-rank updates beside it, for what is tuned beside the blocks: attention.

Shape suffixes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..shared.linear import linear, linear_shape
from ..shared.precision import compute_dtype
from ..shared.tuner import TunerLayer, adapter_device
from .config import PerftConfig


class PerftLinear(nn.Module, TunerLayer):
    """Adds linear_alpha / linear_rank * up(down(dropout(x))) to the output of an nn.Linear or Conv1D.

    Adapter parameters, by adapter name, in float32:
        perft_linear_down (R, I), perft_linear_up (O, R).

    Args:
        base_layer: the layer to wrap; it stays as it is and is only called.
    """

    adapter_layer_names = ("perft_linear_down", "perft_linear_up")
    other_param_names = ("perft_config",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_shape(base_layer)
        self.merged_adapters = []
        self.perft_linear_down = nn.ParameterDict()
        self.perft_linear_up = nn.ParameterDict()
        self.perft_config: dict[str, PerftConfig] = {}
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, config: PerftConfig) -> None:
        """Add an adapter of this configuration, initialised as LoRA is: `up` is 0."""
        shape = {"dtype": torch.float32, "device": adapter_device(self.get_base_layer())}
        down_RI = torch.empty(config.linear_rank, self.in_features, **shape)
        bound = 1 / math.sqrt(self.in_features)
        self.perft_linear_down[adapter_name] = nn.Parameter(nn.init.uniform_(down_RI, -bound, bound))
        up_OR = torch.zeros(self.out_features, config.linear_rank, **shape)
        self.perft_linear_up[adapter_name] = nn.Parameter(up_OR)
        self.perft_config[adapter_name] = config
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the base layer and add what the active adapters compute from the same x (..., I).

        Returns:
            (..., O) in the dtype of the base layer's output.
        """
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        for adapter_name in self.active_adapters:
            if adapter_name in self.perft_config:
                output = output + self._delta(adapter_name, x).to(output.dtype)
        return output

    def _delta(self, adapter_name: str, x: Tensor) -> Tensor:
        config, dtype = self.perft_config[adapter_name], compute_dtype(x)
        dropout = config.dropout if self.training else 0.0
        z = linear(x, self.perft_linear_down[adapter_name].to(dtype), dropout=dropout)
        return F.linear(z * (config.linear_alpha / config.linear_rank), self.perft_linear_up[adapter_name].to(dtype))
