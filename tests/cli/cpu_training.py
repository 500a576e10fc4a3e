"""Plugins for runs on the CPU that are meant for a GPU. For tests only."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault

from tests.quantised_experts import quantise_experts_as_they_load


class UseCpu(BasePlugin):
    """Tells transformers that a run is meant for the CPU, without which it refuses bf16 there.

    List it as `tests.cli.cpu_training.UseCpu` beside the other plugins.
    """

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        return {"use_cpu": True}


class QuantiseExpertsOnCpu(BasePlugin):
    """Lets the host, which quantises experts as they reach a CUDA device, do so as they reach the CPU.

    List it as `tests.cli.cpu_training.QuantiseExpertsOnCpu`, with `device_map: cpu`.
    """

    def pre_model_load(self, cfg: DictDefault) -> None:
        if cfg.quantize_moe_experts:
            quantise_experts_as_they_load(cfg)  # the host would after this hook, and does so once
