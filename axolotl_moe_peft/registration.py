"""The table of methods, and how they become known to PEFT."""

from __future__ import annotations

from importlib import import_module

import peft.mapping
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from .shared.transformers_loader import check_what_transformers_loads

_PACKAGE = __package__

# Method: its PeftConfig and its tuner. The method's name is that of its folder, of its `peft_type`, and of `adapter:`
# and its block in an Axolotl YAML. Names, since the table is also read where the methods cannot be imported.
METHODS = {
    "perft": ("PerftConfig", "PerftModel"),
    "tt_lora": ("TTLoraConfig", "TTLoraModel"),
    "tt_lora_moe": ("TTLoraMoeConfig", "TTLoraMoeModel"),
    "pt_moe": ("PTMoeConfig", "PTMoeModel"),
}


def config_class(method: str) -> type[PeftConfig]:
    """The PeftConfig of a method of the table."""
    return getattr(import_module(f".{method}", _PACKAGE), METHODS[method][0])


def register_methods() -> None:
    """Register the methods of the table with PEFT.

    Raises:
        RuntimeError: another package has registered one of the names.
    """
    for name, (config, tuner) in METHODS.items():
        add_peft_type(name.upper())
        module = import_module(f".{name}", _PACKAGE)
        register(name, getattr(module, config), getattr(module, tuner))
    check_what_transformers_loads()


def add_peft_type(name: str) -> None:
    """Add a member to the enum PeftType, unless it is there.

    `register_peft_method` and adapter_config.json know a method only as a member of this enum, which Python gives no
    public way to extend. This is the one place where this package reaches into PEFT.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)  # nosemgrep: no-patching-of-others
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register a method with PEFT; again if this package is imported anew (a reload).

    Raises:
        RuntimeError: another package has registered the name. Not an ImportError, see versions.py.
    """
    peft_type = PeftType[name.upper()]
    owner = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if owner is not None and owner.__module__.partition(".")[0] != _PACKAGE:
        raise RuntimeError(
            f"axolotl_moe_peft cannot register the PEFT method {peft_type.value}: "
            f"{owner.__module__}.{owner.__qualname__} has taken the name. Two packages that provide it cannot be used "
            "in one process; uninstall one of them."
        )
    for mapping in (
        peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    ):
        mapping.pop(peft_type, None)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
