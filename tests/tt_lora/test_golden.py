"""Parity with numbers that the TT-LoRA authors' own code produced (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.tt_lora import TTLoraLinear
from axolotl_moe_peft.tt_lora.factors import Factors

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "ttlora_golden.npz", allow_pickle=False))
META = json.loads(bytes(GOLDEN["META"]))
CASES = {case["name"]: case for case in META["A_cases"]}
WRAPPER = META["wrapper"]
# Numbers of input cores of the initialisations; the file has their sizes only.
INITIALISED = {case["name"]: case | {"num_in": k} for case, k in zip(META["A_init"], (4, 4, 3), strict=True)}
# Stage 2, the router over several adapters.
OUT_OF_SCOPE = ("B/", "C/", "D/", "META")
# float64 on both sides, sums in another order; relative to the array's largest entry, and to 1 at least
TOLERANCE = 1e-12


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key].copy())


def layer_of(base: nn.Linear, factors: Factors, rank: int, alpha: float, group: str = "") -> TTLoraLinear:
    """The layer under test, with the cores of a group of the file."""
    layer = TTLoraLinear(base)
    layer.update_layer("default", TTLoraConfig(rank=rank, alpha=alpha), factors)
    if group:
        layer.double()
        for k, core in enumerate(flat_cores(layer)):
            core.data.copy_(golden(f"{group}/core_{k}"))
    return layer


def flat_cores(layer: TTLoraLinear) -> list[nn.Parameter]:
    return [core for side in layer.cores("default") for core in side]


def without_base(case: dict) -> TTLoraLinear:
    base = nn.Linear(case["in_features"], case["out_features"], bias=False)
    nn.init.zeros_(base.weight)
    factors = Factors(tuple(case["m_factors"]), tuple(case["n_factors"]))
    assert list(factors.tt_shape) == case["tt_shape"]
    return layer_of(base, factors, case["rank"], 1.0, f"A/{case['name']}")


def contraction_numbers(name: str) -> dict[str, Tensor]:
    """What the file has of one case, computed by the layer; inputs are among them as they were read."""
    group, layer = f"A/{name}", without_base(CASES[name])
    x = golden(f"{group}/x").requires_grad_()
    delta = layer(x)
    numbers = {f"{group}/x": x, f"{group}/delta_contraction": delta}
    numbers |= {f"{group}/core_{k}": core for k, core in enumerate(flat_cores(layer))}
    if f"{group}/grad_out" in GOLDEN:
        numbers[f"{group}/grad_out"] = golden(f"{group}/grad_out")
        delta.backward(numbers[f"{group}/grad_out"])
        numbers |= {f"{group}/grad_core_{k}": core.grad for k, core in enumerate(flat_cores(layer))}
        numbers[f"{group}/grad_x"] = x.grad
    weight = layer.get_delta_weight("default")
    if f"{group}/W_reconstruction" in GOLDEN:
        numbers[f"{group}/W_reconstruction"] = weight
    else:
        rows, cols = numbers[f"{group}/W_sample_rows"], numbers[f"{group}/W_sample_cols"] = (
            golden(f"{group}/W_sample_rows"),
            golden(f"{group}/W_sample_cols"),
        )
        numbers[f"{group}/W_sample_values"] = weight[rows, cols]
    return numbers


def other_map_numbers(name: str) -> dict[str, Tensor]:
    """The older repository's reconstruction, a different map: what this package has in its place."""
    group, layer = f"A/{name}", without_base(CASES[name])
    ours = {
        f"{group}/W_lanl_reconstruction": layer.get_delta_weight("default"),
        f"{group}/delta_lanl_reconstruction": layer(golden(f"{group}/x")),
    }
    return {key: tensor for key, tensor in ours.items() if key in GOLDEN}


def initial_numbers(name: str) -> dict[str, Tensor]:
    shape, k = INITIALISED[name]["tt_shape"], INITIALISED[name]["num_in"]
    factors = Factors(tuple(shape[:k]), tuple(reversed(shape[k:])))
    base = nn.Linear(np.prod(factors.inputs), np.prod(factors.outputs))
    torch.manual_seed(1234)
    layer = layer_of(base, factors, INITIALISED[name]["rank"], 16)
    return {f"init/{name}/core_{k}": core for k, core in enumerate(flat_cores(layer))}


def wrapper_numbers() -> dict[str, Tensor]:
    weight, bias, x = (golden(f"wrapper/{key}") for key in ("base_weight", "base_bias", "x"))
    base = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    base.weight.data, base.bias.data = weight, bias
    factors = Factors(tuple(WRAPPER["m_factors"]), tuple(WRAPPER["n_factors"]))
    layer = layer_of(base, factors, WRAPPER["rank"], WRAPPER["alpha"], "wrapper")
    numbers = {"wrapper/base_weight": weight, "wrapper/base_bias": bias, "wrapper/x": x, "wrapper/y": layer(x)}
    return numbers | {f"wrapper/core_{k}": core for k, core in enumerate(flat_cores(layer))}


def assert_golden(numbers: dict[str, Tensor]) -> None:
    for key, tensor in numbers.items():
        expected = golden(key)
        assert tensor.shape == expected.shape, key
        error = (tensor.detach() - expected).abs().max() / max(1.0, expected.abs().max())
        assert error <= TOLERANCE, f"{key}: off by {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_dense_update_are_the_authors(name):
    assert_golden(contraction_numbers(name))


@pytest.mark.parametrize("name", CASES)
def test_the_older_repositorys_reconstruction_is_a_different_map(name):
    for key, tensor in other_map_numbers(name).items():
        difference = (tensor - golden(key)).norm() / golden(key).norm()
        assert difference > 0.5, key


@pytest.mark.parametrize("name", INITIALISED)
def test_initialisation_is_the_authors_bit_for_bit(name):
    for key, core in initial_numbers(name).items():
        assert core.dtype == torch.float32
        assert torch.equal(core, golden(key)), key


def test_alpha_multiplies_the_update_undivided_and_the_bias_stays():
    assert_golden(wrapper_numbers())


def test_every_array_of_stage_one_is_compared():
    compared = set(wrapper_numbers())
    for name in CASES:
        compared |= set(contraction_numbers(name)) | set(other_map_numbers(name))
    for name in INITIALISED:
        compared |= set(initial_numbers(name))
    assert compared == {key for key in GOLDEN if not key.startswith(OUT_OF_SCOPE)}
    assert len(compared) == 160
