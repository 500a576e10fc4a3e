"""PerftConfig: defaults, refusals and files; and which MoE blocks a configuration chooses."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from peft import PeftConfig, PeftType, get_peft_model
from transformers import AfmoeConfig, AfmoeForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft.selection import select_blocks
from axolotl_moe_peft.shared.config import ModulesToSaveConfig
from tests.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

# The keys of the `perft:` block, which are the config's own fields, with their defaults.
DEFAULTS = {
    "variant": "routed",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "experts": None,
    "expert_ids": None,
    "rank_allocation": None,
    "expert_type": "lora",
    "rank": 16,
    "alpha": 32,
    "dropout": 0.0,
    "hidden_act": "silu",
    "norm_topk_prob": None,
    "gate_weights": "own",
    "init": "zero",
    "router_aux_loss_coef": 0.01,
    "router_aux_loss_scope": "micro_batch",
    "router_z_loss_coef": 0.0,
    "base_router_aux_loss_coef": 0.0,
    "target_modules": None,
    "layers_to_transform": None,
    "linear_target_modules": None,
    "linear_rank": 16,
    "linear_alpha": 32,
}
NOT_ROUTED = ("embedded", "dense", "single")


def own_values(config: PerftConfig) -> dict:
    inherited = {f.name for f in dataclasses.fields(ModulesToSaveConfig)}
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in inherited}


def test_defaults_are_the_contracts():
    assert own_values(PerftConfig()) == DEFAULTS


def test_every_key_has_a_help_text():
    assert all(f.metadata["help"] for f in dataclasses.fields(PerftConfig) if f.name in DEFAULTS)


@pytest.mark.parametrize(
    ("variant", "counts"),
    [("routed", (4, 2)), ("dense", (4, None)), ("single", (None, None)), ("embedded", (None, None))],
)
def test_expert_counts_default_only_where_they_mean_something(variant, counts):
    config = PerftConfig(variant=variant)
    assert (config.num_experts, config.num_experts_per_tok) == counts


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("variant", "route", ["routed", "embedded", "dense", "single"]),
        ("variant", None, ["routed", "embedded", "dense", "single"]),
        ("expert_type", "adapter", ["lora", "parallel_adapter"]),
        ("gate_weights", "adapter", ["own", "base"]),
        ("init", "kaiming", ["zero", "paper"]),
        ("num_experts", 0, ["integer of at least 1"]),
        ("num_experts", 2.0, ["integer of at least 1"]),
        ("num_experts", True, ["integer of at least 1"]),
        ("num_experts_per_tok", 0, ["integer of at least 1"]),
        ("num_experts_per_tok", 5, ["num_experts (4)"]),
        ("rank", 0, ["integer of at least 1"]),
        ("rank", -4, ["integer of at least 1"]),
        ("rank", 2.5, ["integer of at least 1"]),
        ("rank", True, ["integer of at least 1"]),
        ("alpha", 0, ["above 0"]),
        ("alpha", -1.0, ["above 0"]),
        ("alpha", math.nan, ["above 0"]),
        ("dropout", 1.0, ["from 0 to below 1"]),
        ("dropout", -0.1, ["from 0 to below 1"]),
        ("dropout", math.nan, ["from 0 to below 1"]),
        ("router_aux_loss_coef", -0.01, ["at least 0"]),
        ("router_z_loss_coef", -1e-3, ["at least 0"]),
        ("base_router_aux_loss_coef", -0.02, ["at least 0"]),
        ("router_aux_loss_coef", math.nan, ["at least 0"]),
        ("hidden_act", "silo", ["silu", "gelu", "relu"]),
    ],
)
def test_a_bad_value_names_the_key_the_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ValueError) as error:
        PerftConfig(**{key: value})
    message = str(error.value)
    assert message.startswith(f"perft.{key}: ")
    assert repr(value) in message
    assert all(text in message for text in allowed)


@pytest.mark.parametrize(
    ("variant", "key", "value"),
    [
        ("dense", "num_experts_per_tok", 2),
        *((variant, key, 3) for variant in ("single", "embedded") for key in ("num_experts", "num_experts_per_tok")),
        *((variant, "norm_topk_prob", value) for variant in NOT_ROUTED for value in (True, False)),
        *((variant, "gate_weights", "base") for variant in NOT_ROUTED),
    ],
)
def test_a_key_that_means_nothing_with_the_variant_is_refused(variant, key, value):
    with pytest.raises(ValueError) as error:
        PerftConfig(variant=variant, **{key: value})
    message = str(error.value)
    assert message.startswith(f"perft.{key}: ")
    assert str(value) in message
    assert f"variant {variant}" in message
    assert "out." in message  # leave it, or the key, out


def test_limits_themselves_are_allowed():
    PerftConfig(num_experts=1, num_experts_per_tok=1, rank=1, alpha=1e-3, dropout=0.0)
    PerftConfig(num_experts=3, num_experts_per_tok=3, dropout=0.99, router_aux_loss_coef=0, router_z_loss_coef=5)
    PerftConfig(variant="dense", num_experts=1, expert_type="parallel_adapter", hidden_act="gelu_new")


@pytest.mark.parametrize(
    "settings",
    [
        {
            "variant": "routed",
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "rank": 6,
            "alpha": 12.5,
            "dropout": 0.05,
            "norm_topk_prob": True,
            "gate_weights": "base",
            "init": "paper",
            "router_aux_loss_coef": 0.02,
            "router_z_loss_coef": 0.001,
            "base_router_aux_loss_coef": 0.03,
            "target_modules": ["0.mlp", "1.mlp"],
            "layers_to_transform": [0],
        },
        {"variant": "dense", "num_experts": 2, "expert_type": "parallel_adapter", "hidden_act": "gelu"},
        {"variant": "embedded", "target_modules": r".*\.mlp", "layers_to_transform": 1},
        {"variant": "single", "alpha": 7},
        {"norm_topk_prob": False},
        {},
    ],
    ids=lambda settings: settings.get("variant", "defaults" if not settings else "false"),
)
def test_a_saved_config_comes_back_the_same(tmp_path, settings):
    config = PerftConfig(task_type="CAUSAL_LM", base_model_name_or_path="some/base", **settings)
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    for config_class in (PerftConfig, PeftConfig):  # the latter finds the class by peft_type
        loaded = config_class.from_pretrained(tmp_path)
        assert type(loaded) is PerftConfig
        assert own_values(loaded) == own_values(config)
        assert own_values(loaded) == own_values(config) | settings
        assert (loaded.task_type, loaded.base_model_name_or_path) == ("CAUSAL_LM", "some/base")


def test_the_file_says_perft_and_has_no_field_of_a_lora(tmp_path):
    assert PerftConfig().peft_type is PeftType.PERFT
    PerftConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "PERFT"
    assert "r" not in saved  # with it, Axolotl's default merge writes the bare base model as if merged
    assert {key: saved[key] for key in DEFAULTS} == DEFAULTS


def test_a_bad_value_in_a_saved_file_is_refused(tmp_path):
    PerftConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"variant": "routed"', '"variant": "routing"'))
    with pytest.raises(ValueError, match=r"perft\.variant: 'routing' is not known"):
        PeftConfig.from_pretrained(tmp_path)


def names(model: PreTrainedModel, **chosen) -> list[str]:
    """Names of the chosen blocks, which are exactly those that get adapted."""
    blocks = select_blocks(model, **chosen)
    for block in blocks:
        assert model.get_submodule(block.name) is block.module
    expected = [block.name for block in blocks]
    adapted = get_peft_model(model, PerftConfig(variant="single", task_type="CAUSAL_LM", **chosen))
    assert adapted.targeted_module_names == expected
    adapted.unload()
    return expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_chosen_by_default(family):
    model = tiny_model(family)
    blocks = select_blocks(model)
    assert names(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [block.layer_index for block in blocks] == [0, 1]
    for block, layer in zip(blocks, model.model.layers, strict=True):
        assert (block.router, block.experts) == (layer.mlp.gate, layer.mlp.experts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("target_modules", "layers"),
    [
        (["mlp"], [0, 1]),
        (["model.layers.1.mlp"], [1]),
        (["0.mlp"], [0]),
        (["layers.1.mlp", "layers.0.mlp"], [0, 1]),
        (("1.mlp",), [1]),
        (r".*\.mlp", [0, 1]),
        (r"model\.layers\.[1-9]\.mlp", [1]),
        ("model.layers.0.mlp", [0]),
    ],
    ids=str,
)
def test_names_suffixes_and_one_regex_choose(family, target_modules, layers):
    assert names(tiny_model(family), target_modules=target_modules) == [f"model.layers.{i}.mlp" for i in layers]


def test_a_suffix_is_one_of_whole_names():
    model = tiny_model("mixtral", num_hidden_layers=12)
    assert names(model, target_modules=["1.mlp"]) == ["model.layers.1.mlp"]
    with pytest.raises(ValueError, match="'lp' matches no MoE block"):
        select_blocks(model, target_modules=["lp"])


@pytest.mark.parametrize(
    ("layers_to_transform", "layers"), [(1, [1]), (0, [0]), ([0], [0]), ([3, 1], [1, 3])], ids=str
)
def test_layers_choose(layers_to_transform, layers):
    model = tiny_model("olmoe", num_hidden_layers=4)
    assert names(model, layers_to_transform=layers_to_transform) == [f"model.layers.{i}.mlp" for i in layers]


def test_layers_choose_among_the_target_modules():
    model = tiny_model("mixtral", num_hidden_layers=4)
    targets = r"model\.layers\.[123]\.mlp"
    assert names(model, target_modules=targets, layers_to_transform=[3, 2]) == [
        f"model.layers.{i}.mlp" for i in (2, 3)
    ]
    with pytest.raises(ValueError, match=r"layers_to_transform: \[0\] .* layers \[1, 2, 3\]"):
        select_blocks(model, target_modules=targets, layers_to_transform=[0, 2])


def test_dense_layers_of_a_mixed_model_are_left_alone():
    model = tiny_model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])
    assert names(model) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    with pytest.raises(ValueError, match=r"layers_to_transform: \[1\] .* layers \[0, 2\]"):
        select_blocks(model, layers_to_transform=[1])


def test_a_gate_without_experts_beside_it_is_no_block():
    # AFMoE's router holds a `gate` of its own, and its first layers are dense
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    layers = {"num_hidden_layers": 3, "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}
    model = AfmoeForCausalLM(AfmoeConfig(**sizes, **heads, **layers))
    assert "model.layers.1.mlp.router.gate" in dict(model.named_modules())
    assert names(model) == ["model.layers.1.mlp", "model.layers.2.mlp"]


def test_an_adapted_model_has_the_same_blocks():
    model = tiny_model("mixtral")
    before = [(b.name, b.module, b.router, b.experts) for b in select_blocks(model)]
    get_peft_model(model, PerftConfig(task_type="CAUSAL_LM"))
    assert [(b.name, b.module, b.router, b.experts) for b in select_blocks(model)] == before


def test_a_dense_base_is_refused_with_what_was_looked_for():
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    for attach in (select_blocks, lambda base: get_peft_model(base, PerftConfig(task_type="CAUSAL_LM"))):
        with pytest.raises(ValueError) as error:
            attach(model)
        message = str(error.value)
        for text in ("LlamaForCausalLM", "llama", "`gate` or `router`", "`experts`", "`adapter: lora`"):
            assert text in message


@pytest.mark.parametrize(
    ("target_modules", "named"),
    [
        (["q_proj"], "'q_proj'"),
        (["mlp", "feed_forward"], "'feed_forward'"),
        (["mlp.experts"], "'mlp.experts'"),
        ("mlps", "'mlps'"),  # a string is a regular expression for the whole name
        ([], "[]"),
        ("", "''"),
    ],
    ids=str,
)
def test_target_modules_that_match_nothing_are_named_beside_what_there_is(target_modules, named):
    model = tiny_model("mixtral")
    config = PerftConfig(target_modules=target_modules, task_type="CAUSAL_LM")
    for attach in (lambda: select_blocks(model, target_modules), lambda: get_peft_model(model, config)):
        with pytest.raises(ValueError) as error:
            attach()
        message = str(error.value)
        assert message.startswith(f"perft.target_modules: {named} matches no MoE block")
        assert "model.layers.0.mlp, model.layers.1.mlp" in message


@pytest.mark.parametrize(
    ("layers_to_transform", "named"), [(2, [2]), ([0, 7], [7]), ([-1], [-1]), ([], []), ([5, 9], [5, 9])], ids=str
)
def test_layers_out_of_range_are_named_beside_what_there_is(layers_to_transform, named):
    model = tiny_model("mixtral")
    config = PerftConfig(layers_to_transform=layers_to_transform, task_type="CAUSAL_LM")
    for attach in (
        lambda: select_blocks(model, layers_to_transform=layers_to_transform),
        lambda: get_peft_model(model, config),
    ):
        with pytest.raises(ValueError) as error:
            attach()
        message = str(error.value)
        assert message.startswith(f"perft.layers_to_transform: {named} ")
        assert "layers [0, 1]" in message


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, None),
        ({"router_aux_loss_coef": 0.0}, "router_aux_loss_coef"),
        ({"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1}, "router_aux_loss_coef"),
        ({"router_aux_loss_coef": 0.0, "base_router_aux_loss_coef": 0.1}, None),
        ({"variant": "embedded"}, "base_router_aux_loss_coef"),
        ({"variant": "embedded", "base_router_aux_loss_coef": 0.1}, None),
    ],
)
def test_the_scope_of_a_balance_loss_needs_one(settings, needs):
    idle = PerftConfig(**settings).idle_fields.get("router_aux_loss_scope")
    assert idle == (needs and (needs, 0.01))
