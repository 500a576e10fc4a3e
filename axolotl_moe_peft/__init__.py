"""Routed adapters for mixture-of-experts models, as PEFT methods and as an Axolotl plugin.

Importing the package registers its methods with PEFT. It imports neither axolotl nor trl: `MoePeftPlugin`, the Axolotl
plugin, is resolved when it is asked for.
"""

from typing import Any

from .versions import check_version

check_version("transformers")
check_version("peft")

from .registration import add_peft_type, register  # noqa: E402

for _name in ("PERFT", "TT_LORA", "TT_LORA_MOE", "PT_MOE"):
    add_peft_type(_name)

from .perft import PerftConfig, PerftModel  # noqa: E402
from .pt_moe import PTMoeConfig, PTMoeModel  # noqa: E402
from .tt_lora import TTLoraConfig, TTLoraModel  # noqa: E402
from .tt_lora_moe import TTLoraMoeConfig, TTLoraMoeModel  # noqa: E402

register("perft", PerftConfig, PerftModel)
register("tt_lora", TTLoraConfig, TTLoraModel)
register("tt_lora_moe", TTLoraMoeConfig, TTLoraMoeModel)
register("pt_moe", PTMoeConfig, PTMoeModel)

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
]


def __getattr__(name: str) -> Any:
    if name == "MoePeftPlugin":
        from .host.plugin import MoePeftPlugin

        return MoePeftPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
