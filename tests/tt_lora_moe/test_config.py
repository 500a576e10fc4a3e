"""TTLoraMoeConfig: what it accepts, what it says of what it does not, and that it survives saving."""

import pytest
from peft import PeftConfig, TaskType

from axolotl_moe_peft import TTLoraMoeConfig

ENTRIES = [{"name": "gsm8k", "path": "out/gsm8k"}, {"name": "boolq", "path": "org/boolq"}]


def test_defaults_are_those_of_the_contract():
    config = TTLoraMoeConfig(experts=ENTRIES)
    assert (config.router, config.router_noise, config.router_input) == ("base_hidden", True, "prompt")
    assert config.peft_type.value == "TT_LORA_MOE"
    assert config.expert_names == ["gsm8k", "boolq"]


def test_no_field_has_a_name_that_the_host_reads_as_loras():
    assert not {"r", "lora_alpha"} & set(TTLoraMoeConfig(experts=ENTRIES).to_dict())


def test_saved_and_loaded_it_is_the_same(tmp_path):
    pooled = {"rank": 3, "alpha": 16, "target_modules": ["q_proj"], "factors": "auto", "num_cores": None}
    config = TTLoraMoeConfig(experts=[ENTRIES[0] | pooled], router="embedding_mlp", router_noise=False)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, TTLoraMoeConfig)
    assert loaded.to_dict() == config.to_dict() | {"peft_version": loaded.peft_version}
    assert loaded.target_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": []}, r"experts: \[\] is not allowed; it is a list of trained tt_lora or LoRA adapters"),
        ({"experts": "out/gsm8k"}, "experts: 'out/gsm8k' is not allowed"),
        ({"experts": ["out/gsm8k"]}, "an expert is {name: ..., path: ...}"),
        ({"experts": [{"name": "gsm8k"}]}, "an expert is {name: ..., path: ...}"),
        ({"experts": [{"name": "gsm8k", "path": "out", "rank": 5}]}, "an expert is {name: ..., path: ...}"),
        ({"experts": [{"name": "a b", "path": "out"}]}, "the name 'a b' is not allowed"),
        ({"experts": [{"name": 3, "path": "out"}]}, "the name 3 is not allowed"),
        ({"experts": [{"name": "gsm8k", "path": ""}]}, "gsm8k has the path ''"),
        ({"experts": [ENTRIES[0], ENTRIES[0]]}, "the name 'gsm8k' is given twice"),
        ({"router": "llm"}, "router: 'llm' is not known; use one of base_hidden, embedding_linear, embedding_mlp"),
        ({"router_input": "answer"}, "router_input: 'answer' is not known; use one of prompt, sequence"),
        ({"task_type": "TOKEN_CLS"}, "task_type: TOKEN_CLS is not possible"),
        ({"task_type": TaskType.QUESTION_ANS}, "task_type: QUESTION_ANS is not possible"),
        ({"router_noise": 0.5}, "router_noise: 0.5 is not known; use one of true, false"),
    ],
)
def test_what_is_not_allowed_is_named(keys, message):
    with pytest.raises(ValueError, match=message):
        TTLoraMoeConfig(**({"experts": ENTRIES} | keys))
