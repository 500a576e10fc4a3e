"""TTLoraPoolLinear: a linear layer with a pool of frozen low-rank experts beside it, one of them for each sequence.

Shape suffixes: B rows, S tokens, I inputs, O outputs, P ranks of the chosen experts side by side (padded).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..shared.generation import PerThread
from ..shared.linear import linear_shape
from ..shared.precision import compute_dtype
from ..shared.tuner import TunerLayer, adapter_device
from ..tt_lora.layer import RANK_MULTIPLE, build_matrices


@dataclass(frozen=True)
class ExpertShapes:
    """What one expert's part of a module's `ttmoe_cores` means.

    Attributes:
        cores_in, cores_out: shapes of the input and output cores, in the order of the tensor train.
        alpha: multiplies what they add.
    """

    cores_in: tuple[tuple[int, int, int], ...]
    cores_out: tuple[tuple[int, int, int], ...]
    alpha: float

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.cores_in + self.cores_out))

    def matrices(self, cores: Tensor) -> tuple[Tensor, Tensor]:
        """A transposed (rank, I) and alpha * C (rank, O) of these cores, a vector."""
        shapes = self.cores_in + self.cores_out
        parts = [part.view(shape) for part, shape in zip(cores.split([math.prod(s) for s in shapes]), shapes)]
        return build_matrices(parts[: len(self.cores_in)], parts[len(self.cores_in) :], self.alpha)


# of an expert that leaves a layer alone
NO_CORES = ExpertShapes((), (), 0.0)


@dataclass(frozen=True, eq=False)
class Choice:
    """The experts of one batch.

    Attributes:
        expert_BS: int64 (B, S), or (B, 1) where every row has one: index of each token's expert, -1 for padding.
        distinct: the experts that occur, ascending.
    """

    expert_BS: Tensor
    distinct: list[int]


class RunningChoices(PerThread):
    """The choices of the call that runs in this thread, by adapter name; none while a router reads the base model."""

    by_adapter: dict[str, Choice] = {}

    def items(self) -> Iterable[tuple[str, Choice]]:
        return self.by_adapter.items()


class _Matrices(NamedTuple):
    """The chosen experts' matrices side by side, as they are for one choice and dtype."""

    choice: Choice
    dtype: torch.dtype
    down_PI: Tensor
    up_PO: Tensor
    gate_BSP: Tensor | None


class TTLoraPoolLinear(nn.Module, TunerLayer):
    """Adds alpha_e * (x @ A_e) @ C_e to the output of an nn.Linear or Conv1D, where e is the sequence's expert.

    Adapter parameter, by adapter name, frozen:
        ttmoe_cores: a vector, float32: the cores of all experts, expert by expert as in the config, each expert's
            in the order of its tensor train and flattened. An expert that leaves the layer alone has none.

    Args:
        base_layer: the layer to wrap; it stays as it is and is only called.
        choices: the experts of the batch that the model is called with. An adapter that is not in it adds nothing.
    """

    adapter_layer_names = ("ttmoe_cores",)
    other_param_names = ("experts", "_matrices")

    def __init__(self, base_layer: nn.Module, choices: RunningChoices) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_shape(base_layer)
        self.choices = choices
        self.merged_adapters = []
        self.frozen_peft_weight_names = {}
        self.ttmoe_cores = nn.ParameterDict()
        self.experts: dict[str, list[ExpertShapes]] = {}
        self._matrices: dict[str, _Matrices] = {}
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, experts: Sequence[ExpertShapes], cores: Tensor | None) -> None:
        """Add a pool of these experts.

        Args:
            adapter_name: name of the adapter.
            experts: what is in the vector.
            cores: the vector; None where it is about to be loaded.
        """
        if cores is None:
            cores = torch.zeros(sum(expert.num_parameters for expert in experts))
        cores = cores.to(device=adapter_device(self.get_base_layer()), dtype=torch.float32)
        self.ttmoe_cores[adapter_name] = nn.Parameter(cores, requires_grad=False)
        self.frozen_peft_weight_names[adapter_name] = ("ttmoe_cores",)
        self.experts[adapter_name] = list(experts)
        self.set_adapter(self.active_adapters)

    def add_expert(self, adapter_name: str, expert: ExpertShapes, cores: Tensor) -> None:
        """Put one more expert behind those of the pool, which stay as they are."""
        old = self.ttmoe_cores[adapter_name].data
        self.update_layer(adapter_name, [*self.experts[adapter_name], expert], torch.cat([old, cores.to(old)]))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the base layer and add what the batch's experts compute from the same x (..., I).

        Returns:
            (..., O) in the dtype of the base layer's output.
        """
        output = self.base_layer(x, *args, **kwargs)
        for adapter_name, choice in self.choices.items():
            experts = self.experts.get(adapter_name)
            if experts and any(experts[e].cores_in for e in choice.distinct):
                output = output + self._delta(adapter_name, choice, x).to(output.dtype)
        return output

    def _delta(self, adapter_name: str, choice: Choice, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        matrices = self._matrices.get(adapter_name)
        if matrices is None or matrices.choice is not choice or matrices.dtype != dtype:
            matrices = self._matrices[adapter_name] = self._build(adapter_name, choice, dtype)
        z = F.linear(x.to(dtype), matrices.down_PI)
        if matrices.gate_BSP is not None:
            # some blocks flatten rows and tokens
            z = (z.view(len(matrices.gate_BSP), -1, z.shape[-1]) * matrices.gate_BSP).view(z.shape)
        return z @ matrices.up_PO

    @torch.no_grad()
    def _build(self, adapter_name: str, choice: Choice, dtype: torch.dtype) -> _Matrices:
        experts = self.experts[adapter_name]
        cores = self.ttmoe_cores[adapter_name].split([expert.num_parameters for expert in experts])
        acting = [e for e in choice.distinct if experts[e].cores_in]
        pairs = [experts[e].matrices(cores[e]) for e in acting]
        ranks = [len(down) for down, _ in pairs]
        padding = -sum(ranks) % RANK_MULTIPLE
        down_PI, up_PO = (F.pad(torch.cat(side), (0, 0, 0, padding)).to(dtype) for side in zip(*pairs))
        gate_BSP = None
        if len(choice.distinct) > 1:
            ranks[-1] += padding
            # filled, not copied: a tensor that is copied to an accelerator is waited for
            experts_P = [choice.expert_BS.new_full((rank,), e) for e, rank in zip(acting, ranks)]
            expert_P = torch.cat(experts_P)
            gate_BSP = (choice.expert_BS.unsqueeze(-1) == expert_P).to(dtype)
        return _Matrices(choice, dtype, down_PI, up_PO, gate_BSP)
