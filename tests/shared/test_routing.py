"""Routing and router losses against definitions written out token by token."""

import math

import pytest
import torch

from axolotl_moe_peft.shared.routing import (
    balance_loss,
    expert_counts,
    load_balancing_loss,
    router_logits,
    router_z_loss,
    top_k_routing,
)
from axolotl_moe_peft.shared.statistics import usage_figures


def logits(num_tokens: int, num_experts: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (4, 1), (5, 2), (64, 8), (3, 3)])
def test_top_k_routing_is_softmax_over_all_then_top_k(num_experts, k, norm_topk_prob):
    scores = logits(7, num_experts)
    weights, indices = top_k_routing(scores, k, norm_topk_prob)
    for token, row in enumerate(scores):
        exps = [math.exp(v) for v in row.tolist()]
        best = sorted(range(num_experts), key=lambda e: -exps[e])[:k]
        total = sum(exps[e] for e in best) if norm_topk_prob else sum(exps)
        assert indices[token].tolist() == best
        # one float32 rounding for each exp and division
        assert weights[token].tolist() == pytest.approx([exps[e] / total for e in best], rel=1e-5)


def test_routing_of_bf16_logits_is_computed_in_float32():
    scores = logits(9, 6).bfloat16()
    weights, _ = top_k_routing(scores, 2, norm_topk_prob=False)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, top_k_routing(scores.float(), 2, False)[0], rtol=0, atol=0)


def balance_by_hand(layers: list[torch.Tensor], k: int, mask: list[bool]) -> float:
    rows = [row for layer in layers for row, real in zip(layer, mask, strict=True) if real]
    num_experts = layers[0].shape[1]
    frequency, probability = [0.0] * num_experts, [0.0] * num_experts
    for row in rows:
        probs = row.softmax(-1).tolist()
        for e in sorted(range(num_experts), key=lambda e: -probs[e])[:k]:
            frequency[e] += 1 / len(rows)
        for e in range(num_experts):
            probability[e] += probs[e] / len(rows)
    return num_experts * sum(f * p for f, p in zip(frequency, probability, strict=True))


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss_pools_the_given_layers_and_skips_padding(num_layers, masked):
    layers = [logits(11, 5, seed) for seed in range(num_layers)]
    mask = torch.tensor([i % 3 != 0 or not masked for i in range(11)])
    expected = balance_by_hand(layers, 2, mask.tolist())
    assert load_balancing_loss(layers, 2, mask if masked else None).item() == pytest.approx(expected, rel=1e-5)


def test_load_balancing_loss_is_k_when_balanced_and_constant_when_k_is_n():
    balanced = torch.eye(4).repeat(5, 1) * 1e-3
    assert load_balancing_loss([balanced], 1).item() == pytest.approx(1, abs=1e-5)
    scores = logits(13, 3).requires_grad_()
    loss = load_balancing_loss([scores], 3)
    loss.backward()
    assert loss.item() == pytest.approx(3, rel=1e-6)
    assert scores.grad.abs().max() < 1e-7


def test_load_balancing_gradient_does_not_pass_through_the_choice():
    scores = logits(8, 4).requires_grad_()
    load_balancing_loss([scores], 2).backward()
    frequency = expert_counts(scores.topk(2, -1).indices, 4) / 8
    reference = scores.detach().clone().requires_grad_()
    (4 * (frequency * reference.softmax(-1).mean(0)).sum()).backward()
    torch.testing.assert_close(scores.grad, reference.grad)


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss_is_the_mean_squared_logsumexp_of_real_tokens(masked):
    scores = logits(6, 4, scale=3)
    mask = torch.tensor([True, False, True, True, False, True]) if masked else torch.ones(6, dtype=torch.bool)
    squares = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in scores[mask].tolist()]
    assert router_z_loss(scores, mask if masked else None).item() == pytest.approx(
        sum(squares) / len(squares), rel=1e-5
    )


def test_losses_of_a_batch_of_padding_are_zero_and_not_nan():
    nothing = torch.zeros(5, dtype=torch.bool)
    assert load_balancing_loss([logits(5, 3)], 2, nothing).item() == 0
    assert router_z_loss(logits(5, 3), nothing).item() == 0


def test_expert_counts_and_usage_figures_count_real_tokens():
    indices = torch.tensor([[0, 1], [0, 2], [3, 0]])
    assert expert_counts(indices, 4).tolist() == [3, 1, 1, 1]
    assert expert_counts(indices, 4, torch.tensor([True, True, False])).tolist() == [2, 1, 1, 0]
    figures = usage_figures(torch.tensor([[2.0, 2.0], [4.0, 0.0]]))
    assert figures == pytest.approx({"expert_entropy": 0.5, "expert_max_share": 0.75, "expert_used_fraction": 0.75})
    assert usage_figures(torch.tensor([[7.0]]))["expert_entropy"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_changes_no_loss_and_no_gradient(dtype, masked):
    """Of many tokens: sums over them are too coarse for bf16, and too large for fp16."""
    scores = (logits(8192, 8) + torch.linspace(-0.3, 0.3, 8)).requires_grad_()
    mask = torch.arange(8192) % 10 != 0 if masked else None
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    functions = (
        lambda: load_balancing_loss([scores], 2, mask),
        lambda: balance_loss(scores.sigmoid(), scores.topk(2).indices, mask),
        lambda: router_z_loss(scores, token_mask_T=mask),
        lambda: router_logits(scores @ weight, weight_ND=weight).square().mean(),
        lambda: top_k_routing(logits_TN=scores, num_experts_per_tok=2, norm_topk_prob=True)[0].square().mean(),
    )
    for function in functions:
        expected = function()
        with torch.autocast("cpu", dtype):
            loss = function()
        assert loss.dtype == torch.float32
        if function is not functions[3]:  # whose input autocast has rounded
            assert torch.equal(loss, expected)
            gradients = [torch.autograd.grad(x, scores)[0] for x in (loss, expected)]
            assert torch.equal(*gradients)
