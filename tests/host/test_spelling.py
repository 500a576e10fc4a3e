"""Keys that are nearly those of Axolotl's, at the top of a YAML and in its blocks."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault

from tests.host.test_args import keys_of

Load = Callable[..., DictDefault]


@pytest.mark.parametrize("key", ["gradient_acumulation_steps", "learning_rates", "sample_packin"])
def test_a_misspelt_key_of_axolotls_is_refused_with_the_right_one(key: str, load: Load) -> None:
    with pytest.raises(ValueError, match=f"`{key}` is no key of Axolotl's, .* did you mean"):
        load(**{key: 2})
    assert load(adapter="lora", perft=None, lora_r=8, lora_alpha=8, lora_target_linear=True, **{key: 2})
    assert load(**{"x-notes": "mine", "notes_of_mine": 1})


DATASET = {"path": "rows.jsonl", "type": "chat_template"}
NESTED: dict[str, dict[str, Any]] = {
    "datasets[1].roles_to_trains": {"datasets": [DATASET, DATASET | {"roles_to_trains": ["assistant"]}]},
    "test_datasets[0].splits": {"test_datasets": [DATASET | {"splits": "train"}]},
    "datasets[0].type.field_instructions": {"datasets": [{"path": "a", "type": {"field_instructions": "b"}}]},
    "fsdp_config.offload_parms": {"fsdp_version": 2, "fsdp_config": {"offload_parms": True}},
    "trl.num_generation": {"rl": "grpo", "micro_batch_size": 2, "trl": {"num_generation": 2}},
}


@pytest.mark.parametrize("key", NESTED)
def test_a_misspelt_key_of_a_block_is_refused_with_the_right_one(key: str, load: Load) -> None:
    with pytest.raises(ValueError, match=f"`{re.escape(key)}` is no key of Axolotl's, .* did you mean `"):
        load(**NESTED[key])
    lora = {"adapter": "lora", "perft": None, "lora_r": 8, "lora_alpha": 8, "lora_target_linear": True}
    assert load(**NESTED[key], **lora)


def test_what_the_host_takes_in_a_block_is_no_misspelling(load: Load) -> None:
    wrap = "fsdp_transformer_layer_cls_to_wrap"
    assert load(fsdp_version=2, fsdp_config={"fsdp_offload_params": False, wrap: "MixtralDecoderLayer"})
    assert load(fsdp_config={"version": 2, "notes_of_mine": 1})
    properties = {"role": "from", "content": "value", "contents": "x"}
    entry = DATASET | {"message_property_mappings": properties, "notes": "mine", "ds_type": "json"}
    assert load(datasets=[entry], trl={"beta": 0.1}, special_tokens={"pad_token": "<pad>"})


def test_a_misspelt_expert_of_a_dataset_is_no_missing_one(load: Load) -> None:
    keys = keys_of("tt_lora_moe", {"experts": [{"name": "a", "path": "./a"}]})
    for datasets in ({"datasets": [DATASET | {"exprt": "a"}]}, {"test_datasets": [DATASET | {"exprt": "a"}]}):
        with pytest.raises(ValueError, match=r"datasets\[0\].exprt` is no key .* did you mean `.*expert`"):
            load(**{"datasets": [DATASET | {"expert": "a"}]} | datasets, **keys)
