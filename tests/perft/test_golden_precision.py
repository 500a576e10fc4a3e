"""The golden blocks in float32 and bfloat16, on a CPU and on a GPU, beside those in float64 that equal the authors'.

A token that another expert gets, because its rounded logits rank otherwise, is left out on both sides.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.perft.test_golden import (
    BASE_TOP_K,
    CASES,
    ROUTED,
    VARIANTS,
    Case,
    adapted_model,
    given,
    parameter_names,
    recorded_router_logits,
)

# largest relative errors seen on a CPU: 4e-7, and 1.2e-2 of outputs and 3e-2 of gradients, which have more roundings
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-2}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Block:
    """The two blocks of a case and where their routers send the tokens of the given inputs."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        self.case = case
        model, self.layers = adapted_model(case)
        model.to(device=device, dtype=dtype)
        self.x = given("common/x").to(device, dtype).requires_grad_()
        with torch.no_grad(), recorded_router_logits(self.layers) as (base_logits, adapter_logits):
            self.outputs()
        adapter_top_k = VARIANTS[case.variant].get("num_experts_per_tok")
        self.choices = [*map(chosen, base_logits, [BASE_TOP_K] * 2), *map(chosen, adapter_logits, [adapter_top_k] * 2)]

    def outputs(self) -> Tensor:
        return torch.stack([layer(x) for layer, x in zip(self.layers, self.x, strict=True)])

    def numbers(self, kept: Tensor) -> dict[str, Tensor]:
        """Outputs of the kept tokens, and the gradients of sum(output * cotangent) over them, in float64."""
        out = self.outputs()
        names = parameter_names(self.case)
        parameters = [getattr(layer, name)["default"] for name in names for layer in self.layers]
        weights = (given("common/cotangent") * kept.unsqueeze(-1)).to(out.device, out.dtype)
        grads = torch.autograd.grad(
            (out * weights).sum(), [self.x, *parameters], allow_unused=True, materialize_grads=True
        )
        labels = ["x", *(f"{name} {i}" for name in names for i in range(2))]
        found = {"output": out[kept.to(out.device)]} | dict(zip(labels, grads, strict=True))
        return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


def chosen(logits_TN: Tensor, top_k: int) -> Tensor:
    return logits_TN.float().topk(top_k).indices.sort().values.cpu()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_equal_those_in_float64(case: Case, device: str, dtype: torch.dtype) -> None:
    reference, block = Block(case, "cpu", torch.float64), Block(case, device, dtype)
    assert len(block.choices) == (4 if case.variant in ROUTED else 2)
    same = [(a == b).all(-1) for a, b in zip(block.choices, reference.choices, strict=True)]
    kept = torch.stack([torch.stack(same[layer::2]).all(0) for layer in range(2)]).view(reference.x.shape[:-1])
    assert kept.double().mean() > 0.9
    numbers, found = reference.numbers(kept), block.numbers(kept)
    rounding = numbers["x"].norm() / 100  # of gradients that are zero, as that of weights which are always 1
    for name, expected in numbers.items():
        error = (found[name] - expected).norm() / expected.norm().clamp(min=rounding)
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"
