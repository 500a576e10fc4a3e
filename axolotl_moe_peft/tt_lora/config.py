"""TTLoraConfig: what the `tt_lora:` block of an Axolotl YAML and `adapter_config.json` hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft.utils import PeftType

from ..shared.config import ModulesToSaveConfig, check_target_modules


@dataclass
class TTLoraConfig(ModulesToSaveConfig):
    """Configuration of TT-LoRA (arXiv 2504.21190, stage 1): a low-rank update whose factors are tensor trains.

    Every field is a key of the `tt_lora:` block with the same name and default.

    Raises:
        ValueError: a value is out of range.
    """

    rank: int = field(default=5, metadata={"help": "Rank of the tensor train, and so of the update."})
    alpha: float = field(
        default=16, metadata={"help": "Multiplies the update as it is; not divided by the rank as in LoRA."}
    )
    dropout: float = field(default=0.0, metadata={"help": "On the adapter's input, in training."})
    target_modules: list[str] | str = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={
            "help": "Linear layers: names or suffixes of names, one regular expression, or all-linear (all but the "
            "output layer). Of a model of text and images those of its text part, unless they name others."
        },
    )
    factors: Literal["auto"] | dict[str, dict[str, list[int]]] = field(
        default="auto",
        metadata={
            "help": "auto: the fewest parameters for the rank. Or a map from a target module's name or suffix to "
            "{in: [...], out: [...]}, whose products are its inputs and outputs; targets that are not in it are auto."
        },
    )
    num_cores: int | None = field(
        default=None,
        metadata={
            "help": "Number of cores that auto aims at, input and output side together. null: up to 8, with the "
            "fewest parameters."
        },
    )
    init: Literal["normalized", "zero"] = field(
        default="normalized",
        metadata={
            "help": "normalized: the authors' direct_init, every core random of norm 1, so that step 0 differs "
            "slightly from the base; zero: the last core 0, step 0 equals the base exactly."
        },
    )

    training_fields: ClassVar[tuple[str, ...]] = ("dropout", "init")
    unreportable: ClassVar[str | None] = "a TT-LoRA has no router"

    @property
    def title(self) -> str:
        return f"TT-LoRA (rank: {self.rank})"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TT_LORA
        if not _is_count(self.rank):
            raise ValueError(f"tt_lora.rank: {self.rank!r} is not allowed; it is an integer of at least 1.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"tt_lora.alpha: {self.alpha!r} is not allowed; it is a number above 0.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"tt_lora.dropout: {self.dropout!r} is not allowed; it is a number from 0 to below 1.")
        if self.init not in ("normalized", "zero"):
            raise ValueError(f"tt_lora.init: {self.init!r} is not known; use one of normalized, zero.")
        if self.num_cores is not None and not _is_count(self.num_cores, 2):
            raise ValueError(
                f"tt_lora.num_cores: {self.num_cores!r} is not allowed; it is an integer of at least 2, or null."
            )
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        if not self.target_modules or not isinstance(self.target_modules, (list, str)):
            raise ValueError(
                f"tt_lora.target_modules: {self.target_modules!r} is not allowed; it is a list of names, one regular "
                "expression, or all-linear."
            )
        check_target_modules("tt_lora.target_modules", self.target_modules)
        if self.factors != "auto":
            self.factors = _checked(self.factors)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _checked(factors: Any) -> dict[str, dict[str, list[int]]]:
    """The map of factors as plain, JSON-like values."""
    if not isinstance(factors, dict) or not factors:
        raise ValueError(
            f"tt_lora.factors: {factors!r} is not known; use auto, or a map such as "
            "{q_proj: {in: [16, 8, 4, 4], out: [16, 8, 4, 4]}}."
        )
    for name, entry in factors.items():
        if not isinstance(entry, dict) or set(entry) != {"in", "out"}:
            raise ValueError(
                f"tt_lora.factors: {name} has {entry!r}; it needs the two keys `in` and `out`, each a list of factors."
            )
        for side, values in entry.items():
            listed = isinstance(values, (list, tuple)) and len(values) > 0
            if not listed or not (all(_is_count(f, 2) for f in values) or list(values) == [1]):
                raise ValueError(
                    f"tt_lora.factors: {name}.{side} has {values!r}; it is a list of integers of at least 2."
                )
    return {name: {side: list(entry[side]) for side in ("in", "out")} for name, entry in factors.items()}
