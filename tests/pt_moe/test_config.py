"""PTMoeConfig: defaults, refusals and files."""

from __future__ import annotations

import dataclasses
import json

import pytest
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from axolotl_moe_peft import PTMoeConfig, PTMoeModel
from axolotl_moe_peft.shared.config import ModulesToSaveConfig
from tests.tiny_models import tiny_model

# The keys of the `pt_moe:` block, which are the config's own fields, with their defaults.
DEFAULTS = {
    "num_virtual_tokens": 40,
    "num_experts": 2,
    "rank": 36,
    "top_k": None,
    "center_router_input": None,
    "router_noise_std": 0.1,
    "scale_by_router_prob": True,
    "init_text": None,
    "router_input": "prompt",
    "router_aux_loss_coef": 0.0,
    "router_aux_loss_scope": "micro_batch",
}


def own_values(config: PTMoeConfig) -> dict:
    inherited = {f.name for f in dataclasses.fields(ModulesToSaveConfig)}
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in inherited}


def test_defaults_are_the_contracts():
    assert own_values(PTMoeConfig()) == DEFAULTS
    assert PTMoeConfig().peft_type == PeftType.PT_MOE


def test_peft_knows_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["PT_MOE"] is PTMoeConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["PT_MOE"] is PTMoeModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["PT_MOE"] == "ptmoe_"  # `pt_moe_` is part of `gpt_moe_`


@pytest.mark.parametrize(
    ("keys", "centers", "top_k"),
    [
        ({}, True, 3),
        ({"num_experts": 1}, False, 1),
        ({"top_k": 1}, True, 1),
        ({"center_router_input": False}, False, 1),
        ({"router_aux_loss_coef": 0.1}, True, 1),
        ({"router_aux_loss_coef": 0.1, "scale_by_router_prob": False}, True, 1),
    ],
)
def test_what_is_left_open_is_chosen_for_a_new_adapter_and_saved(tmp_path, keys, centers, top_k):
    keys = {"num_experts": 3, "num_virtual_tokens": 4, "rank": 2} | keys
    config = PTMoeConfig(**keys, task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert (read.center_router_input, read.top_k) == (centers, top_k)


def test_a_saved_adapter_without_the_keys_is_the_papers(tmp_path):
    get_peft_model(tiny_model("llama"), PTMoeConfig(num_virtual_tokens=4, rank=2)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    del saved["center_router_input"], saved["top_k"]
    file.write_text(json.dumps(saved))
    read = PeftConfig.from_pretrained(tmp_path)
    assert (read.center_router_input, read.top_k) == (False, 1)


def test_every_key_has_a_help_text():
    assert all(f.metadata["help"] for f in dataclasses.fields(PTMoeConfig) if f.name in DEFAULTS)


@pytest.mark.parametrize("rank", [4, None])
def test_a_saved_config_reads_back_the_same(tmp_path, rank):
    prompts = {"num_virtual_tokens": 6, "num_experts": 2, "rank": rank, "init_text": ["a b", "c"]}
    config = PTMoeConfig(**prompts, center_router_input=True, top_k=1, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert type(read) is PTMoeConfig and own_values(read) == own_values(config)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "PT_MOE" and set(DEFAULTS) < set(saved)
    assert not {"r", "target_modules"} & set(saved)  # `r` is what Axolotl's default merge takes for a LoRA


@pytest.mark.parametrize("name", ["num_virtual_tokens", "num_experts", "top_k", "rank"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_counts_are_integers_of_at_least_one(name, value):
    with pytest.raises(ValueError, match=rf"pt_moe\.{name}: .* is not allowed; it is an integer of at least 1"):
        PTMoeConfig(**{name: value})


@pytest.mark.parametrize("name", ["router_noise_std", "router_aux_loss_coef"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_noise_and_coefficient_are_numbers_from_zero(name, value):
    with pytest.raises(ValueError, match=rf"pt_moe\.{name}: .* is not allowed; it is a number of at least 0"):
        PTMoeConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 41}, r"pt_moe\.rank: 41 is more than num_virtual_tokens \(40\)"),
        ({"top_k": 3}, r"pt_moe\.top_k: 3 is more than num_experts \(2\)"),
        ({"router_aux_loss_scope": "step"}, "'step' is not known; use one of micro_batch, global_batch"),
        ({"router_input": "answer"}, "'answer' is not known; use one of prompt, sequence"),
        (
            {"router_aux_loss_coef": 0.1, "top_k": 2},
            "means nothing where every prompt is mixed from all 2 experts.* Set top_k: 1",
        ),
        ({"scale_by_router_prob": False, "top_k": 2}, "every prompt is the sum of all experts.* Set top_k: 1"),
        ({"center_router_input": True, "num_experts": 1}, "true means nothing with num_experts: 1"),
        ({"scale_by_router_prob": False}, "leaves the router without a gradient.*router_aux_loss_coef above 0"),
        ({"num_experts": 1, "router_aux_loss_coef": 0.1}, "means nothing with num_experts: 1"),
        ({"init_text": ""}, r"pt_moe\.init_text: '' is not allowed"),
        ({"init_text": " \n"}, "a text that is not empty"),
        ({"init_text": []}, r"pt_moe\.init_text: \[\] is not allowed"),
        ({"init_text": ["a", ""]}, "a text that is not empty"),
        ({"init_text": ["a", "b", "c"]}, "3 texts for 2 experts"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_way_out(settings, message):
    with pytest.raises(ValueError, match=message):
        PTMoeConfig(**settings)


def test_a_router_without_probabilities_needs_something_that_trains_it():
    PTMoeConfig(scale_by_router_prob=False, router_aux_loss_coef=0.1)
    PTMoeConfig(scale_by_router_prob=False, num_experts=1)
