"""Lets `bf16: true` run on a CPU, which the host keeps to accelerators. For tests only; a plugin, no patch."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault


class UseCpu(BasePlugin):
    """Sets `use_cpu` of the training arguments."""

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        return {"use_cpu": True}
