"""Every variant against the paper's formulas, written as loops over tokens on the block's own input."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers.activations import ACT2FN

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer
from axolotl_moe_peft.shared.routing import router_logits
from tests.tiny_models import FAMILIES, random_ids, randomise_adapters, tiny_model

VARIANTS = {
    "routed": {"num_experts": 5, "num_experts_per_tok": 2},
    "embedded": {},
    "dense": {"num_experts": 3},
    "single": {},
}


def perft(base, variant="routed", **kwargs):
    settings = {"rank": 4, "alpha": 8, **VARIANTS[variant], **kwargs}
    return get_peft_model(base, PerftConfig(variant=variant, task_type="CAUSAL_LM", **settings))


def layers_of(model) -> list[PerftLayer]:
    return [m for m in model.modules() if isinstance(m, PerftLayer)]


def unit(config, down, up, x):
    if config.expert_type == "lora":
        return config.alpha / config.rank * (up @ (down @ x))
    return up @ ACT2FN[config.hidden_act](down @ x)


def without_adapters(layer: PerftLayer, hidden: torch.Tensor) -> torch.Tensor:
    layer.enable_adapters(False)
    out = layer(hidden)
    layer.enable_adapters(True)
    return out


def reference(layer: PerftLayer, hidden: torch.Tensor) -> torch.Tensor:
    """Block(h) of the paper for one layer, a token at a time, from the base block's own modules."""
    config = layer.perft_config["default"]
    down, up = layer.perft_down["default"], layer.perft_up["default"]
    block = layer.base_layer
    base_out = without_adapters(layer, hidden)
    _, base_weights, base_indices = block.gate(hidden.reshape(-1, hidden.shape[-1]))
    rows = []
    for t, x in enumerate(hidden.reshape(-1, hidden.shape[-1])):
        if config.variant == "embedded":
            chosen = zip(base_weights[t], base_indices[t].tolist(), strict=True)
        elif config.variant == "routed":
            probs = (layer.perft_router["default"] @ x).softmax(-1)
            weights, indices = probs.topk(config.num_experts_per_tok)
            if layer.norm_topk_prob["default"]:
                weights = weights / weights.sum()
            if config.gate_weights == "base":
                weights = base_weights[t]
            chosen = zip(weights, indices.tolist(), strict=False)
        else:
            chosen = ((1.0, e) for e in range(len(down)))
        rows.append(sum(w * unit(config, down[e], up[e], x) for w, e in chosen))
    return base_out + torch.stack(rows).view_as(hidden)


@pytest.mark.parametrize("expert_type", ["lora", "parallel_adapter"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_block_output_is_the_papers(family, variant, expert_type):
    model = perft(tiny_model(family), variant, expert_type=expert_type, hidden_act="gelu")
    randomise_adapters(model)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    for layer in layers_of(model):
        expected = reference(copy.deepcopy(layer).requires_grad_(False), hidden)
        assert (layer(hidden) - without_adapters(layer, hidden)).abs().max() > 1e-3
        torch.testing.assert_close(layer(hidden), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_norm_topk_prob_overrides_the_base(norm_topk_prob):
    model = perft(tiny_model("mixtral"), norm_topk_prob=norm_topk_prob)
    randomise_adapters(model)
    hidden = torch.randn(1, 4, 32)
    layer = layers_of(model)[0]
    assert layer.norm_topk_prob["default"] is norm_topk_prob
    torch.testing.assert_close(layer(hidden), reference(layer, hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "expected"), [("mixtral", True), ("olmoe", False), ("qwen3_moe", True)])
def test_norm_topk_prob_null_does_what_the_base_does(family, expected):
    assert layers_of(perft(tiny_model(family)))[0].norm_topk_prob["default"] is expected


def test_gate_weights_base_takes_the_base_routers_weights_by_rank():
    model = perft(tiny_model("olmoe"), gate_weights="base", router_aux_loss_coef=0.0)
    randomise_adapters(model)
    hidden = torch.randn(1, 6, 32)
    layer = layers_of(model)[0]
    out = layer(hidden)
    torch.testing.assert_close(out, reference(layer, hidden), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    # the authors' released code: no gradient from the main loss; in the graph all the same, for DDP
    assert layer.perft_router["default"].grad.abs().max() == 0


def test_gate_weights_base_needs_as_many_base_weights():
    with pytest.raises(ValueError, match="num_experts_per_tok is 3. Use at most 2"):
        perft(tiny_model("olmoe"), gate_weights="base", num_experts_per_tok=3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_with_zero_init_equals_the_base_exactly(family, variant):
    base, ids = tiny_model(family), random_ids(2, 9)
    expected = base(ids).logits
    assert torch.equal(perft(base, variant)(ids).logits, expected)


def test_paper_init_has_the_authors_moments():
    model = perft(tiny_model("mixtral", hidden_size=256, head_dim=64), rank=16, init="paper")
    layer = layers_of(model)[0]
    down, up, router = (getattr(layer, f"perft_{n}")["default"] for n in ("down", "up", "router"))
    # std of n samples has a relative error of about 1 / sqrt(2 n); n >= 1280
    assert down.std().item() == pytest.approx((2 / 16) ** 0.5, rel=0.08)
    assert up.std().item() == pytest.approx(1e-6, rel=0.08)
    assert router.std().item() == pytest.approx(0.02, rel=0.08)


@pytest.mark.parametrize("expert_type", ["lora", "parallel_adapter"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_keeps_the_mean_and_is_off_in_eval(variant, expert_type):
    act = {"hidden_act": "linear"} if expert_type == "parallel_adapter" else {}  # linear: the mean passes through
    model = perft(
        tiny_model("mixtral"), variant, expert_type=expert_type, dropout=0.5, router_aux_loss_coef=0.0, **act
    )
    randomise_adapters(model, std=0.3)
    layer, hidden = layers_of(model)[0], torch.randn(1, 3, 32)
    expected = reference(layer, hidden)
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-5, atol=1e-5)
    layer.train()
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack([layer(hidden) for _ in range(1500)])
    assert samples.std(0).max() > 0.05
    # 1500 draws: the mean's standard error, five times over
    error = (samples.mean(0) - expected).abs() / (samples.std(0) / 1500**0.5 + 1e-6)
    assert error.max() < 5


def test_units_that_share_a_token_have_masks_of_their_own():
    model = perft(
        tiny_model("mixtral"), "routed", num_experts=2, num_experts_per_tok=2, dropout=0.5, norm_topk_prob=True
    )
    layer = layers_of(model)[0].train()
    with torch.no_grad():
        for name in ("perft_down", "perft_up"):
            getattr(layer, name)["default"].copy_(getattr(layer, name)["default"].normal_()[:1].expand(2, -1, -1))
        layer.perft_router["default"].zero_()  # weight 1/2 each: with one mask the sum is one unit's output
    hidden = torch.randn(1, 1, 32)
    with torch.no_grad():
        delta = layer(hidden) - without_adapters(layer, hidden)
    down, up = layer.perft_down["default"][0], layer.perft_up["default"][0]
    kept = torch.linalg.lstsq((2 * up @ down * hidden[0, 0] * 2), delta[0, 0]).solution
    assert not torch.allclose(kept.round(), kept, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_base_keeps_float32_adapters_and_its_own_dtype(variant):
    base = tiny_model("mixtral").bfloat16()
    model = perft(base, variant)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    randomise_adapters(model)
    ids = random_ids(1, 8)
    out = model(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_the_router_computes_in_float32_whatever_surrounds_it():
    model = perft(tiny_model("mixtral").bfloat16(), router_aux_loss_coef=0.0)
    layer = layers_of(model)[0]
    x = torch.randn(6, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(x, layer.perft_router["default"])
    assert torch.equal(logits, x.float() @ layer.perft_router["default"].float().T)


def test_every_parameter_takes_part_although_an_expert_has_no_token():
    model = perft(tiny_model("mixtral"), num_experts=16, num_experts_per_tok=1).train()
    ids = random_ids(1, 2)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("variant", ["routed", "embedded"])
def test_the_bases_experts_implementation_stays_in_charge(variant, implementation):
    base = tiny_model("qwen3_moe")
    base.set_experts_implementation(implementation)
    model = perft(base, variant)
    randomise_adapters(model)
    ids = random_ids(1, 8)
    expected = perft(tiny_model("qwen3_moe"), variant)
    randomise_adapters(expected)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)
