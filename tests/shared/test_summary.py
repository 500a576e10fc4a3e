"""The line on memory, against optimisers that have stepped."""

import pytest
import torch

from axolotl_moe_peft.shared.summary import format_memory, parameter_row


@pytest.mark.parametrize(("name", "states"), [("SGD", 0), ("Adagrad", 1), ("AdamW", 2)])
def test_the_memory_is_what_the_optimiser_keeps(name, states):
    parameters = [torch.nn.Parameter(torch.randn(64, 16, 256)), torch.nn.Parameter(torch.randn(64, 64))]
    optimizer = getattr(torch.optim, name)(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    size = 4 * sum(p.numel() for p in parameters) / 2**20
    assert format_memory([parameter_row("experts", parameters)], optimizer) == (
        f"parameters {size:,.2f} MiB + gradients {size:,.2f} MiB + states of the optimiser {states * size:,.2f} MiB = "
        f"{(2 + states) * size:,.2f} MiB"
    )
