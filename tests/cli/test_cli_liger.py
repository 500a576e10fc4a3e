"""Liger's kernels change nothing, whichever plugin comes first. On a CPU, by Triton's interpreter.

It runs rotary embeddings, dense SwiGLU and the fused linear cross-entropy; RMSNorm and Liger's experts need a GPU.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.adapters import ADAPTERS, adapter_keys, dataset_keys
from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, write_rows, write_yaml

OURS, LIGER = "axolotl_moe_peft.MoePeftPlugin", "axolotl.integrations.liger.LigerPlugin"
KERNELS = {"liger_rope": True, "liger_fused_linear_cross_entropy": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "without": {},
    "ours first": {"plugins": [OURS, LIGER], **KERNELS},
    "Liger first": {"plugins": [LIGER, OURS], **KERNELS},
    "SwiGLU": {"plugins": [OURS, LIGER], **KERNELS, "liger_glu_activation": True},
}
DENSE = tuple(adapter for adapter in ADAPTERS if not adapter.startswith("perft"))


@pytest.fixture(scope="module")
def axolotl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AxolotlPool]:
    pool = AxolotlPool(tmp_path_factory.mktemp("pool"), TRITON_INTERPRET="1")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def train(
    axolotl: AxolotlPool,
    base_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    experts: Callable[[str], Path],
    start: Callable[[str, str], Path],
) -> Callable[[str, str, str], tuple[list[dict[str, float]], dict[str, torch.Tensor]]]:
    """`train(family, adapter, name)`: log lines and saved adapter of a step with the settings of that name."""
    folder = tmp_path_factory.mktemp("liger")
    rows = write_rows(folder / "rows.jsonl", ((f"what is {i}?", "ok" * (1 + i)) for i in range(4)))

    @functools.cache
    def run(family: str, adapter: str, name: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        config = write_yaml(
            folder / f"{family} {adapter} {name}.yaml",
            base_model(family),
            rows,
            **adapter_keys(adapter, experts(family)) | dataset_keys(adapter, rows) | SETTINGS[name],
            lora_model_dir=str(start(family, adapter)),
            gradient_checkpointing=True,
            max_steps=1,
            optimizer="sgd",
            learning_rate=0.1,
            max_grad_norm=1e6,
        )
        result = axolotl("train", config)
        assert result.code == 0, result.output
        if name != "without":
            assert "Applying LIGER" in result.output
        return log_history(config.with_suffix("")), adapter_tensors(config.with_suffix(""))

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


@pytest.mark.matrix("Liger: dense SwiGLU", "{adapter}")
@pytest.mark.parametrize("adapter", DENSE)
def test_dense_swiglu_changes_nothing(adapter: str, train: Callable) -> None:
    assert_same(train("llama", adapter, "without"), train("llama", adapter, "SwiGLU"))
