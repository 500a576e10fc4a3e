"""TTLoraMoeConfig: what the `tt_lora_moe:` block of an Axolotl YAML and `adapter_config.json` hold."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft import TaskType
from peft.utils import PeftType

from ..shared.config import AdapterConfig

# What a saved pool knows of an expert beside its name and path: all that the shapes of its cores depend on, and alpha.
POOLED_FIELDS = ("rank", "alpha", "target_modules", "factors", "num_cores")

_NAME = r"[\w-]+"


@dataclass
class TTLoraMoeConfig(AdapterConfig):
    """Configuration of TT-LoRA MoE (arXiv 2504.21190, stage 2): frozen experts and a router that picks one.

    An expert is a trained tt_lora adapter, or a plain LoRA of PEFT, which is a tensor train of two cores.

    Every field is a key of the `tt_lora_moe:` block with the same name and default.

    Raises:
        ValueError: a value is out of range.
    """

    experts: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={
            "help": "The experts, each {name: ..., path: ...}: a folder or hub id of a trained tt_lora adapter or "
            "plain LoRA. They are copied into the pool; a saved pool needs the folders no more, and holds the "
            "experts' settings here."
        },
    )
    router: Literal["base_hidden", "embedding_linear", "embedding_mlp"] = field(
        default="base_hidden",
        metadata={
            "help": "What chooses: base_hidden, a linear layer on the base model's last hidden state at the end of "
            "the prompt (the paper's); embedding_linear, embedding_mlp: a linear layer, an MLP on the mean of the "
            "prompt's embeddings."
        },
    )
    router_noise: bool = field(
        default=True, metadata={"help": "Learnt noise on the router's logits, in training only."}
    )
    router_input: Literal["prompt", "sequence"] = field(
        default="prompt",
        metadata={
            "help": "What the router reads of a training sample: the prompt before the first supervised label, as "
            "at inference; or the whole sequence."
        },
    )

    # a saved pool has its experts in it; those that a run has beside them are added
    training_fields: ClassVar[tuple[str, ...]] = ("router_noise", "experts")
    unmergeable: ClassVar[str] = (
        "which expert acts is chosen for each sequence, and no weight of the base model computes that; merge a single "
        "expert's own adapter instead"
    )
    needs_labels: ClassVar[str] = (
        "its router is trained on the prompts of labelled rows, and these trainers call the model without labels"
    )
    needs_expert_labels: ClassVar[bool] = True
    frozen_parts: ClassVar[str] = "its experts"
    loss_of_its_own: ClassVar[str] = "its router's cross-entropy"

    @property
    def title(self) -> str:
        return f"TT-LoRA MoE (experts: {', '.join(self.expert_names)})"

    @property
    def has_router(self) -> bool:
        return True

    @property
    def reads_prompts(self) -> bool:
        return self.router_input == "prompt"

    def check_parts(self, base_model: str | None, saved: TTLoraMoeConfig | None) -> None:
        from .experts import read_expert

        for expert in self.experts[len(saved.experts) if saved else 0 :]:
            read_expert(expert, base_model)

    def added_to(self, saved: TTLoraMoeConfig) -> list[str]:
        return self.expert_names[len(saved.experts) :]

    def continuing(self, saved: TTLoraMoeConfig) -> TTLoraMoeConfig:
        if self.expert_names[: len(saved.experts)] != saved.expert_names:
            raise ValueError(
                f"tt_lora_moe.experts: the saved pool has the experts {', '.join(saved.expert_names)}, the block "
                f"{', '.join(self.expert_names)}. List those of the pool first, in its order (their paths may be "
                "gone), and new ones behind them."
            )
        return dataclasses.replace(self, experts=saved.experts)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TT_LORA_MOE
        if self.task_type not in (None, TaskType.CAUSAL_LM, TaskType.SEQ_CLS):
            task = getattr(self.task_type, "value", self.task_type)
            raise ValueError(
                f"tt_lora_moe.task_type: {task} is not possible: a pool picks one expert for a text, of language "
                "models (CAUSAL_LM) or of classifiers of texts (SEQ_CLS). Load the one expert's own adapter."
            )
        for key, known in (
            ("router", ("base_hidden", "embedding_linear", "embedding_mlp")),
            ("router_input", ("prompt", "sequence")),
            ("router_noise", (True, False)),
        ):
            if getattr(self, key) not in known:
                allowed = ", ".join(map(str, known)).replace("True, False", "true, false")
                raise ValueError(f"tt_lora_moe.{key}: {getattr(self, key)!r} is not known; use one of {allowed}.")
        if not isinstance(self.experts, list) or not self.experts:
            raise ValueError(
                f"tt_lora_moe.experts: {self.experts!r} is not allowed; it is a list of trained tt_lora or "
                "LoRA adapters, each {name: ..., path: ...}."
            )
        for expert in self.experts:
            check_expert_entry(expert)
        duplicates = sorted({name for name in self.expert_names if self.expert_names.count(name) > 1})
        if duplicates:
            raise ValueError(f"tt_lora_moe.experts: the name {duplicates[0]!r} is given twice; names must differ.")

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts, in the order of the router's logits."""
        return [expert["name"] for expert in self.experts]

    @property
    def target_modules(self) -> list[str] | str | None:
        """The modules that the experts adapt; None before they were read."""
        return self.experts[0].get("target_modules")

    @target_modules.setter
    def target_modules(self, value: Any) -> None:
        pass  # BaseTuner writes in what all-linear means for this model; the experts' settings stay as they were


def check_expert_entry(expert: Any) -> None:
    """Check one entry of `experts`: {name, path}; in a saved pool `POOLED_FIELDS`, and a classifier's `num_labels`.

    Raises:
        ValueError: it is something else.
    """
    keys = set(expert) if isinstance(expert, dict) else set()
    if keys - {"num_labels"} not in ({"name", "path"}, {"name", "path", *POOLED_FIELDS}) or (
        "num_labels" in keys and "rank" not in keys
    ):
        raise ValueError(
            f"tt_lora_moe.experts: {expert!r} is not allowed; an expert is {{name: ..., path: ...}}, its name and the "
            "folder or hub id of its tt_lora or LoRA adapter."
        )
    if not isinstance(expert["name"], str) or not re.fullmatch(_NAME, expert["name"]):
        raise ValueError(
            f"tt_lora_moe.experts: the name {expert['name']!r} is not allowed; it is a text of letters, digits, _ "
            "and -."
        )
    if not isinstance(expert["path"], str) or not expert["path"]:
        raise ValueError(
            f"tt_lora_moe.experts: {expert['name']} has the path {expert['path']!r}; it is the folder or hub id of a "
            "tt_lora or LoRA adapter."
        )
