"""One small configuration of each method, for what is the same with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig

from tests import tiny_adapters
from tests.tiny_adapters import METHODS as METHODS
from tests.tt_lora_moe.pools import save_experts

# what lets the adapter act from the first step on
_ACTING = {"perft": {"init": "paper"}, "tt_lora": {"alpha": 500}}


def config_of(method: str, folder: Path, **kwargs: Any) -> PeftConfig:
    """A configuration for the tiny Mixtral; a pool's experts are saved under `folder`."""
    experts = save_experts(folder, "mixtral") if method == "tt_lora_moe" else []
    return tiny_adapters.config_of(method, experts, **_ACTING.get(method, {}), **kwargs)
