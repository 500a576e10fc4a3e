"""What the launcher, the plugins' list and the environment say beside the keys of a YAML."""

import os
from collections.abc import Callable

import pytest
from axolotl.utils.dict import DictDefault

from tests.host.test_args import keys_of

Load = Callable[..., DictDefault]
LAUNCHER = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "MixtralDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_MIN_NUM_PARAMS": "100000000",
}
OF_THE_LAUNCHER = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "MixtralDecoderLayer",
        "state_dict_type": "SHARDED_STATE_DICT",
        "offload_params": False,
        "reshard_after_forward": True,
    },
}


@pytest.mark.parametrize("adapter", ["perft", "tt_lora", "pt_moe"])
def test_fsdp2_of_the_launcher_is_that_of_the_yaml(adapter: str, load: Load) -> None:
    """The fixture leaves the environment as it was."""
    before = dict(os.environ)
    expected = load(**keys_of(adapter, {}), **OF_THE_LAUNCHER).to_dict()
    os.environ.clear()
    os.environ.update(before | LAUNCHER)
    assert load(**keys_of(adapter, {})).to_dict() == expected
    own = {"fsdp_version": 2, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
    assert load(**keys_of(adapter, {}), **own).fsdp_config.state_dict_type == "FULL_STATE_DICT"
    os.environ["FSDP_VERSION"] = "1"
    with pytest.raises(ValueError, match="FSDP1, which is not supported with .* --fsdp_version 2"):
        load(**keys_of(adapter, {}))


def test_the_plugin_by_another_name_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match=r"by another name; write `- axolotl_moe_peft.MoePeftPlugin`"):
        load(plugins=["axolotl_moe_peft.host.plugin.MoePeftPlugin"])
