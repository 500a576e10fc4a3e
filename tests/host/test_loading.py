"""How Axolotl loads the plugin: once, and without a trace in runs that do not use it."""

from collections.abc import Callable

import pytest
from axolotl.integrations import base
from axolotl.utils.dict import DictDefault

import axolotl_moe_peft
from axolotl_moe_peft.registration import METHODS
from tests.fresh_interpreter import PRETEND, THEIR_PERFT, run_python

# `run_of_axolotl(adapter)`: what a run does with the plugin before it validates the YAML
AS_AXOLOTL_LOADS_US = """
from axolotl.integrations.base import PluginManager
def run_of_axolotl(adapter):
    manager = PluginManager.get_instance()
    manager.register("axolotl_moe_peft.MoePeftPlugin")
    assert "axolotl_moe_peft.MoePeftPlugin" in manager.plugins
    manager.plugins["axolotl_moe_peft.MoePeftPlugin"].register({"adapter": adapter})
"""


def test_the_plugin_is_the_one_class_that_axolotl_finds_and_registers() -> None:
    run_python("""
import inspect, sys
import axolotl_moe_peft
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
ours = [name for name in manager.plugins if not name.startswith("axolotl.")]
assert ours == ["axolotl_moe_peft.MoePeftPlugin"], ours
capability = manager.get_adapter_capability("perft")
assert not capability.lora_like and not capability.relora
""")


def test_another_packages_perft_fails_the_runs_with_our_adapters_and_no_other() -> None:
    run_python(
        PRETEND
        + THEIR_PERFT
        + AS_AXOLOTL_LOADS_US
        + """
check(lambda: run_of_axolotl("perft"))
run_of_axolotl("lora")
"""
    )


@pytest.mark.parametrize(
    ("package", "version"), [("transformers", "5.15.0"), ("peft", "0.19.0"), ("axolotl", "0.18.2")]
)
def test_in_axolotl_too_old_versions_fail_the_runs_with_our_adapters_and_no_other(package: str, version: str) -> None:
    run_python(
        PRETEND
        + AS_AXOLOTL_LOADS_US
        + f"""
pretend("{package}", "{version}")
run_of_axolotl("lora")
run_of_axolotl(None)
for adapter in ("perft", "tt_lora", "tt_lora_moe", "pt_moe"):
    try:
        run_of_axolotl(adapter)
    except RuntimeError as error:
        assert "{package} {version} is installed" in str(error) and "pip install" in str(error), error
    else:
        raise AssertionError(adapter)
import axolotl_moe_peft
if "{package}" != "axolotl":
    try:
        axolotl_moe_peft.PerftConfig
    except RuntimeError as error:
        assert "{package} {version} is installed" in str(error), error
    else:
        raise AssertionError
"""
    )


def test_in_axolotl_a_missing_name_of_the_libraries_fails_the_runs_with_our_adapters_and_no_other() -> None:
    run_python(
        AS_AXOLOTL_LOADS_US
        + """
import peft.tuners.tuners_utils
del peft.tuners.tuners_utils.BaseTunerLayer
run_of_axolotl("lora")
try:
    run_of_axolotl("perft")
except RuntimeError as error:
    assert "tested with transformers>=" in str(error) and "BaseTunerLayer" in str(error), error
else:
    raise AssertionError
"""
    )


def test_in_axolotl_newer_versions_are_a_warning_in_the_runs_with_our_adapters() -> None:
    run_python(
        PRETEND
        + AS_AXOLOTL_LOADS_US
        + """
pretend("axolotl", "0.22.0")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    run_of_axolotl("lora")
    assert not [w for w in caught if "axolotl_moe_peft" in str(w.message)]
    for _ in range(2):
        run_of_axolotl("perft")
messages = [str(w.message) for w in caught if "axolotl_moe_peft" in str(w.message)]
assert len(messages) == 1 and "axolotl 0.22.0 is newer" in messages[0], messages
"""
    )


def test_the_installed_entry_point_is_the_plugin_of_a_plugins_line() -> None:
    from importlib.metadata import entry_points

    points = [point for point in entry_points(group="axolotl.plugins") if "axolotl_moe_peft" in point.value]
    assert [point.value.replace(":", ".") for point in points] == ["axolotl_moe_peft.MoePeftPlugin"]
    assert points[0].load() is axolotl_moe_peft.MoePeftPlugin


@pytest.mark.skipif(not hasattr(base, "get_builtin_plugins"), reason="this Axolotl loads no installed plugins")
@pytest.mark.parametrize("plugins", [None, ["axolotl_moe_peft.MoePeftPlugin"]], ids=["no line", "a line"])
def test_where_axolotl_loads_installed_plugins_the_adapter_alone_does_it(
    plugins: list[str] | None, load: Callable[..., DictDefault]
) -> None:
    assert load(plugins=plugins).adapter == "perft"
    ours = [name for name in base.PluginManager.get_instance().plugins if "axolotl_moe_peft" in name]
    assert ours == ["axolotl_moe_peft.MoePeftPlugin"]


def test_a_run_without_our_adapters_imports_nothing_for_them_and_keeps_every_default(
    load: Callable[..., DictDefault],
) -> None:
    keys = {"adapter": "lora", "perft": None, "lora_r": 8, "lora_alpha": 8, "lora_target_linear": True}
    with_us = load(**keys).to_dict()
    plugin = base.PluginManager.get_instance().plugins["axolotl_moe_peft.MoePeftPlugin"]
    own = {name for name, hook in vars(base.BasePlugin).items() if callable(hook)} & set(vars(type(plugin)))
    assert own >= {"register", "load_datasets", "pre_model_load", "load_adapter", "add_callbacks_post_trainer"}
    cfg = DictDefault(with_us)
    assert plugin.register(cfg) is plugin.load_datasets(cfg) is plugin.pre_model_load(cfg) is None
    assert plugin.load_adapter(None, cfg) is None and plugin.add_callbacks_post_trainer(cfg, None) == []
    assert cfg.to_dict() == with_us and not set(with_us) & set(METHODS)
