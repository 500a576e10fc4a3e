"""TTLoraPoolHead: the classification heads of a pool's experts, of which each sequence gets its expert's.

Shape suffixes: B rows, S tokens, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn

from ..shared.tuner import TunerLayer
from .layer import RunningChoices

# Of a class that the chosen expert does not have. Finite, unlike the authors' -inf: with that the loss over a set is
# inf as soon as one of its rows is routed to an expert with fewer classes than its label.
NO_CLASS = -1e4


class TTLoraPoolHead(nn.Module, TunerLayer):
    """Computes the logits of each sequence's expert, with its own number of classes; the others are `NO_CLASS`.

    Adapter parameter, by adapter name, frozen:
        ttmoe_heads: a vector, float32: the heads of all experts, expert by expert as in the config, each a matrix
            (classes, H), or (classes, H + 1) with the bias behind the weight, and flattened.

    Args:
        base_layer: the base's own head, which computes where no expert does.
        choices: the experts of the running calls.
    """

    adapter_layer_names = ("ttmoe_heads",)
    other_param_names = ("num_classes",)

    def __init__(self, base_layer: nn.Linear, choices: RunningChoices) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.choices = choices
        self.merged_adapters = []
        self.frozen_peft_weight_names = {}
        self.ttmoe_heads = nn.ParameterDict()
        self.num_classes: dict[str, list[int]] = {}
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, num_classes: Sequence[int], heads: Tensor | None) -> None:
        """Add the heads of a pool, with these numbers of classes; None where they are about to be loaded."""
        if heads is None:
            heads = torch.zeros(sum(num_classes) * self._width)
        heads = heads.to(device=self.weight.device, dtype=torch.float32)
        self.ttmoe_heads[adapter_name] = nn.Parameter(heads, requires_grad=False)
        self.frozen_peft_weight_names[adapter_name] = ("ttmoe_heads",)
        self.num_classes[adapter_name] = list(num_classes)
        self.set_adapter(self.active_adapters)

    def add_expert(self, adapter_name: str, num_classes: int, head: Tensor) -> None:
        """Put one more expert's head behind those of the pool, which stay as they are."""
        old = self.ttmoe_heads[adapter_name].data
        self.update_layer(adapter_name, [*self.num_classes[adapter_name], num_classes], torch.cat([old, head.to(old)]))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, S, C) of hidden states (B, S, H), or (B, C) of (B, H): of the chosen experts, or of the base."""
        for adapter_name, choice in self.choices.by_adapter.items():
            if adapter_name in self.num_classes:
                return self._logits(adapter_name, choice.expert_BS, choice.distinct, x)
        return self.base_layer(x, *args, **kwargs)

    def _logits(self, adapter_name: str, expert_BS: Tensor, distinct: list[int], x: Tensor) -> Tensor:
        num_classes = self.num_classes[adapter_name]
        heads = self.ttmoe_heads[adapter_name].split([classes * self._width for classes in num_classes])
        expert = expert_BS.unsqueeze(-1) if x.dim() == 3 else expert_BS
        logits = x.new_full((*x.shape[:-1], self.out_features), NO_CLASS)
        for e in distinct:
            head_CH = heads[e].view(num_classes[e], self._width).to(x.dtype)
            weight_CH, bias_C = head_CH[:, : self.in_features], head_CH[:, self.in_features :].squeeze(-1)
            own = F.linear(x, weight_CH, bias_C if bias_C.dim() == 1 else None)
            own = F.pad(own, (0, self.out_features - num_classes[e]), value=NO_CLASS)
            logits = torch.where(expert == e, own, logits)
        return logits

    @property
    def _width(self) -> int:
        return self.in_features + (self.base_layer.bias is not None)


def head_name(model: nn.Module) -> str | None:
    """The name of a classifier's head; None of a model that classifies nothing."""
    for name in SEQ_CLS_HEAD_NAMES:
        head = getattr(model, name, None)
        head = head.base_layer if isinstance(head, TTLoraPoolHead) else head
        if isinstance(head, nn.Linear):
            return name
    return None
