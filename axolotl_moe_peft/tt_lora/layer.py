"""TTLoraLinear: a linear layer with TT-LoRA adapters beside it.

Shape suffixes: I inputs, O outputs, R rank (of the two matrices: padded).
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..shared.tuner import TunerLayer, compute_dtype
from .config import TTLoraConfig
from .factors import Factors

# In 16 bits a product with a dimension of 5 is not aligned, which tensor cores need; padding with zeros costs a CPU
# less than a tenth. Both matrices are kept as (R, ...): as (..., R) their gradients took a CPU twice the time at 5.
RANK_MULTIPLE = 16
_NORM_EPS = 1e-6  # the authors'
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Matrices(NamedTuple):
    """Matrices built from cores in one state: of these storages (kept, so that no other takes their address)."""

    cores: list[Tensor]
    state: tuple
    down_RI: Tensor
    up_RO: Tensor


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

    other_param_names = ("tt_config", "factors", "_matrices")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_shape(base_layer)
        self.adapter_layer_names = ()  # grows with the adapter of the most cores
        self.merged_adapters = []
        self.tt_config: dict[str, TTLoraConfig] = {}
        self.factors: dict[str, Factors] = {}
        self._matrices: dict[str, _Matrices] = {}
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, config: TTLoraConfig, factors: Factors) -> None:
        """Add an adapter of this configuration and these factors, and initialise it."""
        for name, shape in core_shapes(factors, config.rank).items():
            if name not in self.adapter_layer_names:
                setattr(self, name, nn.ParameterDict())
                self.adapter_layer_names += (name,)
            core = torch.empty(shape, dtype=torch.float32, device=self.weight.device)
            getattr(self, name)[adapter_name] = nn.Parameter(core)
        self.tt_config[adapter_name] = config
        self.factors[adapter_name] = factors
        self._matrices.pop(adapter_name, None)
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the base layer and add what the active adapters compute from the same x (..., I).

        Returns:
            (..., O) in the dtype of the base layer's output.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for adapter_name in self.active_adapters:
            if adapter_name in self.tt_config:
                output = output + self._delta(adapter_name, x).to(output.dtype)
        return output

    def _delta(self, adapter_name: str, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        down_RI, up_RO = self._built(adapter_name, dtype)
        x = F.dropout(x.to(dtype), self.tt_config[adapter_name].dropout, self.training)
        return F.linear(x, down_RI) @ up_RO

    def _built(self, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two matrices in this dtype; in evaluation those of the last call, if the cores are the same."""
        cores_in, cores_out = self.cores(adapter_name)
        cores = [*cores_in, *cores_out]
        differentiable = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
        cached = not (self.training or differentiable or torch.compiler.is_compiling())
        if not cached or any(core.is_inference() for core in cores):
            return self._build(adapter_name, dtype)
        # a matrix of inference mode cannot be used where a gradient is recorded
        state = (dtype, torch.is_inference_mode_enabled(), *((core.data_ptr(), core._version) for core in cores))
        matrices = self._matrices.get(adapter_name)
        if matrices is None or matrices.state != state:
            kept = [core.detach() for core in cores]
            matrices = self._matrices[adapter_name] = _Matrices(kept, state, *self._build(adapter_name, dtype))
        return matrices.down_RI, matrices.up_RO

    def _build(self, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        down_RI, up_RO = build_matrices(*self.cores(adapter_name), self.tt_config[adapter_name].alpha)
        padding = (0, 0, 0, -len(down_RI) % RANK_MULTIPLE)
        return F.pad(down_RI, padding).to(dtype), F.pad(up_RO, padding).to(dtype)

    def train(self, mode: bool = True) -> TTLoraLinear:
        self._matrices.clear()  # sharded training changes cores in ways that their version does not tell
        return super().train(mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base layer's weight, in its layout and dtype."""
        return self._delta_weight(adapter).to(self.weight.dtype)

    def check_mergeable(self) -> None:
        """Raise a ValueError if the base layer's weight is quantised."""
        shape = (self.out_features, self.in_features)
        if isinstance(self.get_base_layer(), Conv1D):
            shape = shape[::-1]
        if self.weight.dtype not in _WEIGHT_DTYPES or self.weight.shape != shape:
            raise ValueError(
                f"a TT-LoRA cannot be merged into a quantised {type(self.get_base_layer()).__name__}, whose weight "
                "would have to be rounded again. Load the base model in bf16 to merge; `axolotl merge-lora` does."
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


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a layer that an adapter can go beside; None if it is no such layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def core_shapes(factors: Factors, rank: int) -> dict[str, tuple[int, int, int]]:
    """Names and shapes of the cores, in the order of the tensor train."""
    names = [f"ttcore_in_{k}" for k in range(len(factors.inputs))]
    names += [f"ttcore_out_{k}" for k in range(len(factors.outputs))]
    ranks = [1, *[rank] * (len(names) - 1), 1]
    return {name: (ranks[k], size, ranks[k + 1]) for k, (name, size) in enumerate(zip(names, factors.tt_shape))}


def build_matrices(cores_in: list[Tensor], cores_out: list[Tensor], alpha: float) -> tuple[Tensor, Tensor]:
    """A transposed (R, I) and alpha * C (R, O), in float32 or wider. Differentiable by the cores."""
    # in bfloat16 the rounding of each core would add up; under autocast the products would be in bfloat16 all the same
    with torch.autocast(cores_in[0].device.type, enabled=False):
        down_RI = _contract([core.permute(2, 1, 0) for core in reversed(cores_in)])
        return down_RI, alpha * _contract(cores_out)


def _contract(cores: list[Tensor]) -> Tensor:
    """The matrix (R, product of the sizes) of cores (R, size, rank) .. (rank, size, 1); the last digit is fastest."""
    cores = [core.to(torch.promote_types(core.dtype, torch.float32)) for core in cores]
    matrix = cores[-1].flatten(1)
    for core in reversed(cores[:-1]):
        matrix = (core.flatten(0, 1) @ matrix).view(len(core), -1)
    return matrix
