"""Liger's kernels change nothing, whichever plugin comes first. On a CPU, by Triton's interpreter.

It runs rotary embeddings, dense SwiGLU and the fused linear cross-entropy; RMSNorm and Liger's experts need a GPU.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.cli.adapters import ADAPTERS
from tests.cli.cli_helpers import AxolotlPool, run_command

OURS, LIGER = "axolotl_moe_peft.MoePeftPlugin", "axolotl.integrations.liger.LigerPlugin"
KERNELS = {"liger_rope": True, "liger_fused_linear_cross_entropy": True}
# the interpreter takes a fraction of a second for every token
FEW_TOKENS = {"micro_batch_size": 1, "gradient_checkpointing": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "without": FEW_TOKENS,
    "ours first": {"plugins": [OURS, LIGER], **KERNELS, **FEW_TOKENS},
    "Liger first": {"plugins": [LIGER, OURS], **KERNELS, **FEW_TOKENS},
    "SwiGLU": {"plugins": [OURS, LIGER], **KERNELS, "liger_glu_activation": True, **FEW_TOKENS},
}
DENSE = tuple(adapter for adapter in ADAPTERS if not adapter.startswith("perft"))


@pytest.fixture(scope="module")
def axolotl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AxolotlPool]:
    pool = AxolotlPool(tmp_path_factory.mktemp("pool"), TRITON_INTERPRET="1")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def train(train_from_start: Callable[..., tuple]) -> Callable[[str, str, str], tuple]:
    """`train(family, adapter, name)`: log lines and saved adapter of a step with the settings of that name."""

    @functools.cache
    def run(family: str, adapter: str, name: str) -> tuple:
        lines, tensors, output = train_from_start(family, adapter, name, **SETTINGS[name])
        assert ("Applying LIGER" in output) == (name != "without")
        return lines, tensors

    return run


def assert_same(one: tuple, other: tuple) -> None:
    for line, other_line in zip(one[0], other[0], strict=True):
        for key in {"loss", "grad_norm"} | {key for key in line if key.startswith(("router_", "expert_"))}:
            assert other_line[key] == pytest.approx(line[key], rel=1e-4, abs=1.5e-5), key  # the kernels' own rounding
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        torch.testing.assert_close(other[1][name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.matrix("Liger: rope and fused linear cross-entropy", "{adapter}")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_rope_and_fused_cross_entropy_change_nothing(adapter: str, train: Callable) -> None:
    assert_same(train("mixtral", adapter, "without"), train("mixtral", adapter, "ours first"))


@pytest.mark.matrix("plugins: in any order", "{adapter}")
@pytest.mark.parametrize("adapter", ["perft", "tt_lora_moe", "pt_moe"])
def test_the_order_of_plugins_does_not_matter(adapter: str, train: Callable) -> None:
    assert_same(train("mixtral", adapter, "ours first"), train("mixtral", adapter, "Liger first"))


@pytest.fixture(scope="module")
def swiglu() -> None:
    """Liger's kernel, where Triton's interpreter can run it: not that of 0.8.4, which calls `.to` on a float."""
    script = (
        "import torch; from liger_kernel.ops.swiglu import LigerSiLUMulFunction as f; f.apply(*torch.ones(2, 2, 8))"
    )
    if run_command(sys.executable, "-c", script, TRITON_INTERPRET="1").code:
        pytest.skip("Liger's SwiGLU does not run in Triton's interpreter, and this machine has no GPU")


@pytest.mark.matrix("Liger: dense SwiGLU", "{adapter}")
@pytest.mark.parametrize("adapter", DENSE)
def test_dense_swiglu_changes_nothing(adapter: str, train: Callable, swiglu: None) -> None:
    assert_same(train("llama", adapter, "without"), train("llama", adapter, "SwiGLU"))
