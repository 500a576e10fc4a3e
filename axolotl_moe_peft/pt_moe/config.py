"""PTMoeConfig: what the `pt_moe:` block of an Axolotl YAML and `adapter_config.json` hold."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft.utils import PeftType

from ..shared.config import ModulesToSaveConfig
from ..shared.routing import ROUTER_AUX_LOSS_SCOPE, SCOPES


@dataclass
class PTMoeConfig(ModulesToSaveConfig):
    """Configuration of PT-MoE (arXiv 2505.09519): a soft prompt mixed per sequence from factorised prompt experts.

    Every field is a key of the `pt_moe:` block with the same name and default. The paper's ablation are settings of
    it: prompt tuning (num_experts 1, rank null), DPT (num_experts 1), SMoP (rank null).

    Raises:
        ValueError: a value is out of range, or a key is given where it means nothing.
    """

    num_virtual_tokens: int = field(default=40, metadata={"help": "T, the length of the prompt."})
    num_experts: int = field(default=2, metadata={"help": "N, the prompt experts. 1 has no router."})
    rank: int | None = field(
        default=36,
        metadata={"help": "R: expert i is A_i B, with A_i (T, R) and B (R, H) shared by all. null: not factorised."},
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "Experts that a sequence's prompt is mixed from. num_experts, which new adapters have: all, by "
            "the router's weights. 1, as in the paper, where center_router_input or scale_by_router_prob is false or "
            "there is a router_aux_loss_coef."
        },
    )
    router_noise_std: float = field(
        default=0.1, metadata={"help": "Multiplicative Gaussian noise on the router's logits, in training only."}
    )
    center_router_input: bool | None = field(
        default=None,
        metadata={
            "help": "true, which new adapters with a router have: it reads what tells prompts apart, their mean "
            "embedding less that of the training prompts, at a fixed length. false: the mean embedding itself, as in "
            "the paper."
        },
    )
    scale_by_router_prob: bool = field(
        default=True,
        metadata={
            "help": "Weigh an expert by its probability, which is how the router learns; false: weight 1, which needs "
            "router_aux_loss_coef."
        },
    )
    init_text: str | list[str] | None = field(
        default=None,
        metadata={"help": "The text that the experts start from, or one for each. null: a neutral instruction."},
    )
    router_input: Literal["prompt", "sequence"] = field(
        default="prompt",
        metadata={
            "help": "What the router reads where there are labels: prompt, the tokens before the first one; sequence, "
            "all of them. Without labels it is all of them."
        },
    )
    router_aux_loss_coef: float = field(
        default=0.0, metadata={"help": "Load-balancing loss of the router, over sequences."}
    )
    router_aux_loss_scope: Literal["micro_batch", "global_batch"] = field(
        default="micro_batch", metadata={"help": ROUTER_AUX_LOSS_SCOPE}
    )

    training_fields: ClassVar[tuple[str, ...]] = (
        "router_noise_std",
        "router_aux_loss_coef",
        "router_aux_loss_scope",
        "init_text",
    )
    found_before_training: ClassVar[tuple[str, ...]] = ("center_router_input", "top_k")
    against_collapse: ClassVar[str] = (
        "The mixture is one prompt. If prompts are of several kinds, leave `center_router_input`, `top_k` and "
        "`router_aux_loss_coef` out, or raise the last; else take `num_experts: 1`, which has no router."
    )
    unmergeable: ClassVar[str] = (
        "it is a prompt before the text, chosen per sequence, and no weight of the base model computes that"
    )
    needs_labels: ClassVar[str] = (
        "its prompt is chosen by the part of a row before the labels, and these trainers call the model without labels"
    )

    # PEFT asks every config; the prompt has one place to go
    target_modules: ClassVar[None] = None

    @property
    def title(self) -> str:
        return f"PT-MoE (experts: {self.num_experts}, virtual tokens: {self.num_virtual_tokens})"

    @property
    def has_router(self) -> bool:
        return self.num_experts > 1  # a single prompt is not chosen

    @property
    def takes_all_experts(self) -> bool:
        return self.top_k == self.num_experts

    @property
    def reads_prompts(self) -> bool:
        return self.router_input == "prompt" and self.has_router

    @property
    def idle_fields(self) -> dict[str, tuple[str, Any]]:
        return {} if self.router_aux_loss_coef else {"router_aux_loss_scope": ("router_aux_loss_coef", 0.01)}

    @property
    def positions_before_text(self) -> int:
        return self.num_virtual_tokens

    def continuing(self, saved: PTMoeConfig) -> PTMoeConfig:
        return dataclasses.replace(self, center_router_input=saved.center_router_input, top_k=saved.top_k)

    def choose_defaults(self) -> None:
        """Fill in what a new adapter was left to choose."""
        if self.center_router_input is None:
            self.center_router_input = self.has_router
        if self.top_k is None:
            mixes_all = self.center_router_input and self.scale_by_router_prob and not self.router_aux_loss_coef
            self.top_k = self.num_experts if mixes_all else 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PT_MOE
        for name in ("num_virtual_tokens", "num_experts", "top_k"):
            if not _is_count(getattr(self, name)) and not (name == "top_k" and self.top_k is None):
                raise ValueError(
                    f"pt_moe.{name}: {getattr(self, name)!r} is not allowed; it is an integer of at least 1."
                )
        if self.is_saved and self.center_router_input is None:  # it is older than this key
            self.center_router_input = False
        if self.is_saved or not self.has_router:
            self.choose_defaults()
        self._check_rank()
        self._check_router()
        self._check_init_text()

    def _check_rank(self) -> None:
        if self.rank is None:
            return
        if not _is_count(self.rank):
            raise ValueError(f"pt_moe.rank: {self.rank!r} is not allowed; it is an integer of at least 1, or null.")
        if self.rank > self.num_virtual_tokens:
            raise ValueError(
                f"pt_moe.rank: {self.rank} is more than num_virtual_tokens ({self.num_virtual_tokens}), which no "
                "prompt of so many tokens has. Use a smaller rank, or null for a prompt that is not factorised."
            )

    def _check_router(self) -> None:
        if self.center_router_input and not self.has_router:
            raise ValueError(
                "pt_moe.center_router_input: true means nothing with num_experts: 1, which has no router. Leave it "
                "out."
            )
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ValueError(
                f"pt_moe.top_k: {self.top_k} is more than num_experts ({self.num_experts}); a prompt cannot be mixed "
                "from more experts than there are."
            )
        for name in ("router_noise_std", "router_aux_loss_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"pt_moe.{name}: {getattr(self, name)!r} is not allowed; it is a number of at least 0."
                )
        if self.router_input not in ("prompt", "sequence"):
            raise ValueError(f"pt_moe.router_input: {self.router_input!r} is not known; use one of prompt, sequence.")
        if self.router_aux_loss_scope not in SCOPES:
            raise ValueError(
                f"pt_moe.router_aux_loss_scope: {self.router_aux_loss_scope!r} is not known; use one of "
                f"{', '.join(SCOPES)}."
            )
        if self.num_experts == 1 and self.router_aux_loss_coef:
            raise ValueError(
                f"pt_moe.router_aux_loss_coef: {self.router_aux_loss_coef} means nothing with num_experts: 1, which "
                "has no router. Leave it out."
            )
        if self.has_router and self.takes_all_experts and self.router_aux_loss_coef:
            raise ValueError(
                f"pt_moe.router_aux_loss_coef: {self.router_aux_loss_coef} means nothing where every prompt is mixed "
                f"from all {self.num_experts} experts, whose load is equal whatever the router says. Set top_k: 1, or "
                "leave the key out."
            )
        if self.has_router and self.takes_all_experts and not self.scale_by_router_prob:
            raise ValueError(
                "pt_moe.scale_by_router_prob: false means that every prompt is the sum of all experts, whatever the "
                "router says, where it is mixed from all of them. Set top_k: 1, or leave the key out."
            )
        if self.num_experts > 1 and not self.scale_by_router_prob and not self.router_aux_loss_coef:
            raise ValueError(
                "pt_moe.scale_by_router_prob: false leaves the router without a gradient: nothing would train it. "
                "Leave the key out, or set router_aux_loss_coef above 0."
            )

    def _check_init_text(self) -> None:
        if self.init_text is None:
            return
        texts = self.init_text if isinstance(self.init_text, (list, tuple)) else [self.init_text]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"pt_moe.init_text: {self.init_text!r} is not allowed; it is a text that is not empty, a list of one "
                "for each expert, or null."
            )
        if not isinstance(self.init_text, str):
            self.init_text = list(texts)
            if len(texts) != self.num_experts:
                raise ValueError(
                    f"pt_moe.init_text: {len(texts)} texts for {self.num_experts} experts. Give one text for all, or "
                    "one for each (num_experts)."
                )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
