"""PERFT beside the MLPs of dense layers, on models of five shapes and on mixtures of dense layers and MoE blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer
from axolotl_moe_peft.perft.selection import find_dense_mlps, select_blocks
from tests.causal_models import tiny_causal_model
from tests.tiny_models import PAD, random_ids, randomise_adapters, tiny_model

VARIANTS = {"routed": {"num_experts": 5, "num_experts_per_tok": 2}, "dense": {"num_experts": 3}, "single": {}}
# SwiGLU with and without norms of queries and keys, GeGLU between two norms, one Conv1D after the other with biases,
# and two linear layers beside attention
SHAPES = ("llama", "qwen3", "gemma2", "gpt2", "phi")
IDS = random_ids(2, 12)

each_shape = pytest.mark.parametrize("shape", SHAPES)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def config(variant: str = "routed", **kwargs) -> PerftConfig:
    settings = {"target_modules": "mlp", "rank": 4, "alpha": 8, **VARIANTS[variant]}
    return PerftConfig(variant=variant, task_type="CAUSAL_LM", **(settings | kwargs))


def perft(shape: str, variant: str = "routed", **kwargs) -> PeftModel:
    model = get_peft_model(tiny_causal_model(shape), config(variant, **kwargs))
    randomise_adapters(model)
    return model


def layers_of(model: nn.Module) -> dict[str, PerftLayer]:
    return {layer.block.name: layer for layer in model.modules() if isinstance(layer, PerftLayer)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def as_loops(layer: PerftLayer, x: Tensor) -> Tensor:
    """What the paper's formulas add for one token."""
    settings, down, up = layer.perft_config["default"], layer.perft_down["default"], layer.perft_up["default"]
    weights, indices = torch.ones(len(down)), torch.arange(len(down))
    if settings.variant == "routed":
        weights, indices = (layer.perft_router["default"] @ x).softmax(-1).topk(settings.num_experts_per_tok)
        weights = weights / weights.sum()
    return sum(w * settings.alpha / settings.rank * up[i] @ (down[i] @ x) for w, i in zip(weights, indices))


@each_variant
@each_shape
@torch.no_grad()
def test_logits_are_those_of_mlps_with_the_papers_sums_beside_them(shape, variant):
    model, bare = perft(shape, variant), tiny_causal_model(shape)
    assert [*layers_of(model)] == [mlp.name for mlp in find_dense_mlps(bare)]
    assert len(layers_of(model)) == 2
    for name, layer in layers_of(model).items():

        def add(mlp: nn.Module, args: tuple, output: Tensor, layer: PerftLayer = layer) -> Tensor:
            rows = [as_loops(layer, x) for x in args[0].flatten(0, -2)]
            return output + torch.stack(rows).view_as(output)

        bare.get_submodule(name).register_forward_hook(add)
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, bare(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert (logits - tiny_causal_model(shape)(input_ids=IDS).logits).abs().max() > 1e-3


@each_variant
@each_shape
def test_step_0_equals_the_base_exactly_and_so_do_disabled_adapters(shape, variant):
    base = tiny_causal_model(shape)
    expected = base(input_ids=IDS).logits
    model = get_peft_model(base, config(variant)).eval()
    assert torch.equal(model(input_ids=IDS).logits, expected)
    randomise_adapters(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert torch.equal(model.unload()(input_ids=IDS).logits, expected)


@each_variant
@each_shape
def test_saved_and_loaded_logits_are_bit_equal(shape, variant, tmp_path):
    model = perft(shape, variant).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_causal_model(shape), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
@each_shape
def test_checkpointing_has_the_same_gradients_with_router_losses(shape, use_reentrant):
    losses = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
    expected = gradients(perft(shape, **losses))
    model = perft(shape, **losses)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


@each_shape
def test_router_losses_are_those_added_to_the_loss(shape):
    """Through the same layers, with the losses as summands of the main one."""
    coefs = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
    found = gradients(perft(shape, **coefs))
    model, inputs = perft(shape, router_aux_loss_coef=0.0), {}
    for name, layer in layers_of(model).items():
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.__setitem__(name, args[0]))
    loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    for name, layer in layers_of(model).items():
        logits_TN = inputs[name].flatten(0, -2) @ layer.perft_router["default"].T
        probs_TN = logits_TN.softmax(-1)
        share_N = F.one_hot(probs_TN.topk(2).indices, 5).sum(1).float().mean(0)
        balance, z = 5 * (share_N * probs_TN.mean(0)).sum(), logits_TN.logsumexp(-1).square().mean()
        loss = loss + (0.5 * balance + 0.1 * z) / 2
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@each_shape
def test_padding_counts_in_no_statistic(shape):
    model, figures = perft(shape).train(), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # GPT-2's own, whose masks would be others
            module.p = 0.0
    for pad in (0, 5):
        ids, mask = F.pad(IDS, (0, pad), value=PAD), F.pad(torch.ones_like(IDS), (0, pad))
        counted: dict[str, Tensor] = {}
        model.base_model.statistics.of("default").record_usage = counted.__setitem__
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
        figures.append(counted)
    assert len(figures[0]) == 2
    for name, counts in figures[0].items():
        assert counts.sum() == IDS.numel() * 2
        assert torch.equal(figures[1][name], counts)


@each_shape
def test_training_moves_every_tensor_of_the_adapter_and_nothing_else(shape):
    model = perft(shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    gradients(model)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == trainable
    # 2 layers: 5 pairs (4, 32) and (32, 4), and a router (5, 32)
    assert model.get_nb_trainable_parameters()[0] == 2 * (5 * 2 * 4 * 32 + 5 * 32)
    rows = {row.part: (row.parameters, row.activated) for row in model.base_model.parameter_rows()}
    assert rows["experts"] == (2 * 5 * 2 * 4 * 32, 2 * 2 * 2 * 4 * 32)
    assert rows["router"] == (2 * 5 * 32, 2 * 5 * 32)


# ------------------------------------------------------------------------------------ which layers, what is refused


def mixed() -> nn.Module:
    return tiny_model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[0])


CHOSEN: dict[str, tuple[Callable[[], nn.Module], dict, list[int]]] = {
    "all of a dense model": (lambda: tiny_model("llama"), {"target_modules": "mlp"}, [0, 1]),
    "by name": (lambda: tiny_model("llama"), {"target_modules": ["layers.1.mlp"]}, [1]),
    "by a suffix": (lambda: tiny_model("llama"), {"target_modules": ["mlp"]}, [0, 1]),
    "by a regular expression": (lambda: tiny_model("gpt2"), {"target_modules": r".*\.1\.mlp"}, [1]),
    "by layers": (lambda: tiny_model("llama"), {"target_modules": "mlp", "layers_to_transform": 1}, [1]),
    "the dense layers of a mixed model": (mixed, {"target_modules": "mlp"}, [0]),
    "MoE blocks, without being asked": (mixed, {}, [1, 2]),
    "MoE blocks, by a suffix that fits both": (mixed, {"target_modules": ["mlp"]}, [1, 2]),
    "both": (mixed, {"target_modules": ["mlp", "layers.0.mlp"]}, [0, 1, 2]),
}


@pytest.mark.parametrize("what", CHOSEN)
def test_which_layers_are_adapted(what):
    base, keys, expected = CHOSEN[what]
    assert sorted(block.layer_index for block in select_blocks(base(), **keys)) == expected
    model = get_peft_model(base(), PerftConfig(task_type="CAUSAL_LM", **keys))
    randomise_adapters(model)
    assert model.base_model.adapted_layers == expected
    assert len(gradients(model)) == 3 * len(expected)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict, str]] = {
    "a dense model without being asked": (
        lambda: tiny_model("llama"),
        {},
        "no MoE block in LlamaForCausalLM .*`target_modules: mlp` adapts the 2 dense MLPs, or use `adapter: lora`",
    ),
    "an MoE without dense layers": (
        lambda: tiny_model("mixtral"),
        {"target_modules": "mlp"},
        "MixtralForCausalLM has none.*Leave the key out to adapt its MoE blocks: model.layers.0.mlp",
    ),
    "layers without an MLP of their own": (
        lambda: tiny_causal_model("opt"),
        {"target_modules": "mlp"},
        "OPTForCausalLM has none: no layer has an `mlp` or `feed_forward` .* Use `adapter: lora`",
    ),
    "a name that is none": (
        lambda: tiny_model("llama"),
        {"target_modules": ["q_proj"]},
        "'q_proj' matches no MoE block and no dense MLP. The dense MLPs are model.layers.0.mlp, model.layers.1.mlp;",
    ),
    "a layer that is none": (
        lambda: tiny_model("llama"),
        {"target_modules": "mlp", "layers_to_transform": [2]},
        r"layers_to_transform: \[2\] names no layer with a chosen dense MLP; there are such in layers \[0, 1\]",
    ),
    "embedded, by name": (
        lambda: tiny_model("llama"),
        {"target_modules": ["mlp"], "variant": "embedded"},
        r"perft.variant: embedded is not possible with LlamaMLP \(model.layers.0.mlp\): it is a dense MLP",
    ),
    "the base router's weights, by name": (
        mixed,
        {"target_modules": ["0.mlp"], "gate_weights": "base"},
        r"perft.gate_weights: base is not possible with Qwen3MoeMLP \(model.layers.0.mlp\): it is a dense MLP",
    ),
    "the base router's loss, by name": (
        lambda: tiny_model("llama"),
        {"target_modules": ["mlp"], "base_router_aux_loss_coef": 0.1},
        "perft.base_router_aux_loss_coef is not possible with LlamaMLP",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_the_base_unharmed(what):
    make, keys, message = REFUSED[what]
    base = make()
    modules = [*base.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, PerftConfig(task_type="CAUSAL_LM", **keys))
    assert [*base.modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"variant": "embedded"}, "variant: embedded"),
        ({"gate_weights": "base"}, "gate_weights: base"),
        ({"base_router_aux_loss_coef": 0.01}, "base_router_aux_loss_coef: 0.01"),
    ],
)
def test_what_needs_a_base_router_is_refused_before_there_is_a_model(keys, key):
    with pytest.raises(
        ValueError, match=f"perft.{key} does not go with target_modules: mlp.*no experts and no router"
    ):
        PerftConfig(target_modules="mlp", **keys)


@pytest.mark.parametrize(("asked", "expected"), [(None, True), (False, False)])
def test_weights_sum_to_one_unless_asked_otherwise(asked, expected):
    for layer in layers_of(perft("llama", norm_topk_prob=asked)).values():
        assert layer.norm_topk_prob["default"] is expected


def test_a_copy_and_two_adapters_are_independent(tmp_path: Path):
    model = perft("llama").eval()
    expected = model(input_ids=IDS).logits
    randomise_adapters(copy.deepcopy(model), seed=2)
    model.add_adapter("second", config("single"))
    assert torch.equal(model(input_ids=IDS).logits, expected)
    model.set_adapter("second")
    assert torch.equal(model(input_ids=IDS).logits, tiny_causal_model("llama")(input_ids=IDS).logits)
