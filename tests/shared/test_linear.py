"""The linear map that keeps its input as given, and its dropout, against the operations one by one."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from axolotl_moe_peft.shared.dropout import Mask
from axolotl_moe_peft.shared.linear import linear
from axolotl_moe_peft.shared.routing import router_logits


def operands(*leading, dtype=torch.float32, inputs=24, outputs=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*leading, inputs, generator=generator).to(dtype).requires_grad_()
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    return x, weight.requires_grad_(), bias.requires_grad_()


def gradients(out, *tensors):
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad(out, tensors, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leading", [(7,), (2, 7), (0,), ()], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_router_has_the_logits_and_gradients_of_a_float32_copy_bit_by_bit(dtype, leading, autocast):
    x, weight, bias = operands(*leading, dtype=dtype)
    ambient = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with ambient:
        logits = router_logits(x, weight, bias)
        ours = gradients(logits, x, weight, bias)
    expected = F.linear(x.float(), weight, bias)
    assert torch.equal(logits, expected)
    for ours_, theirs in zip(ours, gradients(expected, x, weight, bias), strict=True):
        assert ours_.dtype == theirs.dtype
        assert torch.equal(ours_, theirs)


def test_logits_that_are_read_twice_have_both_gradients():
    x, weight, bias = operands(6, dtype=torch.bfloat16)
    sums = [
        torch.autograd.grad(y.softmax(-1).square().sum() + y.logsumexp(-1).sum(), [x, weight])
        for y in (router_logits(x, weight, bias), F.linear(x.float(), weight, bias))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))


def test_dropout_zeroes_that_share_and_keeps_the_mean():
    probability, rows = 0.3, torch.ones(400, 501)  # an odd number of elements
    torch.manual_seed(0)
    mask = Mask.draw(probability)
    dropped = mask.dropper(rows.device)(rows.clone()) * mask.scale
    kept = dropped != 0
    count = kept.numel()
    # six standard errors
    assert abs(1 - kept.float().mean().item() - probability) < 6 * (probability * (1 - probability) / count) ** 0.5
    assert dropped[kept].unique().tolist() == [pytest.approx(1 / (1 - probability), rel=1e-4)]
    # neighbours in a row and in a column are independent, also of the four that share a random number
    for a, b in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept[:, ::4], kept[:, 3::4][:, :126])):
        a, b = a[:, : b.shape[1]].float() - (1 - probability), b.float() - (1 - probability)
        assert abs((a * b).mean().item()) < 6 * probability * (1 - probability) / a.numel() ** 0.5


@pytest.mark.parametrize("probability", [1e-7, 0.05, 0.999999])
def test_extreme_probabilities_stay_finite(probability):
    torch.manual_seed(0)
    x, weight, _ = operands(5)
    assert linear(x, weight, dropout=probability).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_has_the_same_mask_in_backward(dtype):
    x, weight, bias = operands(3, 7, dtype=dtype)
    torch.manual_seed(3)
    out = linear(x, weight, bias, dropout=0.4)
    torch.manual_seed(3)
    mask = Mask.draw(0.4)
    kept = mask.dropper(x.device)(torch.ones(3, 7, 24))
    expected = F.linear(x.float() * kept * mask.scale, weight, bias)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(gradients(out, x, weight, bias), gradients(expected, x, weight, bias), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_is_exact_under_checkpointing_and_reproducible_by_seed(use_reentrant):
    results = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)) * 2:
        x, weight, _ = operands(9)
        torch.manual_seed(4)
        out = run(lambda x, weight=weight: linear(x, weight, dropout=0.5).tanh(), x)
        out.square().sum().backward()
        results.append((out, x.grad, weight.grad))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    torch.manual_seed(5)
    assert not torch.equal(linear(*operands(9)[:2], dropout=0.5).tanh(), results[0][0])
