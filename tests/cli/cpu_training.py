"""Tells transformers that a run is meant for the CPU, without which it refuses bf16 there. For tests only."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault


class UseCpu(BasePlugin):
    """List it as `tests.cli.cpu_training.UseCpu` beside the other plugins."""

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        return {"use_cpu": True}
