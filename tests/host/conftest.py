"""Reading a YAML as Axolotl's commands do."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.tee import close_debug_log

from tests.tiny_models import tiny_config

PLUGIN = "axolotl_moe_peft.MoePeftPlugin"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DictDefault]]:
    """`load(perft={...})`: write a YAML with these keys and read it as the commands do."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    environment = dict(os.environ)
    base = tmp_path / "base"
    tiny_config("mixtral").save_pretrained(base)

    def write_and_load(overrides: dict[str, Any] | None = None, **keys: Any) -> DictDefault:
        settings = {
            "base_model": str(base),
            "plugins": [PLUGIN],
            "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
            "output_dir": str(tmp_path / "out"),
            "adapter": "perft",
            "perft": {},
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-4,
            "bf16": False,
        } | keys
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return load_cfg(str(path), **(overrides or {}))

    yield write_and_load
    close_debug_log()
    os.environ.clear()
    os.environ.update(environment)
