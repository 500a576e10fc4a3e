"""TTLoraConfig: defaults, refusals and files; and which layers and factors a configuration chooses."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from peft import PeftConfig, PeftModel, PeftType, get_peft_model

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.shared.config import ModulesToSaveConfig
from axolotl_moe_peft.tt_lora.factors import Factors, auto_factors
from tests.tiny_models import tiny_model

DEFAULTS = {
    "rank": 5,
    "alpha": 16,
    "dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "factors": "auto",
    "num_cores": None,
    "init": "normalized",
}


def own_values(config: TTLoraConfig) -> dict:
    return {key: getattr(config, key) for key in DEFAULTS}


def adapted(family: str = "llama", **kwargs) -> PeftModel:
    return get_peft_model(tiny_model(family), TTLoraConfig(task_type="CAUSAL_LM", **kwargs))


def factors_of(model: PeftModel) -> dict[str, Factors]:
    return {name: model.get_base_model().get_submodule(name).factors["default"] for name in targets(model)}


def targets(model: PeftModel) -> list[str]:
    return model.base_model.targeted_module_names


def test_defaults_are_the_contracts_and_have_a_help_text():
    inherited = {f.name for f in dataclasses.fields(ModulesToSaveConfig)}
    own = [f for f in dataclasses.fields(TTLoraConfig) if f.name not in inherited]
    assert {f.name for f in own} == set(DEFAULTS)
    assert own_values(TTLoraConfig()) == DEFAULTS
    assert all(f.metadata["help"] for f in own)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("rank", 0, "integer of at least 1"),
        ("rank", 2.0, "integer of at least 1"),
        ("rank", True, "integer of at least 1"),
        ("alpha", 0, "above 0"),
        ("alpha", -16, "above 0"),
        ("alpha", math.nan, "above 0"),
        ("alpha", math.inf, "above 0"),
        ("dropout", 1.0, "from 0 to below 1"),
        ("dropout", -0.1, "from 0 to below 1"),
        ("num_cores", 1, "integer of at least 2"),
        ("num_cores", 4.0, "integer of at least 2"),
        ("init", "kaiming", "normalized, zero"),
        ("target_modules", None, "list of names"),
        ("target_modules", [], "list of names"),
        ("target_modules", "", "list of names"),
        ("factors", "balanced", "auto, or a map"),
        ("factors", {}, "auto, or a map"),
        ("factors", None, "auto, or a map"),
    ],
)
def test_a_bad_value_names_the_key_the_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ValueError) as error:
        TTLoraConfig(**{key: value})
    message = str(error.value)
    assert message.startswith(f"tt_lora.{key}: {value!r} ") and allowed in message


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([16, 2], "two keys `in` and `out`"),
        ({"in": [32]}, "two keys `in` and `out`"),
        ({"in": [32], "out": [32], "rank": 4}, "two keys `in` and `out`"),
        ({"in": [32], "out": 32}, "q_proj.out has 32; it is a list of integers"),
        ({"in": [], "out": [32]}, r"q_proj.in has \[\]; it is a list of integers"),
        ({"in": [32, 1], "out": [32]}, r"q_proj.in has \[32, 1\]; it is a list of integers of at least 2"),
        ({"in": [32], "out": [8, 4.0]}, "q_proj.out has .*integers of at least 2"),
    ],
)
def test_a_malformed_map_of_factors_is_refused(entry, message):
    with pytest.raises(ValueError, match=rf"tt_lora\.factors: .*{message}"):
        TTLoraConfig(factors={"q_proj": entry})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 3, "alpha": 0.5, "dropout": 0.1, "num_cores": 6, "init": "zero", "target_modules": "all-linear"},
        {"factors": {"self_attn.q_proj": {"in": [8, 4], "out": [4, 8]}}, "target_modules": ["q_proj"]},
    ],
)
def test_a_saved_config_comes_back_the_same(tmp_path, settings):
    config = TTLoraConfig(task_type="CAUSAL_LM", **settings)
    assert config.peft_type is PeftType.TT_LORA
    config.save_pretrained(tmp_path)
    for config_class in (TTLoraConfig, PeftConfig):  # the latter finds the class by peft_type
        loaded = config_class.from_pretrained(tmp_path)
        assert type(loaded) is TTLoraConfig
        assert own_values(loaded) == DEFAULTS | settings
    assert "r" not in json.loads((tmp_path / "adapter_config.json").read_text())


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (
            ["q_proj", "v_proj"],
            ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"],
        ),
        (["layers.1.self_attn.o_proj"], ["1.self_attn.o_proj"]),
        (["model.layers.0.mlp.up_proj"], ["0.mlp.up_proj"]),
        (r".*\.0\..*(up|down)_proj", ["0.mlp.up_proj", "0.mlp.down_proj"]),
    ],
    ids=str,
)
def test_names_suffixes_and_one_regex_choose(chosen, expected):
    assert targets(adapted(target_modules=chosen)) == [f"model.layers.{name}" for name in expected]


@pytest.mark.parametrize(
    ("family", "chosen", "named"),
    [
        ("gpt2", ["q_proj", "v_proj"], "'q_proj', 'v_proj' matches no module of GPT2LMHeadModel"),
        ("llama", ["q_proj", "query"], "'query' matches no module"),
        ("llama", "q_proj", "the regular expression 'q_proj' matches no module"),
        ("llama", ["mlp"], "matches model.layers.0.mlp, which is no linear layer but LlamaMLP"),
        ("llama", ["embed_tokens"], "matches model.embed_tokens, which is no linear layer but Embedding"),
        ("mixtral", ["experts"], "matches model.layers.0.mlp.experts, which is no linear layer but MixtralExperts"),
        ("llama", r".*self_attn.*", "which is no linear layer but LlamaAttention"),
    ],
)
def test_targets_that_are_no_linear_layer_are_refused_beside_what_there_is(family, chosen, named):
    base = tiny_model(family)
    with pytest.raises(ValueError) as error:
        get_peft_model(base, TTLoraConfig(target_modules=chosen))
    message = str(error.value)
    assert message.startswith("tt_lora.target_modules: ") and named in message
    assert ("c_attn, c_fc, c_proj, lm_head" if family == "gpt2" else "k_proj, lm_head, ") in message
    assert [n for n, _ in base.named_modules()] == [n for n, _ in tiny_model(family).named_modules()]  # left as it was


# ------------------------------------------------------------------------------------------------------------- factors


def test_factors_are_chosen_by_the_longest_matching_name_and_otherwise_automatically():
    given = {
        "q_proj": {"in": [8, 4], "out": [4, 8]},
        "layers.1.self_attn.q_proj": {"in": [2, 2, 8], "out": [32]},
    }
    chosen = factors_of(adapted(factors=given))
    assert chosen["model.layers.0.self_attn.q_proj"] == Factors((8, 4), (4, 8))
    assert chosen["model.layers.1.self_attn.q_proj"] == Factors((2, 2, 8), (32,))
    for i in range(2):
        assert chosen[f"model.layers.{i}.self_attn.v_proj"] == auto_factors(32, 16, 5)


def test_conv1d_takes_its_inputs_first():
    chosen = factors_of(adapted("gpt2", target_modules=["c_attn"], factors={"c_attn": {"in": [32], "out": [12, 8]}}))
    assert set(chosen.values()) == {Factors((32,), (12, 8))}


@pytest.mark.parametrize("num_cores", [2, 5, 10, 99])
def test_num_cores_is_a_wish(num_cores):
    chosen = factors_of(adapted(target_modules=["q_proj"], num_cores=num_cores))
    assert {len(f.tt_shape) for f in chosen.values()} == {min(num_cores, 10)}  # 32 = 2^5 has five factors


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"in": [8, 8], "out": [4, 8]},
            "q_proj.in: model.layers.0.self_attn.q_proj has 32 inputs, but [8, 8] multiply to 64. The nearest that "
            "do: [4, 8] or [8, 4].",
        ),
        (
            {"in": [8, 4], "out": [4, 4]},
            "q_proj.out: model.layers.0.self_attn.q_proj has 32 outputs, but [4, 4] multiply to 16. The nearest that "
            "do: [4, 8] or [8, 4].",
        ),
    ],
)
def test_factors_of_another_size_show_their_product_and_the_nearest(entry, message):
    with pytest.raises(ValueError) as error:
        adapted(factors={"q_proj": entry})
    assert str(error.value) == f"tt_lora.factors: {message}"


def test_factors_of_a_module_that_is_no_target_are_refused():
    with pytest.raises(ValueError, match=r"tt_lora.factors: 'o_proj' is none of the target .* q_proj, v_proj\."):
        adapted(factors={"o_proj": {"in": [32], "out": [32]}})


@pytest.mark.parametrize(
    ("settings", "cores", "names", "rank", "wasted", "parameters"),
    [
        # (2, 4, 4 | 8, 4) of rank 5 against ranks 2, 5, 5, 4: 10 + 100 + 100 + 200 + 20, and 4 + 40 + 100 + 160 + 16
        (
            {"factors": {"q_proj": {"in": [2, 4, 4], "out": [4, 8]}}},
            [2, 4, 4, 8, 4],
            "model.layers.0.self_attn.q_proj (one of 2 such layers)",
            2,
            110,
            430,
        ),
        # (4, 8 | 2, 16) of rank 5 against ranks 4, 5, 5: 20 + 200 + 50 + 80, and 16 + 160 + 50 + 80
        (
            {
                "target_modules": ["layers.1.self_attn.q_proj", "v_proj"],
                "factors": {"q_proj": {"in": [4, 8], "out": [16, 2]}},
            },
            [4, 8, 2, 16],
            "model.layers.1.self_attn.q_proj",
            4,
            44,
            350,
        ),
        # 32 inputs and 16 outputs hold no more than 16, however they are factorised
        (
            {"rank": 17, "target_modules": ["v_proj"], "num_cores": 2},
            [32, 16],
            "model.layers.0.self_attn.v_proj (one of 2 such layers)",
            16,
            48,
            816,
        ),
    ],
)
def test_a_rank_that_a_cut_cannot_hold_is_warned_of_once_for_each_shape(
    settings, cores, names, rank, wasted, parameters
):
    with pytest.warns(UserWarning) as caught:
        adapted(**settings)
    (message,) = [str(w.message) for w in caught if "tt_lora" in str(w.message)]
    asked = settings.get("rank", 5)
    assert message.startswith(f"tt_lora.rank: {asked} is more than the cores {cores} of {names} can hold: ")
    assert f"rank {rank}, and {wasted} of the {parameters} parameters" in message


def test_a_rank_that_every_cut_holds_is_not_warned_of(recwarn):
    adapted(rank=5)
    adapted(rank=2, factors={"q_proj": {"in": [2, 4, 4], "out": [2, 16]}})
    adapted(rank=16, target_modules=["v_proj"], num_cores=2)
    assert not [w for w in recwarn if "tt_lora" in str(w.message)]


def test_loading_for_inference_does_not_warn_of_the_rank_again(tmp_path, recwarn):
    with pytest.warns(UserWarning, match="tt_lora.rank"):
        adapted(rank=40).save_pretrained(tmp_path)
    recwarn.clear()
    PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert not [w for w in recwarn if "tt_lora" in str(w.message)]
