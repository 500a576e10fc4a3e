"""PromptRouter: scores the experts for each sequence from what the base model makes of its prompt.

Shape suffixes: N sequences, E experts, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..shared.routing import router_logits
from ..shared.tuner import TunerLayer
from .config import TTLoraMoeConfig

_MLP_WIDTH = 1024  # the authors'


class PromptRouter(nn.Module, TunerLayer):
    """Logits of the experts for each sequence, in float32 (arXiv 2504.21190, section 3.3).

    Adapter parameters, by adapter name:
        ttmoe_weight: (E, H); of embedding_mlp (E, 1024);
        ttmoe_bias: (E,), embedding_linear and embedding_mlp;
        ttmoe_hidden_weight, ttmoe_hidden_bias: (1024, H) and (1024,), embedding_mlp;
        ttmoe_noise_weight, ttmoe_noise_bias: (E, H) and (E,), with router_noise.

    Args:
        hidden_size: H.
    """

    adapter_layer_names = (
        "ttmoe_weight",
        "ttmoe_bias",
        "ttmoe_hidden_weight",
        "ttmoe_hidden_bias",
        "ttmoe_noise_weight",
        "ttmoe_noise_bias",
    )

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.merged_adapters = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())

    def update_layer(self, adapter_name: str, config: TTLoraMoeConfig, device: torch.device) -> None:
        """Add a router of this configuration, initialised as nn.Linear is."""
        for name, shape in _shapes(config, self.hidden_size).items():
            getattr(self, name)[adapter_name] = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
        for name in _shapes(config, self.hidden_size):
            self._reset(name, getattr(self, name)[adapter_name].data, adapter_name)
        self._device = device
        self.set_adapter(self.active_adapters)

    def add_expert(self, adapter_name: str) -> None:
        """Score one more expert. What there was stays as it is; the new expert's rows are random."""
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters and "hidden" not in name:
                old = parameters[adapter_name]
                new = self._reset(name, torch.empty_like(old[:1]), adapter_name)
                parameters[adapter_name] = nn.Parameter(torch.cat([old.detach(), new]), old.requires_grad)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return self._device, None  # there is no base layer

    @torch.no_grad()
    def _reset(self, name: str, rows: Tensor, adapter_name: str) -> Tensor:
        fan_in = getattr(self, name.replace("bias", "weight"))[adapter_name].shape[1]
        return nn.init.uniform_(rows, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, features_NH: Tensor, adapter_name: str) -> Tensor:
        """Score the experts.

        Args:
            features_NH: base_hidden: the base model's last hidden state at each prompt's last token; else the mean of
                its embeddings.
            adapter_name: whose router.

        Returns:
            logits (N, E), float32, without noise.
        """
        x = features_NH
        if adapter_name in self.ttmoe_hidden_weight:
            x = router_logits(x, self.ttmoe_hidden_weight[adapter_name], self.ttmoe_hidden_bias[adapter_name]).relu()
        bias_E = self.ttmoe_bias[adapter_name] if adapter_name in self.ttmoe_bias else None
        return router_logits(x, self.ttmoe_weight[adapter_name], bias_E)

    def noise_std(self, features_NH: Tensor, adapter_name: str) -> Tensor:
        """Standard deviation of the noise on each logit, from the mean over the prompt (N, H): float32 (N, E)."""
        weight, bias = self.ttmoe_noise_weight[adapter_name], self.ttmoe_noise_bias[adapter_name]
        return F.softplus(router_logits(features_NH, weight, bias))


def _shapes(config: TTLoraMoeConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    num_experts, width, shapes = len(config.experts), hidden_size, {}
    if config.router == "embedding_mlp":
        width = _MLP_WIDTH
        shapes |= {"ttmoe_hidden_weight": (width, hidden_size), "ttmoe_hidden_bias": (width,)}
    shapes["ttmoe_weight"] = (num_experts, width)
    if config.router != "base_hidden":
        shapes["ttmoe_bias"] = (num_experts,)
    if config.router_noise:
        shapes |= {"ttmoe_noise_weight": (num_experts, hidden_size), "ttmoe_noise_bias": (num_experts,)}
    return shapes
