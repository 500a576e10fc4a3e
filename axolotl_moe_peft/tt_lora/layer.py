"""TTLoraLinear: a linear layer with TT-LoRA adapters beside it.

Shape suffixes: I inputs, O outputs, R rank (of the two matrices: padded).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..shared.linear import has_plain_weight, linear, linear_shape
from ..shared.precision import compute_dtype, without_autocast
from ..shared.tuner import TunerLayer, adapter_device
from .config import TTLoraConfig
from .factors import Factors

# In 16 bits a product with a dimension of 5 is not aligned, which tensor cores need; padding with zeros costs a CPU
# less than a tenth. Both matrices are kept as (R, ...): as (..., R) their gradients took a CPU twice the time at 5.
RANK_MULTIPLE = 16
_NORM_EPS = 1e-6  # the authors'


# of the running call of `generate`, by layer, adapter and dtype: no weight changes while it runs
_kept: ContextVar[dict[tuple, tuple[Tensor, Tensor]] | None] = ContextVar("kept_matrices", default=None)


@contextmanager
def kept_matrices() -> Iterator[None]:
    """Within it, matrices that are built in evaluation are kept."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


class TTLoraLinear(nn.Module, TunerLayer):
    """Adds alpha * (x @ A) @ C to the output of an nn.Linear or Conv1D, where A and C are tensor trains.

    Adapter parameters, by adapter name, in float32, with the factors m_1 .. m_K of the inputs and n_1 .. n_L of the
    outputs; interior ranks are R, those at the two ends 1:
        ttcore_in_k, k = 0 .. K-1: (rank, m_{k+1}, R), from the first end to the cut;
        ttcore_out_k, k = 0 .. L-1: (R, n_{L-k}, rank), from the cut to the other end.

    Input digits: i = i_1 + m_1 i_2 + m_1 m_2 i_3 ..., output digits likewise:
        A[i] = in_0[0, i_1] in_1[:, i_2] ...        C[:, j] = out_0[:, j_L] ... out_{L-1}[:, j_1, 0]

    Args:
        base_layer: the layer to wrap; it stays as it is and is only called, but for merging.
    """

    other_param_names = ("tt_config", "factors")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_shape(base_layer)
        self.adapter_layer_names = ()  # grows with the adapter of the most cores
        self.merged_adapters = []
        self.tt_config: dict[str, TTLoraConfig] = {}
        self.factors: dict[str, Factors] = {}
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, config: TTLoraConfig, factors: Factors) -> None:
        """Add an adapter of this configuration and these factors, and initialise it."""
        for name, shape in core_shapes(factors, config.rank).items():
            if name not in self.adapter_layer_names:
                setattr(self, name, nn.ParameterDict())
                self.adapter_layer_names += (name,)
            core = torch.empty(shape, dtype=torch.float32, device=adapter_device(self.get_base_layer()))
            getattr(self, name)[adapter_name] = nn.Parameter(core)
        self.tt_config[adapter_name] = config
        self.factors[adapter_name] = factors
        self.reset_parameters(adapter_name)
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str) -> None:
        """Initialise as `config.init` says: every core random with norm 1 (the authors' direct_init), the last 0."""
        cores_in, cores_out = self.cores(adapter_name)
        for core in (*cores_in, *cores_out):
            nn.init.kaiming_uniform_(core, a=8**0.5)
            core.div_(core.norm() + _NORM_EPS)
        if self.tt_config[adapter_name].init == "zero":
            nn.init.zeros_(cores_out[-1])

    def cores(self, adapter_name: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The adapter's input and output cores, in the order of the tensor train."""
        factors = self.factors[adapter_name]
        return tuple(
            [getattr(self, f"ttcore_{side}_{k}")[adapter_name] for k in range(len(sizes))]
            for side, sizes in zip(("in", "out"), factors)
        )

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """Call the base layer and add what the active adapters compute from the same x (..., I).

        Args:
            adapter_names: instead of the active ones, the adapter of each row of x; `__base__` is none.

        Returns:
            (..., O) in the dtype of the base layer's output.

        Raises:
            ValueError: `adapter_names` does not fit the rows, or adapters are merged.
        """
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        if adapter_names is not None:
            return self._add_by_row(output, x, adapter_names)
        for adapter_name in self.active_adapters:
            if adapter_name in self.tt_config:
                output = output + self._delta(adapter_name, x).to(output.dtype)
        return output

    def _check_adapter_names(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if self.merged:
            raise ValueError("adapter_names: adapters are merged into the base; call `unmerge_adapter` first.")
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names: {len(adapter_names)} names for {len(x)} rows of a {type(self.base_layer).__name__}. "
                "Give one for each row of the batch; layers that get the tokens of all rows in one, as the experts of "
                "an MoE do, cannot tell rows apart."
            )

    def _add_by_row(self, output: Tensor, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        for adapter_name in sorted({*adapter_names} & {*self.tt_config}):
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter_name], device=x.device)
            output = output.index_add(0, rows, self._delta(adapter_name, x[rows]).to(output.dtype))
        return output

    def _delta(self, adapter_name: str, x: Tensor) -> Tensor:
        down_RI, up_RO = self._matrices(adapter_name, compute_dtype(x))
        return linear(x, down_RI, dropout=self.tt_config[adapter_name].dropout if self.training else 0.0) @ up_RO

    def _matrices(self, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled() or (kept := _kept.get()) is None:
            return self._build(adapter_name, dtype)
        key = (self, adapter_name, dtype)
        if key not in kept:
            kept[key] = self._build(adapter_name, dtype)
        return kept[key]

    def _build(self, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        down_RI, up_RO = build_matrices(*self.cores(adapter_name), self.tt_config[adapter_name].alpha)
        padding = (0, 0, 0, -len(down_RI) % RANK_MULTIPLE)
        return F.pad(down_RI, padding).to(dtype), F.pad(up_RO, padding).to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base layer's weight, in its layout and dtype."""
        return self._delta_weight(adapter).to(self.weight.dtype)

    def check_mergeable(self) -> None:
        """Raise a ValueError if the base layer's weight is quantised or of another kind that nothing is added to."""
        if not has_plain_weight(self.get_base_layer()):
            raise ValueError(
                f"a TT-LoRA cannot be merged into a quantised {type(self.get_base_layer()).__name__} (its weight is a "
                f"{type(self.weight.data).__name__} of {self.weight.dtype}), which would have to be rounded again. "
                "Load the base model in bf16 to merge; `axolotl merge-lora` does."
            )

    @torch.no_grad()
    def _delta_weight(self, adapter_name: str) -> Tensor:
        self.check_mergeable()
        down_RI, up_RO = build_matrices(*self.cores(adapter_name), self.tt_config[adapter_name].alpha)
        delta_OI = up_RO.T @ down_RI
        return delta_OI.T if isinstance(self.get_base_layer(), Conv1D) else delta_OI

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base layer's weight, which then computes them.

        Args:
            safe_merge: refuse weights that are not finite.
            adapter_names: which; None: the active ones.

        Raises:
            ValueError: with `safe_merge`, the merged weight would not be finite; it is left as it was.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.tt_config:
                merged = self.weight.data + self._delta_weight(adapter_name)  # in float32 if the weight is narrower
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(
                        f"merging adapter {adapter_name!r} gives weights that are not finite: it is broken. Nothing "
                        "was merged into this layer."
                    )
                self.weight.data.copy_(merged)
                self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Subtract the merged adapters from the base layer's weight again, which is exact but for rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            if adapter_name in self.tt_config:
                self.weight.data.copy_(self.weight.data - self._delta_weight(adapter_name))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


def core_shapes(factors: Factors, rank: int) -> dict[str, tuple[int, int, int]]:
    """Names and shapes of the cores, in the order of the tensor train."""
    names = [f"ttcore_in_{k}" for k in range(len(factors.inputs))]
    names += [f"ttcore_out_{k}" for k in range(len(factors.outputs))]
    ranks = [1, *[rank] * (len(names) - 1), 1]
    return {name: (ranks[k], size, ranks[k + 1]) for k, (name, size) in enumerate(zip(names, factors.tt_shape))}


def build_matrices(cores_in: list[Tensor], cores_out: list[Tensor], alpha: float) -> tuple[Tensor, Tensor]:
    """A transposed (R, I) and alpha * C (R, O), in float32 or wider. Differentiable by the cores."""
    # in bfloat16 the rounding of each core would add up; under autocast the products would be in bfloat16 all the same
    with without_autocast(cores_in[0].device):
        down_RI = _contract([core.permute(2, 1, 0) for core in reversed(cores_in)])
        return down_RI, alpha * _contract(cores_out)


def _contract(cores: list[Tensor]) -> Tensor:
    """The matrix (R, product of the sizes) of cores (R, size, rank) .. (rank, size, 1); the last digit is fastest."""
    cores = [core.to(torch.promote_types(core.dtype, torch.float32)) for core in cores]
    matrix = cores[-1].flatten(1)
    for core in reversed(cores[:-1]):
        matrix = (core.flatten(0, 1) @ matrix).view(len(core), -1)
    return matrix
