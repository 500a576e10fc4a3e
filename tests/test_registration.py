"""Importing the package: what it registers with PEFT, what it leaves alone, and which versions it refuses."""

import copy
import json

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftModel
from tests.fresh_interpreter import PRETEND, THEIR_PERFT, run_python


def test_import_leaves_axolotl_trl_and_liger_alone_until_the_plugin_is_asked_for() -> None:
    run_python("""
import sys
import axolotl_moe_peft
from axolotl_moe_peft import PerftConfig
import peft
assert peft.PeftType.PERFT in list(peft.PeftType)
assert "MoePeftPlugin" in axolotl_moe_peft.__all__
try:
    axolotl_moe_peft.NoSuchPlugin
except AttributeError as error:
    assert "NoSuchPlugin" in str(error)
else:
    raise AssertionError
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"axolotl", "trl", "liger_kernel"}, loaded & {"axolotl", "trl", "liger_kernel"}
assert "axolotl_moe_peft.host.plugin" not in sys.modules
""")


def test_importing_again_registers_again() -> None:
    run_python(
        PRETEND
        + """
import importlib
import axolotl_moe_peft, peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
first = axolotl_moe_peft.PerftConfig
importlib.import_module("axolotl_moe_peft")
importlib.reload(axolotl_moe_peft)
assert configs[peft.PeftType.PERFT] is axolotl_moe_peft.PerftConfig is first
forget()
import axolotl_moe_peft
assert configs[peft.PeftType.PERFT] is axolotl_moe_peft.PerftConfig is not first
assert list(peft.PeftType).count("PERFT") == 1

from transformers import MixtralConfig, MixtralForCausalLM
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=2, **sizes))
model = peft.get_peft_model(model, axolotl_moe_peft.PerftConfig(rank=8, task_type="CAUSAL_LM"))
assert type(model.base_model) is axolotl_moe_peft.perft.PerftModel
"""
    )


def test_another_packages_perft_is_a_runtime_error_that_names_it() -> None:
    run_python(
        PRETEND
        + THEIR_PERFT
        + """
check(lambda: __import__("axolotl_moe_peft"))
"""
    )


def test_too_old_or_missing_versions_are_runtime_errors_that_name_them() -> None:
    run_python(
        PRETEND
        + """
def check(package, version, load):
    pretend(package, version)
    forget()
    try:
        load()
    except RuntimeError as error:
        wanted = {"transformers": ">=5.16", "peft": ">=0.20", "axolotl": ">=0.19"}[package]
        assert package + wanted in str(error), error
        assert ("not installed" if version is None else f"{package} {version} is installed") in str(error), error
    else:
        raise AssertionError(package)

def plugin():
    import axolotl_moe_peft
    axolotl_moe_peft.MoePeftPlugin

def package():
    import axolotl_moe_peft

for version in ("4.57.1", "5.15.9", None):
    check("transformers", version, package)
for version in ("0.19.1", None):
    check("peft", version, package)
assert "peft" not in sys.modules and "transformers" not in sys.modules  # refused before it could fail otherwise
for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
    sys.modules[name] = None  # as where it is not installed
check("axolotl", None, plugin)
"""
    )


def test_newer_versions_are_one_warning_where_an_adapter_is_attached_and_patch_releases_none() -> None:
    run_python(
        PRETEND
        + """
import peft, transformers
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=2, **sizes)
newer = (("transformers", "5.25.0"), ("peft", "0.22.0"))
patched = (("transformers", "5.24.99"), ("peft", "0.21.99"))
for package, version in newer + patched:
    pretend(package, version)
    forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import axolotl_moe_peft
        assert not [w for w in caught if "axolotl_moe_peft" in str(w.message)]
        for _ in range(2):
            peft.get_peft_model(transformers.MixtralForCausalLM(config), axolotl_moe_peft.PerftConfig(rank=2))
    messages = [str(w.message) for w in caught if "axolotl_moe_peft" in str(w.message)]
    assert len(messages) == ((package, version) in newer), messages
    assert not messages or f"{package} {version} is newer" in messages[0]
"""
    )


def test_peft_type_is_a_member_like_any_other() -> None:
    member = PeftType.PERFT
    assert PeftType("PERFT") is member and PeftType["PERFT"] is member and member in list(PeftType)
    assert member == "PERFT" and hash(member) == hash("PERFT") and isinstance(member, PeftType)
    assert (member.name, member.value) == ("PERFT", "PERFT")
    assert json.dumps({"peft_type": member}) == '{"peft_type": "PERFT"}'
    function, arguments = member.__reduce_ex__(4)
    assert function(*arguments) is member  # what unpickling does
    assert copy.deepcopy(member) is member
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "PERFT")
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError):
        PeftType("NO_SUCH_METHOD")


def test_peft_knows_the_method() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PERFT] is PerftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["PERFT"] is PerftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.PERFT] == PerftModel.prefix == "perft_"
