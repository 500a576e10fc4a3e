"""Scripts in an interpreter of their own, where what an import does shows."""

import subprocess
import sys

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
# another package provides PERFT; `check(load)`: load() refuses that, and leaves it alone
THEIR_PERFT = """
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
"""


def run_python(script: str) -> str:
    """What the script prints; it must not fail."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
