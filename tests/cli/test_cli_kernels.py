"""Kernels that need a GPU change nothing: all of Liger's, cut_cross_entropy, and the experts of the KernelsPlugin.

In float32, but for cut_cross_entropy and ScatterMoE, which are made for bf16. cut_cross_entropy is Axolotl's fork,
which is installed apart.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.cli.adapters import ADAPTERS
from tests.cli.cli_helpers import Result, run_on_gpu

pytestmark = pytest.mark.gpu

OURS = "axolotl_moe_peft.MoePeftPlugin"
LIGER = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin", OURS],
    **dict.fromkeys(
        ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy"), True
    ),
}
CUT = {"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin", OURS], "cut_cross_entropy": True}
SCATTERMOE = {
    "plugins": ["axolotl.integrations.kernels.KernelsPlugin", OURS],
    "use_kernels": True,
    "use_scattermoe": True,
    "experts_implementation": "scattermoe",
}
# (settings, precision, relative tolerance of loss and gradient norm: kernels sum in another order)
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "Liger": (LIGER, {}, 1e-3),
    "cut_cross_entropy": (CUT, {"bf16": True}, 2e-2),
    "ScatterMoE": (SCATTERMOE, {"bf16": True}, 2e-2),
}


@pytest.fixture(scope="module")
def axolotl() -> Callable[..., Result]:
    return run_on_gpu


@pytest.fixture(scope="module")
def train(train_from_start: Callable[..., tuple]) -> Callable[[str, str, bool], tuple]:
    """`train(kernels, adapter, on)`: log lines and saved adapter of two steps with or without those kernels."""

    @functools.cache
    def run(kernels: str, adapter: str, on: bool) -> tuple:
        settings, precision, _ = SETTINGS[kernels]
        keys = precision | (settings if on else {})
        lines, tensors, _ = train_from_start("mixtral", adapter, f"{kernels} {on}", max_steps=2, **keys)
        return lines, tensors

    return run


@pytest.mark.matrix("kernels: {kernels}", "{adapter}")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    "kernels",
    [
        "Liger",
        pytest.param(
            "cut_cross_entropy",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("cut_cross_entropy") is None, reason="cut_cross_entropy is not installed"
            ),
        ),
        "ScatterMoE",
    ],
)
def test_kernels_change_nothing(kernels: str, adapter: str, train: Callable) -> None:
    (lines, tensors), (fused_lines, fused_tensors) = train(kernels, adapter, False), train(kernels, adapter, True)
    tolerance = SETTINGS[kernels][2]
    for line, fused in zip(lines, fused_lines, strict=True):
        for key in ("loss", "grad_norm"):
            assert fused[key] == pytest.approx(line[key], rel=tolerance), key
    assert tensors.keys() == fused_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(fused_tensors[name], tensor, rtol=0, atol=tolerance, msg=name)
