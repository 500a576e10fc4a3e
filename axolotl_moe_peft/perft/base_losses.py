"""The base router's auxiliary loss: PERFT has a coefficient of its own for it, and no other may act beside it."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, Trainer

LOG = logging.getLogger(__name__)


class BaseLosses:
    """Switches off the auxiliary loss that the base model or a trainer of TRL would add for the base router.

    transformers' models add it to their loss where the configuration says `output_router_logits`. TRL's trainers turn
    that on for every model that can, with a coefficient of their own (1.9 to 1.13: 0.001) or the one in the model's
    configuration (since 1.14).

    Args:
        model: the base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._config: PretrainedConfig = model.config.get_text_config()
        self._logits = getattr(self._config, "output_router_logits", None)
        self._modules = [m for m in model.modules() if isinstance(getattr(m, "router_aux_loss_coef", None), float)]
        self._coefs = [module.router_aux_loss_coef for module in self._modules]
        if self._logits:
            self._config.output_router_logits = False
            LOG.warning(
                "the base model's own router loss (output_router_logits in its configuration) is switched off; "
                "perft.base_router_aux_loss_coef is the coefficient of that loss"
            )
        for module in self._modules:  # where a call asks for the logits
            module.router_aux_loss_coef = 0.0

    def restore(self) -> None:
        """Leave the base as it was."""
        if self._logits is not None:
            self._config.output_router_logits = self._logits
        for module, coef in zip(self._modules, self._coefs):
            module.router_aux_loss_coef = coef

    def prepare_trainer(self, trainer: Trainer, coefs: dict[str, float]) -> None:
        """Switch off what a trainer of TRL adds.

        Args:
            trainer: any trainer.
            coefs: what the active adapters say instead, by adapter name.

        Raises:
            ValueError: the trainer's arguments ask for it.
        """
        if not getattr(trainer, "aux_loss_enabled", False):
            return
        given = trainer.args.router_aux_loss_coef
        if given and given != _default(trainer.args, "router_aux_loss_coef"):
            raise ValueError(
                f"router_aux_loss_coef: {given} of {type(trainer.args).__name__} would train PERFT adapters with the "
                "base router's loss beside what the adapter says of it. Leave it out, and give the coefficient as "
                "`base_router_aux_loss_coef` of the adapter."
            )
        trainer.aux_loss_enabled = False
        self._config.output_router_logits = False
        LOG.info(
            "%s would add the base router's loss; it is switched off, and acts with base_router_aux_loss_coef: %s",
            type(trainer).__name__,
            ", ".join(f"{coef} ({name})" for name, coef in coefs.items()),
        )


def _default(arguments: Any, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(arguments) if field.name == name)
