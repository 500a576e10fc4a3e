"""What a method says of itself to whoever trains it: a PEFT config of this package inherits from `Method`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar


class Method:
    """Facts of a method, and of an adapter with these settings.

    Attributes:
        training_fields: fields that shape training and not the model, in which a run may differ from the saved adapter
            that it continues.
        found_before_training: fields that may be left open, and are then filled in by `calibrated` or taken over from
            the saved adapter that a run continues.
        unmergeable: why no weight of a base model can take the adapter up; None: it merges.
        needs_labels: why it cannot be trained by trainers that call the model without labels; None: it can.
        needs_expert_labels: whether every training row belongs to an expert, whose number is the router's label.
        frozen_parts: what of a saved adapter is not trained.
        loss_of_its_own: which loss it trains by instead of that of the logits.
        unreportable: why there is no report of its routing; None: there is, of its routers or the base's.
        against_collapse: what to change where its router sends nearly everything to one expert.
        trains_modules_of_the_base: whether PEFT trains and saves modules and tokens of the base beside it.
    """

    training_fields: ClassVar[tuple[str, ...]] = ()
    found_before_training: ClassVar[tuple[str, ...]] = ()
    unmergeable: ClassVar[str | None] = None
    needs_labels: ClassVar[str | None] = None
    needs_expert_labels: ClassVar[bool] = False
    frozen_parts: ClassVar[str | None] = None
    loss_of_its_own: ClassVar[str | None] = None
    unreportable: ClassVar[str | None] = None
    against_collapse: ClassVar[str] = ""
    trains_modules_of_the_base: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """The method and its settings in a few words."""
        raise NotImplementedError

    @property
    def reads_prompts(self) -> bool:
        """Whether its router reads what comes before the labels, so that every training row needs a prompt."""
        return False

    @property
    def has_router(self) -> bool:
        """Whether there is a router of the adapter's own."""
        return False

    @property
    def positions_before_text(self) -> int:
        """Positions that the adapter puts before every sequence."""
        return 0

    @property
    def idle_fields(self) -> dict[str, tuple[str, Any]]:
        """Fields that mean nothing as others are set: for each, another field and the value that it would need."""
        return {}

    @property
    def router_losses(self) -> dict[str, float]:
        """The coefficients of the router losses that act, by field."""
        coefficients = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.endswith("_loss_coef")
        }
        return {name: value for name, value in coefficients.items() if value and name not in self.idle_fields}

    @property
    def edits_optimizer(self) -> bool:
        """Whether the states of single weights in the optimiser are reached into while it trains."""
        return False

    @property
    def calibration_rows(self) -> int:
        """How many rows of the training data the base has to read before the adapter can be attached."""
        return 0

    def calibrated(self, model: Any, batches: Any) -> Any:
        """This config with what a base model tells that has read some batches.

        Args:
            model: the base model of transformers.
            batches: arguments of its call, a mapping each; or None for a config that has the right shapes and no more,
                of a model without weights.

        Raises:
            ValueError: the base does not tell it.
        """
        return self

    def makes_the_same(self, name: str, saved: Any) -> bool:
        """Whether a field makes the same model here as in the config of a saved adapter."""
        return getattr(self, name) == getattr(saved, name)

    def check_parts(self, base_model: str | None, saved: Any) -> None:
        """Check what an adapter is made of beside its own parameters, before a base model is loaded.

        Args:
            base_model: name or path of the base model, if it is known.
            saved: the config of the saved adapter that it continues, or None.

        Raises:
            ValueError: a part is missing or does not fit.
        """

    def added_to(self, saved: Any) -> list[str]:
        """What this config adds to the saved adapter that it continues."""
        return []

    def continuing(self, saved: Any) -> Any:
        """This config as that of the saved adapter which it continues.

        Raises:
            ValueError: it cannot continue that adapter.
        """
        return self
