"""Importing the package: what it registers with PEFT, what it leaves alone, and which hosts it refuses.

What an import does shows in a fresh interpreter only; the scripts below run in one each.
"""

import copy
import json
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftModel

# `pretend(package, version)`: importlib.metadata says so from here on; None is "not installed"
PRETEND = """
import importlib.metadata, sys, warnings
real_version = importlib.metadata.version
def pretend(package, version):
    def fake(name):
        if name == package and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version if name == package else real_version(name)
    importlib.metadata.version = fake
def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "axolotl_moe_peft"]:
        del sys.modules[name]
"""


def run_python(script: str) -> str:
    """What the script prints; it must not fail."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_leaves_axolotl_trl_and_liger_alone_until_the_plugin_is_asked_for() -> None:
    run_python("""
import inspect, sys
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

plugin = axolotl_moe_peft.MoePeftPlugin
from axolotl.integrations.base import BasePlugin, PluginManager
modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "axolotl_moe_peft"]
found = {
    value
    for module in modules
    for value in vars(module).values()
    if inspect.isclass(value) and issubclass(value, BasePlugin) and value is not BasePlugin
}
assert found == {plugin}, found

manager = PluginManager.get_instance()
manager.register("axolotl_moe_peft.MoePeftPlugin")
assert list(manager.plugins) == ["axolotl_moe_peft.MoePeftPlugin"]
capability = manager.get_adapter_capability("perft")
assert not capability.lora_like and not capability.relora
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
        + """
import sys, types
from dataclasses import dataclass
import peft
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

member = str.__new__(peft.PeftType, "PERFT")
member._name_ = member._value_ = "PERFT"
type.__setattr__(peft.PeftType, "PERFT", member)
peft.PeftType._member_names_.append("PERFT")
peft.PeftType._member_map_["PERFT"] = peft.PeftType._value2member_map_["PERFT"] = member
@dataclass
class TheirConfig(peft.PeftConfig):
    pass
class TheirModel(BaseTuner):
    prefix = "their_"
TheirConfig.__module__ = TheirModel.__module__ = "their_package.config"
register_peft_method(name="perft", config_cls=TheirConfig, model_cls=TheirModel, prefix="their_")

def check(load):
    try:
        load()
    except RuntimeError as error:
        assert "PERFT" in str(error) and "their_package.config.TheirConfig" in str(error), error
        assert "uninstall" in str(error)
    else:
        raise AssertionError
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PERFT"] is TheirConfig  # and nothing of theirs is touched
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["PERFT"] is TheirModel
    forget()

check(lambda: __import__("axolotl_moe_peft"))
from axolotl.integrations.base import PluginManager
manager = PluginManager.get_instance()
check(lambda: manager.register("axolotl_moe_peft.MoePeftPlugin"))
assert not manager.plugins
"""
    )


def test_too_old_or_missing_hosts_are_runtime_errors_with_the_versions() -> None:
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
check("axolotl", "0.18.2", plugin)
check("axolotl", None, plugin)

from axolotl.integrations.base import PluginManager
manager = PluginManager.get_instance()
for host, version in (("transformers", "5.15.0"), ("peft", "0.19.0"), ("axolotl", "0.18.0")):
    check(host, version, lambda: manager.register("axolotl_moe_peft.MoePeftPlugin"))
assert not manager.plugins
"""
    )


def test_newer_hosts_are_one_warning_each_and_patch_releases_none() -> None:
    run_python(
        PRETEND
        + """
import transformers, peft, axolotl.integrations.base, axolotl.loaders.utils
newer = (("transformers", "5.17.0"), ("peft", "0.21.0"), ("axolotl", "0.20.0"))
patched = (("transformers", "5.16.99"), ("peft", "0.20.99"), ("axolotl", "0.19.99"))
for package, version in newer + patched:
    pretend(package, version)
    forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import axolotl_moe_peft
        axolotl_moe_peft.MoePeftPlugin
        axolotl_moe_peft.MoePeftPlugin
        import axolotl_moe_peft
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
