"""PerftConfig: what the `perft:` block of an Axolotl YAML and `adapter_config.json` hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft.utils import PeftType
from transformers.activations import ACT2FN

from ..shared.config import ModulesToSaveConfig, check_target_modules
from ..shared.routing import ROUTER_AUX_LOSS_SCOPE, SCOPES

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DENSE_MLPS = "mlp"  # as `target_modules`
DEFAULT_CALIBRATION_ROWS = 128
# what moves ranks, and how where nothing is said; max_rank is twice the rank
RANK_ALLOCATION = {
    "score": "gate",
    "prune": 0.2,
    "grow": 0.2,
    "max_rank": None,
    "warmup_steps": 100,
    "every_steps": 100,
    "decay": 0.99,
    "until": None,
}
_EXAMPLES = {"experts": "{keep: 0.25, calibrate: 128}", "expert_ids": "{model.layers.0.mlp: [3, 17]}"}
_CHOICES = {
    "variant": ("routed", "embedded", "dense", "single"),
    "expert_type": ("lora", "parallel_adapter"),
    "gate_weights": ("own", "base"),
    "init": ("zero", "paper"),
    "router_aux_loss_scope": SCOPES,
}


def check_keep(keep: Any) -> None:
    """Check the share of a block's experts that are adapted.

    Raises:
        ValueError: it is none.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"perft.experts.keep: {keep!r} is not allowed; it is a number above 0 and up to 1.")


def num_kept(keep: float, num_experts: int) -> int:
    """How many experts that share of them is, rounded up."""
    return math.ceil(round(keep * num_experts, 9))  # 0.07 * 100 is above 7


@dataclass
class PerftConfig(ModulesToSaveConfig):
    """Configuration of PERFT (arXiv 2411.08212): adapters in parallel with the experts of an MoE block.

    Beside the MLPs of dense layers they go where `target_modules` asks for it.

    The four variants are the paper's PERFT-R (`routed`), PERFT-E (`embedded`), PERFT-D (`dense`) and PERFT-S
    (`single`). Every field is a key of the `perft:` block with the same name and default.

    Raises:
        ValueError: a value is out of range, or a key is given where it means nothing.
    """

    variant: Literal["routed", "embedded", "dense", "single"] = field(
        default="routed",
        metadata={
            "help": "routed: an own router over N adapters; embedded: one adapter inside each base expert, weighted "
            "by the frozen base router; dense: N always-on adapters, summed; single: one always-on adapter."
        },
    )
    num_experts: int | None = field(
        default=None, metadata={"help": "N, the number of adapters a block. routed and dense only; default 4."}
    )
    num_experts_per_tok: int | None = field(
        default=None, metadata={"help": "K, the adapters that a token is routed to. routed only; default 2."}
    )
    experts: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "embedded only. Adapt the experts of each block that the base router chooses most: the share "
            "`keep` of them, by its choices in the first `calibrate` (128) rows of the training data. null: all."
        },
    )
    expert_ids: dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "embedded only. The adapted experts, by the block's name. `experts` fills it in."},
    )
    rank_allocation: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "embedded LoRAs only. Move ranks from the least to the most important experts of a block in "
            "training, their sum staying: score (gate or saliency), prune, grow, max_rank, warmup_steps, every_steps, "
            "decay, until. null: every expert keeps `rank`."
        },
    )
    expert_type: Literal["lora", "parallel_adapter"] = field(
        default="lora",
        metadata={"help": "lora: (alpha / rank) up(down(x)); parallel_adapter: up(hidden_act(down(x)))."},
    )
    rank: int = field(default=16, metadata={"help": "Width of the bottleneck."})
    alpha: float = field(default=32, metadata={"help": "LoRA's scale is alpha / rank. lora only."})
    dropout: float = field(
        default=0.0,
        metadata={"help": "On a LoRA's input, on a parallel adapter's bottleneck before the activation."},
    )
    hidden_act: str = field(
        default="silu", metadata={"help": "Activation, a name of transformers' ACT2FN. parallel_adapter only."}
    )
    norm_topk_prob: bool | None = field(
        default=None,
        metadata={"help": "Let the K weights sum to one. routed only; null does what the base model does."},
    )
    gate_weights: Literal["own", "base"] = field(
        default="own",
        metadata={
            "help": "routed only. own: the adapter router's weights, as in the paper; base: the base router's weights "
            "by rank, as the authors' released OLMoE code computes."
        },
    )
    init: Literal["zero", "paper"] = field(
        default="zero",
        metadata={
            "help": "zero: up-projections 0, step 0 equals the base exactly; paper: the authors' initialisation."
        },
    )
    router_aux_loss_coef: float = field(
        default=0.01, metadata={"help": "Load-balancing loss of the adapters' own router. routed only."}
    )
    router_aux_loss_scope: Literal["micro_batch", "global_batch"] = field(
        default="micro_batch", metadata={"help": ROUTER_AUX_LOSS_SCOPE}
    )
    router_z_loss_coef: float = field(
        default=0.0, metadata={"help": "z-loss of the adapters' own router. routed only."}
    )
    base_router_aux_loss_coef: float = field(
        default=0.0,
        metadata={
            "help": "Load-balancing loss of the frozen base router: it moves the adapters of earlier layers. The "
            "authors use 0.01 (OLMoE) and 0.02 (Mixtral)."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "MoE blocks: names, suffixes of names, or one regular expression; they mean dense MLPs where they "
            "match no MoE block. `mlp`: every dense MLP. null: every MoE block."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers that are adapted. null: all."}
    )

    linear_target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Linear layers outside the blocks, such as attention's, that get a plain low-rank update, in the "
            "same decoder layers: names or suffixes of names, one regular expression, or all-linear. null: none."
        },
    )
    linear_rank: int = field(default=16, metadata={"help": "Rank of those updates."})
    linear_alpha: float = field(
        default=32, metadata={"help": "Their scale is linear_alpha / linear_rank; dropout is that of the adapter."}
    )

    training_fields: ClassVar[tuple[str, ...]] = (
        "dropout",
        "init",
        "router_aux_loss_coef",
        "router_aux_loss_scope",
        "router_z_loss_coef",
        "base_router_aux_loss_coef",
    )
    against_collapse: ClassVar[str] = (
        "Their adapters do the work of one. Raise `router_aux_loss_coef`, or lower the learning rate."
    )
    found_before_training: ClassVar[tuple[str, ...]] = ("expert_ids",)
    unmergeable: ClassVar[str] = (
        "it runs in parallel with the MoE block or MLP, partly chosen per token, and no weight of the base model "
        "computes that"
    )

    @property
    def title(self) -> str:
        count = f"experts: {self.num_experts}, " if self.num_experts else ""
        if self.expert_ids:
            numbers = sorted({len(ids) for ids in self.expert_ids.values()})
            count = f"inside {' to '.join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))} experts of a block, "
        up_to = f" on average, up to {self.num_slots}" if self.rank_allocation else ""
        return f"PERFT ({self.variant}, {count}rank: {self.rank}{up_to})"

    @property
    def has_router(self) -> bool:
        return self.variant == "routed"

    @property
    def idle_fields(self) -> dict[str, tuple[str, Any]]:
        needs = {
            "alpha": ("expert_type", "lora"),
            "hidden_act": ("expert_type", "parallel_adapter"),
            "router_aux_loss_coef": ("variant", "routed"),
            "router_z_loss_coef": ("variant", "routed"),
        }
        idle = {name: need for name, need in needs.items() if getattr(self, need[0]) != need[1]}
        own = "router_aux_loss_coef" if self.variant == "routed" else "base_router_aux_loss_coef"
        if not getattr(self, own) and not self.base_router_aux_loss_coef:
            idle["router_aux_loss_scope"] = (own, 0.01)
        if not self.linear_target_modules:
            idle |= dict.fromkeys(("linear_rank", "linear_alpha"), ("linear_target_modules", "[q_proj, v_proj]"))
        return idle

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PERFT
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"perft.{name}: {getattr(self, name)!r} is not known; use one of {', '.join(choices)}."
                )
        self._resolve_expert_counts()
        self._check_ranges()
        self._check_experts()
        if self.rank_allocation is not None:
            self.rank_allocation = self._checked_rank_allocation()
        check_target_modules("perft.target_modules", self.target_modules)
        check_target_modules("perft.linear_target_modules", self.linear_target_modules)
        if self.linear_target_modules is not None and not self.linear_target_modules:
            raise ValueError(
                f"perft.linear_target_modules: {self.linear_target_modules!r} names no layer; leave it out for none."
            )
        self._check_goes_beside_dense_mlps()
        for name, neutral in (("norm_topk_prob", None), ("gate_weights", "own")):
            if self.variant != "routed" and getattr(self, name) != neutral:
                raise ValueError(
                    f"perft.{name}: {getattr(self, name)} means nothing with variant {self.variant}, which has no "
                    "router of its own. Leave it out."
                )

    def _resolve_expert_counts(self) -> None:
        used = {"routed": ("num_experts", "num_experts_per_tok"), "dense": ("num_experts",)}.get(self.variant, ())
        for name, default in (("num_experts", 4), ("num_experts_per_tok", 2)):
            value = getattr(self, name)
            if name not in used:
                if value is not None:
                    why = {
                        "dense": "every adapter is always on",
                        "single": "there is one adapter, always on",
                        "embedded": "there is one adapter for each base expert, chosen by the base router",
                    }[self.variant]
                    raise ValueError(
                        f"perft.{name}: {value} means nothing with variant {self.variant}: {why}. Leave it out."
                    )
            elif value is None:
                setattr(self, name, default)
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"perft.{name}: {value!r} is not allowed; it is an integer of at least 1.")
        if self.variant == "routed" and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"perft.num_experts_per_tok: {self.num_experts_per_tok} is more than num_experts "
                f"({self.num_experts}); a token cannot be routed to more adapters than there are."
            )

    def _check_experts(self) -> None:
        """Check what says which experts are adapted, and give it its form."""
        for name in ("experts", "expert_ids"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.variant != "embedded":
                raise ValueError(
                    f"perft.{name}: {value} means nothing with variant {self.variant}: it says which experts of the "
                    "base get an adapter inside. Leave it out, or use variant: embedded."
                )
            if not isinstance(value, Mapping) or not value:
                raise ValueError(f"perft.{name}: {value!r} is not allowed; it is a block like {_EXAMPLES[name]}.")
        if self.experts is not None:
            self.experts = {"calibrate": DEFAULT_CALIBRATION_ROWS, **self.experts}
            unknown = set(self.experts) - {"keep", "calibrate"}
            if unknown or "keep" not in self.experts:
                what = f"{min(unknown)!r} is no key of it" if unknown else "`keep` is missing"
                raise ValueError(f"perft.experts: {what}; it is a block like {_EXAMPLES['experts']}.")
            check_keep(self.experts["keep"])
            rows = self.experts["calibrate"]
            if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
                raise ValueError(f"perft.experts.calibrate: {rows!r} is not allowed; it is an integer of at least 1.")
        if self.expert_ids is not None:
            self.expert_ids = {block: list(ids) for block, ids in self.expert_ids.items()}
            for block, ids in self.expert_ids.items():
                if not ids or len(set(ids)) < len(ids) or any(not isinstance(i, int) or i < 0 for i in ids):
                    raise ValueError(
                        f"perft.expert_ids: {ids} of {block} is not allowed; it is a list of different experts, "
                        "counted from 0."
                    )

    @property
    def calibration_rows(self) -> int:
        return 0 if self.experts is None or self.expert_ids is not None else self.experts["calibrate"]

    def calibrated(self, model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]] | None) -> PerftConfig:
        from .calibration import calibrate_experts, first_experts  # which import this module

        where = {"target_modules": self.target_modules, "layers_to_transform": self.layers_to_transform}
        if batches is None:
            return replace(self, expert_ids=first_experts(model, self.experts["keep"], **where))
        return replace(self, expert_ids=calibrate_experts(model, batches, self.experts["keep"], **where))

    def makes_the_same(self, name: str, saved: PerftConfig) -> bool:
        if name == "rank_allocation" and self.rank_allocation and saved.rank_allocation:
            return self.num_slots == saved.num_slots  # how ranks move shapes training only
        return super().makes_the_same(name, saved)

    def continuing(self, saved: PerftConfig) -> PerftConfig:
        return replace(self, expert_ids=saved.expert_ids)

    @property
    def num_slots(self) -> int:
        """R, the ranks that an expert's adapter has room for."""
        return self.rank if self.rank_allocation is None else self.rank_allocation["max_rank"]

    @property
    def edits_optimizer(self) -> bool:
        return self.rank_allocation is not None

    def _checked_rank_allocation(self) -> dict[str, Any]:
        """The block of ranks that move, with its defaults."""
        key, given = "perft.rank_allocation", self.rank_allocation
        for name, needed in (("variant", "embedded"), ("expert_type", "lora")):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"{key}: {given} means nothing with {name}: {getattr(self, name)}; it moves ranks between the "
                    f"LoRAs inside a base's experts. Leave it out, or use {name}: {needed}."
                )
        if not isinstance(given, Mapping):
            raise ValueError(f"{key}: {given!r} is not allowed; it is a block like {{score: gate}}.")
        if unknown := set(given) - set(RANK_ALLOCATION):
            raise ValueError(f"{key}: {min(unknown)!r} is no key of it; the keys are {', '.join(RANK_ALLOCATION)}.")
        plan = {**RANK_ALLOCATION, "max_rank": 2 * self.rank, **{k: v for k, v in given.items() if v is not None}}
        if plan["score"] not in ("gate", "saliency"):
            raise ValueError(f"{key}.score: {plan['score']!r} is not known; use gate or saliency.")
        for name in ("prune", "grow"):
            if isinstance(plan[name], bool) or not isinstance(plan[name], (int, float)) or not 0 < plan[name] <= 0.5:
                raise ValueError(f"{key}.{name}: {plan[name]!r} is not allowed; it is a number above 0 and up to 0.5.")
        if not isinstance(plan["decay"], (int, float)) or not 0 <= plan["decay"] <= 1:
            raise ValueError(f"{key}.decay: {plan['decay']!r} is not allowed; it is a number from 0 to 1.")
        least = {"max_rank": self.rank + 1, "warmup_steps": 0, "every_steps": 1, "until": 1}
        for name, minimum in least.items():
            value = plan[name]
            if value is None and name == "until":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"{key}.{name}: {value!r} is not allowed; it is an integer of at least {minimum}.")
        return plan

    def _check_goes_beside_dense_mlps(self) -> None:
        needs_a_base_router = {
            "variant": self.variant == "embedded",
            "gate_weights": self.gate_weights == "base",
            "base_router_aux_loss_coef": self.base_router_aux_loss_coef > 0,
        }
        for name, needs_it in needs_a_base_router.items():
            if self.target_modules == DENSE_MLPS and needs_it:
                raise ValueError(
                    f"perft.{name}: {getattr(self, name)} does not go with target_modules: {DENSE_MLPS}, which adapts "
                    "dense MLPs: they have no experts and no router. Leave one of the two out."
                )

    def _check_ranges(self) -> None:
        for name in ("rank", "linear_rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"perft.{name}: {value!r} is not allowed; it is an integer of at least 1.")
        for name in ("alpha", "linear_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"perft.{name}: {getattr(self, name)!r} is not allowed; it is a number above 0.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"perft.dropout: {self.dropout!r} is not allowed; it is a number from 0 to below 1.")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "base_router_aux_loss_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"perft.{name}: {getattr(self, name)!r} is not allowed; it is a number of at least 0."
                )
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"perft.hidden_act: {self.hidden_act!r} is not known; use one of transformers' activations: "
                f"{', '.join(sorted(ACT2FN))}."
            )
