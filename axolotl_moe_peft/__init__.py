"""Routed adapters for mixture-of-experts models, as PEFT methods and as an Axolotl plugin.

Importing the package registers its methods with PEFT. It imports neither axolotl nor trl: `MoePeftPlugin`, the Axolotl
plugin, is resolved when it is asked for.
"""

import sys
from typing import Any

from .versions import SUPPORTED, check_versions, needed

__all__ = [
    "MoePeftPlugin",
    "PTMoeConfig",
    "PTMoeModel",
    "PerftConfig",
    "PerftModel",
    "TTLoraConfig",
    "TTLoraModel",
    "TTLoraMoeConfig",
    "TTLoraMoeModel",
    "calibrate_experts",
]

_unusable: str | None = None  # why, in a process of Axolotl's

try:
    check_versions("transformers", "peft")

    from .perft import PerftConfig, PerftModel, calibrate_experts
    from .pt_moe import PTMoeConfig, PTMoeModel
    from .registration import register_methods
    from .tt_lora import TTLoraConfig, TTLoraModel
    from .tt_lora_moe import TTLoraMoeConfig, TTLoraMoeModel

    register_methods()
except (ImportError, RuntimeError) as _error:
    # Axolotl imports this package in every run; the plugin raises in those that use it
    if "axolotl" not in sys.modules:
        raise
    _unusable = str(_error)
    if isinstance(_error, ImportError):
        _tested = ", ".join(map(needed, SUPPORTED))
        _unusable = f"axolotl_moe_peft, tested with {_tested}, cannot be imported here: {_error}."


def __getattr__(name: str) -> Any:
    if name == "MoePeftPlugin":
        from .host import plugin_class

        return plugin_class(_unusable)
    if _unusable and name in __all__:
        raise RuntimeError(_unusable)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
