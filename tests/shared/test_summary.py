"""The start-up table's estimate of memory, against optimisers that have stepped."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from axolotl_moe_peft.shared.summary import _OPTIMIZER_STATES, format_memory, parameter_row

# those whose states can be made without a GPU
ON_CPU = sorted(set(_OPTIMIZER_STATES) - {name for name in _OPTIMIZER_STATES if name.startswith("paged")})


def mebibytes(line: str, part: str) -> float:
    return float(line.partition(f"{part} ")[2].split(" MiB")[0].replace(",", ""))


@pytest.mark.parametrize("name", ON_CPU)
def test_the_estimate_is_what_the_optimiser_keeps(name, tmp_path):
    parameters = [torch.nn.Parameter(torch.randn(64, 16, 256)), torch.nn.Parameter(torch.randn(64, 256))]
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(
        TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True)
    )
    optimizer = optimizer_cls(parameters, **{"lr": 1e-3} | kwargs)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kept = sum(
        tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    )
    line = format_memory([parameter_row("experts", parameters)], name)
    size = 4 * sum(p.numel() for p in parameters) / 2**20
    assert mebibytes(line, "parameters") == mebibytes(line, "gradients") == pytest.approx(size, abs=0.01)
    estimate = mebibytes(line, f"states of {name}")
    # 8-bit states come with a scale for each block of 256 values; steps are counted in one number for each tensor
    assert estimate == pytest.approx(kept / 2**20, rel=0.05, abs=0.1)
    assert mebibytes(line, "=") == pytest.approx(2 * size + estimate, abs=0.02)


def test_an_optimiser_whose_states_are_not_known_is_named():
    line = format_memory([parameter_row("cores", [torch.zeros(2**18)])], "galore_adamw")
    assert line == "parameters 1.00 MiB + gradients 1.00 MiB, and the states of galore_adamw"
