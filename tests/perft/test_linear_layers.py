"""Plain low-rank updates of named linear layers in a PERFT adapter: PEFT's LoRA, beside the adapters of the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft.linear import PerftLinear
from tests.tiny_models import random_ids, randomise_adapters, tiny_model

VARIANTS = {"routed": {"num_experts": 3}, "embedded": {}, "dense": {"num_experts": 2}, "single": {}}
ATTENTION = ["q_proj", "v_proj"]
IDS = random_ids(3, 10)
# float32: LoRA multiplies by its scale elsewhere
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}

each_variant = pytest.mark.parametrize("variant", VARIANTS)


def perft(family: str = "mixtral", variant: str = "routed", **kwargs: Any) -> PeftModel:
    settings = {"rank": 4, "linear_target_modules": ATTENTION, "linear_rank": 3, "linear_alpha": 5}
    config = PerftConfig(variant=variant, task_type="CAUSAL_LM", **(settings | VARIANTS[variant] | kwargs))
    return get_peft_model(tiny_model(family), config)


def linear_layers(model: nn.Module) -> dict[str, PerftLinear]:
    return {name.partition("model.")[2]: m for name, m in model.named_modules() if isinstance(m, PerftLinear)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("family", "targets"), [("mixtral", ATTENTION), ("gpt2", ["c_attn"])])
def test_they_are_pefts_lora(family: str, targets: list[str]) -> None:
    """The blocks' adapters add nothing here: their up-projections are 0."""
    keys = {"target_modules": "mlp"} if family == "gpt2" else {}
    model = perft(family, "single", linear_target_modules=targets, **keys)
    lora_config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=family == "gpt2")
    lora, generator = get_peft_model(tiny_model(family), lora_config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, layer in linear_layers(model).items():
            twin = lora.base_model.model.get_submodule(name.removeprefix("model."))
            pairs = ((layer.perft_linear_down, twin.lora_A), (layer.perft_linear_up, twin.lora_B))
            for ours, theirs in pairs:
                weight = torch.randn(ours["default"].shape, generator=generator) * 0.3
                ours["default"].copy_(weight)
                theirs["default"].weight.copy_(weight)
    for each in (model, lora):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    logits = lora(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, logits, **TOLERANCE)
    assert (logits - tiny_model(family)(input_ids=IDS).logits).abs().max() > 0.01
    names = {"perft_linear_down.default": "lora_A.default.weight", "perft_linear_up.default": "lora_B.default.weight"}
    expected, compared = gradients(lora), 0
    for name, gradient in gradients(model).items():
        for ours, theirs in names.items():
            if name.endswith(ours):
                torch.testing.assert_close(gradient, expected[name.replace(ours, theirs)], rtol=1e-3, atol=1e-6)
                compared += 1
    assert compared == len(expected)


@each_variant
def test_both_parts_act_and_learn_beside_each_other(variant: str) -> None:
    base = tiny_model("mixtral")(input_ids=IDS).logits
    model = perft(variant=variant)
    assert torch.equal(model(input_ids=IDS).logits, base)  # step 0
    randomise_adapters(model, std=0.3)
    both = model.eval()(input_ids=IDS).logits
    for part in ("perft_linear_up", "perft_up"):
        without = perft(variant=variant).eval()
        without.load_state_dict(model.state_dict())
        for name, parameter in without.named_parameters():
            if name.endswith(f"{part}.default"):
                nn.init.zeros_(parameter)
        assert (without(input_ids=IDS).logits - both).abs().max() > 1e-3, part
    for name, gradient in gradients(model).items():
        assert gradient.abs().sum() > 0, name
    with model.disable_adapter():
        assert torch.equal(model.eval()(input_ids=IDS).logits, base)


def test_dropout_takes_parts_of_their_input_in_training_only() -> None:
    layer = next(iter(linear_layers(perft(dropout=0.5, linear_rank=1, linear_alpha=1)).values()))
    down_RI, up_OR = layer.perft_linear_down["default"], layer.perft_linear_up["default"]
    with torch.no_grad():  # an update that copies the first input to the first output
        down_RI.zero_()[0, 0] = 1.0
        up_OR.zero_()[0, 0] = 1.0
    x = torch.ones(200, layer.in_features)
    added = [layer.train(mode)(x) - layer.base_layer(x) for mode in (True, False)]
    assert set(added[0][:, 0].detach().round(decimals=4).tolist()) == {0.0, 2.0}
    torch.testing.assert_close(added[1][:, 0], torch.ones(200), **TOLERANCE)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_has_the_same_gradients(use_reentrant: bool) -> None:
    models = [perft(router_aux_loss_coef=0.5) for _ in range(2)]
    for model in models:
        randomise_adapters(model)
    models[1].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    models[1].enable_input_require_grads()
    expected = gradients(models[0])
    for name, gradient in gradients(models[1]).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


def test_names_shapes_and_counts_are_the_documented_ones(tmp_path) -> None:
    model = perft()
    model.save_pretrained(tmp_path)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    prefix = "base_model.model.model.layers.1.self_attn"
    assert shapes[f"{prefix}.v_proj.perft_linear_down"] == (3, 32)
    assert shapes[f"{prefix}.v_proj.perft_linear_up"] == (16, 3)
    rows = {row.part: (row.tensors, row.parameters, row.activated) for row in model.base_model.parameter_rows()}
    count = 2 * 3 * (32 + 32 + 32 + 16)
    assert rows["linear"] == (8, count, count)
    assert rows["other"] == (0, 0, 0)
    assert sum(row[1] for row in rows.values()) == model.get_nb_trainable_parameters()[0]
    assert "linear" not in [row.part for row in perft(linear_target_modules=None).base_model.parameter_rows()]


def test_dropout_is_the_adapters_and_off_in_evaluation() -> None:
    model = perft(variant="single", dropout=0.5)
    randomise_adapters(model)
    assert torch.equal(model.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)
    layer = next(iter(linear_layers(model.train()).values()))
    x, total = torch.randn(4, 32), torch.zeros(4, 32)
    for seed in range(2000):
        torch.manual_seed(seed)
        total += layer._delta("default", x).detach()
    torch.testing.assert_close(total / 2000, layer.eval()._delta("default", x), atol=0.02, rtol=0.1)


CHOSEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "by names": ({"linear_target_modules": ["o_proj", "1.self_attn.q_proj"]}, ["0.o", "1.q", "1.o"]),
    "by a regular expression": ({"linear_target_modules": r".*\.0\.self_attn\.[qk]_proj"}, ["0.q", "0.k"]),
    "in the chosen decoder layers": ({"layers_to_transform": [1]}, ["1.q", "1.v"]),
    "all outside the blocks": (
        {"linear_target_modules": "all-linear"},
        ["0.q", "0.k", "0.v", "0.o", "1.q", "1.k", "1.v", "1.o"],
    ),
}


@pytest.mark.parametrize("how", CHOSEN)
def test_which_layers_are_updated(how: str) -> None:
    keys, expected = CHOSEN[how]
    for family, more in (("mixtral", {}), ("llama", {"target_modules": "mlp"})):
        found = linear_layers(perft(family, "single", **keys, **more))
        names = [name.removeprefix("model.model.layers.").removesuffix("_proj").split(".") for name in found]
        assert sorted(f"{parts[0]}.{parts[-1]}" for parts in names) == sorted(expected)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing": ("mixtral", {"linear_target_modules": ["query"]}, "'query' matches no module of MixtralForCausalLM"),
    "no linear layer": ("mixtral", {"linear_target_modules": ["self_attn"]}, "self_attn, which is no linear layer"),
    "in an adapted MLP": (
        "llama",
        {"target_modules": "mlp", "linear_target_modules": ["q_proj", "up_proj"]},
        "matches model.layers.0.mlp.up_proj, which is in model.layers.0.mlp: an adapter goes beside that as a whole",
    ),
    "in other layers": (
        "mixtral",
        {"layers_to_transform": [0], "linear_target_modules": ["1.self_attn.q_proj"]},
        "matches no linear layer outside the blocks of the chosen decoder layers",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_the_base_unharmed(what: str) -> None:
    family, keys, message = REFUSED[what]
    base = tiny_model(family)
    modules = [*base.modules()]
    with pytest.raises(ValueError, match=f"^perft.linear_target_modules: .*{message}"):
        get_peft_model(base, PerftConfig(variant="single", task_type="CAUSAL_LM", **keys))
    assert [*base.modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"linear_target_modules": []}, r"linear_target_modules: \[\] names no layer"),
        ({"linear_target_modules": "q_proj("}, r"linear_target_modules: 'q_proj\(' is no regular expression"),
        ({"linear_rank": 0}, "linear_rank: 0 is not allowed; it is an integer of at least 1"),
        ({"linear_alpha": 0}, "linear_alpha: 0 is not allowed; it is a number above 0"),
    ],
)
def test_values_out_of_range_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerftConfig(**keys)


def test_rank_and_scale_without_layers_mean_nothing() -> None:
    assert {"linear_rank", "linear_alpha"} <= set(PerftConfig().idle_fields)
    assert not {"linear_rank", "linear_alpha"} & set(PerftConfig(linear_target_modules=ATTENTION).idle_fields)


def test_adapters_with_and_without_them_switch(tmp_path) -> None:
    model = perft().eval()
    randomise_adapters(model, std=0.3)
    expected = model(input_ids=IDS).logits
    model.add_adapter("plain", PerftConfig(variant="single", task_type="CAUSAL_LM"))
    assert torch.equal(model(input_ids=IDS).logits, expected)
    model.set_adapter("plain")
    assert torch.equal(model(input_ids=IDS).logits, tiny_model("mixtral")(input_ids=IDS).logits)
    model.set_adapter("default")
    model.delete_adapter("plain")
    assert torch.equal(model(input_ids=IDS).logits, expected)
