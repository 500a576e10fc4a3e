"""Parity with numbers that the PERFT authors' own code produced (tests/golden/README.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer, variants
from axolotl_moe_peft.shared.routing import load_balancing_loss, top_k_routing

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "perft_golden.npz", allow_pickle=False))

# Both sides run in float64 but for the routing: a float32 softmax there, and here an adapter's whole router.
# That leaves some 1e-7 of each weight, so 1e-6 on outputs of 10; gradients are sums over the tokens and reach 40.
TOLERANCE = 5e-6
GRADIENT_RELATIVE_TOLERANCE = 1e-6  # of the array's largest entry, and never less than TOLERANCE
# Losses are float32 numbers up to 5 on both sides, with a rounding of 2.4e-7, and means of the logits above.
LOSS_TOLERANCE = 1e-6

FAMILIES = ("olmoe_norm0", "olmoe_norm1", "mixtral")
BASE_TOP_K = 2
AUX_COEF = {"olmoe_norm0": 0.01, "olmoe_norm1": 0.01, "mixtral": 0.02}
VARIANTS = {
    "R_n4k2": {"variant": "routed", "num_experts": 4, "num_experts_per_tok": 2},
    "R_n4k1": {"variant": "routed", "num_experts": 4, "num_experts_per_tok": 1},
    "R_n2k2": {"variant": "routed", "num_experts": 2, "num_experts_per_tok": 2},
    "E": {"variant": "embedded"},
    "D_n2": {"variant": "dense", "num_experts": 2},
    "S_n1": {"variant": "single"},
}
ROUTED = tuple(v for v in VARIANTS if v.startswith("R_"))
EXPERT_TYPES = {
    "lora": {"expert_type": "lora", "rank": 4, "alpha": 8},
    "parallel": {"expert_type": "parallel_adapter", "rank": 4, "hidden_act": "silu"},
}
WEIGHT_NAMES = {"lora": ("A", "B"), "parallel": ("w1", "w2")}


class Case(NamedTuple):
    """One combination of the file's keys. `intended` has the adapter router's own weights in OLMoE, too."""

    family: str
    variant: str
    expert_type: str
    intended: bool

    def __str__(self) -> str:
        return "-".join([*self[:3], *["intended"] * self.intended])

    @property
    def gate_weights(self) -> str:
        return "base" if self.variant in ROUTED and self.family != "mixtral" and not self.intended else "own"


CASES = [Case(*c, intended=False) for c in product(FAMILIES, VARIANTS, EXPERT_TYPES)]
CASES += [Case(*c, intended=True) for c in product(FAMILIES[:2], ROUTED, EXPERT_TYPES)]
LANGUAGE_MODELS = list(product(FAMILIES, ("none", *VARIANTS)))

inputs_read: set[str] = set()


def given(key: str) -> Tensor:
    """An array that a test feeds in, as opposed to one that it compares with."""
    inputs_read.add(key)
    return torch.from_numpy(GOLDEN[key].copy())


def base_model(family: str) -> PreTrainedModel:
    """The golden language model, float64, in eval mode."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": BASE_TOP_K,
        "rms_norm_eps": 1e-5,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
        "experts_implementation": "eager",  # the grouped products of torch know no float64
    }
    if family == "mixtral":
        rope = {"rope_type": "default", "rope_theta": 1e6}
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, rope_parameters=rope, **sizes))
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4}
        norm_topk_prob = family == "olmoe_norm1"
        model = OlmoeForCausalLM(
            OlmoeConfig(num_experts=4, rope_parameters=rope, norm_topk_prob=norm_topk_prob, **sizes)
        )
    weights = {
        "model.embed_tokens.weight": given("model/w/embed_tokens"),
        "model.norm.weight": given("model/w/norm"),
        "lm_head.weight": given("model/w/lm_head"),
    }
    attention = [f"{n}_proj" for n in "qkvo"] + ([] if family == "mixtral" else ["q_norm", "k_norm"])
    gate_up = torch.cat([given("base/gate_proj"), given("base/up_proj")], dim=2)
    for i in range(2):
        layer = f"model.layers.{i}"
        weights |= {f"{layer}.self_attn.{n}.weight": given(f"model/w/{n}")[i] for n in attention}
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = given(f"model/w/{name}")[i]
        weights[f"{layer}.mlp.gate.weight"] = given("base/router")[i]
        weights[f"{layer}.mlp.experts.gate_up_proj"] = gate_up[i]
        weights[f"{layer}.mlp.experts.down_proj"] = given("base/down_proj")[i]
    model.double().load_state_dict(weights)
    return model.eval()


def adapted_model(case: Case) -> tuple[PeftModel, list[PerftLayer]]:
    """The golden model with the golden adapters, and its two adapted blocks."""
    config = PerftConfig(
        task_type="CAUSAL_LM",
        gate_weights=case.gate_weights,
        **VARIANTS[case.variant],
        **EXPERT_TYPES[case.expert_type],
    )
    model = get_peft_model(base_model(case.family), config).double().eval()
    layers = [m for m in model.modules() if isinstance(m, PerftLayer)]
    assert len(layers) == 2
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for name, key in zip(parameter_names(case), weight_keys(case), strict=True):
                parameter = getattr(layer, name)["default"]
                parameter.copy_(given(f"w/{case.variant}/{case.expert_type}/{key}")[i])
    return model, layers


def parameter_names(case: Case) -> list[str]:
    return ["perft_down", "perft_up", *["perft_router"] * (case.variant in ROUTED)]


def weight_keys(case: Case) -> list[str]:
    return [*WEIGHT_NAMES[case.expert_type], *["router"] * (case.variant in ROUTED)]


@contextmanager
def recorded_router_logits(layers: list[PerftLayer]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The logits that the base routers, and those that the adapters' routers decide on, in order of their calls."""
    base, adapter = [], []

    def record_and_route(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        adapter.append(logits)
        return top_k_routing(logits, *args)

    for layer in layers:
        layer.base_layer.gate.register_forward_hook(lambda module, args, out: base.append(out[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "top_k_routing", record_and_route)
        yield base, adapter


@cache
def block_numbers(case: Case) -> dict[str, Tensor]:
    """Outputs of both blocks on the given inputs, and the gradients of sum(output * cotangent)."""
    model, layers = adapted_model(case)
    x = given("common/x").requires_grad_()
    out = torch.stack([layer(x[i]) for i, layer in enumerate(layers)])
    parameters = [getattr(layer, n)["default"] for n in parameter_names(case) for layer in layers]
    # as released, OLMoE's adapter router is not in the graph at all: its zeros have to be materialised
    grad_x, *grads = torch.autograd.grad(
        (out * given("common/cotangent")).sum(), [x, *parameters], allow_unused=True, materialize_grads=True
    )
    path = f"{case.family}/{case.variant}/{case.expert_type}"
    root = "intended/" if case.intended else ""
    numbers = {f"{root}out/{path}": out, f"{root}grad/{path}/x": grad_x}
    for key, *pair in zip(weight_keys(case), grads[::2], grads[1::2], strict=True):
        numbers[f"{root}grad/{path}/{key}"] = torch.stack(pair)
    return numbers


@cache
def base_block_numbers(family: str) -> dict[str, Tensor]:
    """The blocks with their adapters switched off."""
    model, layers = adapted_model(Case(family, "R_n4k2", "lora", intended=True))
    with model.disable_adapter():
        return {f"base_out/{family}": torch.stack([layer(x) for layer, x in zip(layers, given("common/x"))])}


@cache
def router_numbers(family: str, variant: str, expert_type: str) -> dict[str, Tensor]:
    """Router logits of both blocks, their load-balancing losses, and the gradient of the adapters' one."""
    model, layers = adapted_model(Case(family, variant, expert_type, intended=True))
    with recorded_router_logits(layers) as (base_logits, adapter_logits):
        for layer, x in zip(layers, given("common/x"), strict=True):
            layer(x)
    top_k = VARIANTS[variant]["num_experts_per_tok"]
    path = f"{variant}/{expert_type}"
    numbers = {
        "base_router_logits": torch.stack(base_logits),
        f"adapter_router_logits/{path}": torch.stack(adapter_logits),
        **{f"lb/base{key}": loss for key, loss in balance_losses(base_logits, BASE_TOP_K)},
        **{f"lb/{path}{key}": loss for key, loss in balance_losses(adapter_logits, top_k)},
    }
    routers = [layer.perft_router["default"] for layer in layers]
    grads = torch.autograd.grad(numbers[f"lb/{path}/mask"], routers)
    return numbers | {f"lb_grad/{path}/router": torch.stack(grads)}


def balance_losses(layers_logits: list[Tensor], top_k: int) -> Iterator[tuple[str, Tensor]]:
    mask = given("common/mask").flatten().bool()
    for layers, name in (
        (layers_logits, ""),
        (layers_logits[:1], "/layer0_only"),
        (layers_logits[1:], "/layer1_only"),
    ):
        yield f"{name}/nomask", load_balancing_loss(layers, top_k)
        yield f"{name}/mask", load_balancing_loss(layers, top_k, mask)


def authors_attention_mask() -> Tensor:
    """The mask that their transformers built: a padded query, which attends to nothing, attends to all positions."""
    real = given("model/attention_mask").bool()
    allowed = real[:, None, None, :] & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)


@cache
def language_model_numbers(family: str, variant: str, as_authors: bool) -> dict[str, Tensor]:
    """Logits and losses of the language model, with the authors' attention mask or with what users pass.

    The authors' loss includes the pooled balance losses of the base routers and of the adapters' routers.
    """
    model, layers = adapted_model(Case(family, "S_n1" if variant == "none" else variant, "lora", intended=False))
    mask, labels = given("model/attention_mask"), given("model/labels")
    with (
        torch.no_grad(),
        model.disable_adapter() if variant == "none" else nullcontext(),
        recorded_router_logits(layers) as (base_logits, adapter_logits),
    ):
        out = model(given("model/input_ids"), authors_attention_mask() if as_authors else mask, labels=labels)
    real = mask.flatten().bool()
    coef, aux_base = AUX_COEF[family], load_balancing_loss(base_logits, BASE_TOP_K, real)
    numbers = {
        "loss": out.loss + coef * aux_base,
        "ce": out.loss,
        "aux_base": aux_base,
        "logits": out.logits,
        "base_router_logits": torch.stack(base_logits),
    }
    if variant in ROUTED:
        aux_adapter = load_balancing_loss(adapter_logits, VARIANTS[variant]["num_experts_per_tok"], real)
        numbers["loss"] = numbers["loss"] + coef * aux_adapter
        numbers["aux_adapter"] = aux_adapter
        numbers["adapter_router_logits"] = torch.stack(adapter_logits)
    return {f"model/{family}/{variant}/{name}": value for name, value in numbers.items()}


def assert_golden(numbers: dict[str, Tensor], tolerance: float, relative: float = 0.0) -> None:
    """Each number equals the array of its name."""
    for key, value in numbers.items():
        value, expected = value.detach().double(), torch.from_numpy(GOLDEN[key]).double()
        assert value.shape == expected.shape, key
        error = (value - expected).abs().max().item()
        assert error <= max(tolerance, relative * expected.abs().max().item()), f"{key}: off by {error:.1e}"


def split(numbers: dict[str, Tensor], part: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The numbers with `part` in their names, and the others."""
    chosen = {key: value for key, value in numbers.items() if part in key}
    return chosen, {key: value for key, value in numbers.items() if key not in chosen}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_output_and_gradients_equal_the_authors(case):
    gradients, outputs = split(block_numbers(case), "grad/")
    assert_golden(outputs, TOLERANCE)
    assert_golden(gradients, TOLERANCE, GRADIENT_RELATIVE_TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_adapters_leave_the_authors_base_block(family):
    assert_golden(base_block_numbers(family), TOLERANCE)


@pytest.mark.parametrize("expert_type", EXPERT_TYPES)
@pytest.mark.parametrize("variant", ROUTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_router_logits_and_load_balancing_losses_equal_the_authors(family, variant, expert_type):
    logits, losses = split(router_numbers(family, variant, expert_type), "logits")
    assert_golden(logits, TOLERANCE)
    assert_golden(losses, LOSS_TOLERANCE)


@pytest.mark.parametrize(("family", "variant"), LANGUAGE_MODELS)
def test_language_model_equals_the_authors_at_every_position(family, variant):
    logits, losses = split(language_model_numbers(family, variant, as_authors=True), "logits")
    assert_golden(logits, TOLERANCE)
    assert_golden(losses, LOSS_TOLERANCE)


@pytest.mark.parametrize(("family", "variant"), LANGUAGE_MODELS)
def test_language_model_with_a_plain_mask_equals_the_authors_at_real_tokens(family, variant):
    numbers = language_model_numbers(family, variant, as_authors=False)
    path = f"model/{family}/{variant}"
    # the last padded query, which predicts the first token, depends on the attention kernel, and cross entropy on it
    losses = {key: value for key, value in numbers.items() if key.startswith(f"{path}/aux")}
    assert_golden(losses, LOSS_TOLERANCE)
    real = given("model/attention_mask").bool()
    for key, tokens in (
        (f"{path}/logits", real),
        *((key, (slice(None), real.flatten())) for key in numbers if key.endswith("router_logits")),
    ):
        error = (numbers[key] - torch.from_numpy(GOLDEN[key]))[tokens].abs().max().item()
        assert error <= TOLERANCE, f"{key}: off by {error:.1e}"


K_ABOVE_BASE = "facts/olmoe_k_above_base_topk_raises_index_error"


def test_more_adapters_than_base_weights_is_an_error_where_the_authors_code_crashes():
    assert GOLDEN[K_ABOVE_BASE] == 1
    config = {"variant": "routed", "num_experts": 4, "num_experts_per_tok": BASE_TOP_K + 1, "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match=r"gate_weights.*2 weights.*num_experts_per_tok is 3"):
        get_peft_model(base_model("olmoe_norm0"), PerftConfig(gate_weights="base", **config))
    get_peft_model(base_model("olmoe_norm0"), PerftConfig(gate_weights="own", **config))


def test_every_array_of_the_file_is_compared_or_fed_in():
    compared = {K_ABOVE_BASE}
    for numbers in (
        *(block_numbers(case) for case in CASES),
        *(base_block_numbers(family) for family in FAMILIES),
        *(router_numbers(*case) for case in product(FAMILIES, ROUTED, EXPERT_TYPES)),
        *(language_model_numbers(*case, as_authors=True) for case in LANGUAGE_MODELS),
    ):
        compared |= set(numbers)
    assert compared.isdisjoint(inputs_read)
    assert compared | inputs_read == set(GOLDEN)
    assert len(GOLDEN) == 455
