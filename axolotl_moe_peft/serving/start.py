"""`axolotl moe-serve`, and `python -m axolotl_moe_peft.serving` where there is no Axolotl: which engine, and of what.

The servers are the engines' own, in this process.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from peft import PeftConfig

from ..shared.config import AdapterConfig
from .served import Served


def serve(adapter: str, base: str | None, engine: str | None, port: int, options: list[str]) -> None:
    """Serve a saved adapter until the server is stopped.

    Args:
        adapter: folder or hub id.
        base: folder or hub id of the base model; None: the adapter's own.
        engine: vllm or transformers; None: vllm where it is installed.
        port: of the server.
        options: the engine's own.

    Raises:
        ValueError: the adapter cannot be served, or not by that engine.
    """
    config = _config_of(adapter)
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter!r} does not say what its base model is; give --base.")
    if _choose_engine(engine) == "vllm":
        from .by_vllm import serve_by_vllm as serve_by
    else:
        from .by_transformers import serve_by_transformers as serve_by
    with tempfile.TemporaryDirectory(prefix="moe-serve-") as scratch:
        serve_by(Served(adapter, config, base, port, Path(scratch)), options)


def _config_of(adapter: str) -> AdapterConfig:
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (KeyError, TypeError, OSError, ValueError) as error:
        raise ValueError(f"{adapter!r} is no saved adapter that PEFT can read: {error}.") from error
    if not isinstance(config, AdapterConfig):
        raise ValueError(
            f"{adapter!r} is an adapter of type {config.peft_type.value}, which vLLM and transformers serve without "
            "this package (`vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`)."
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"{adapter!r} has the task_type {config.task_type}; only causal language models are served.")
    return config


def _choose_engine(engine: str | None) -> str:
    if engine is None:
        engine = "vllm" if find_spec("vllm") else "transformers"
        if engine == "transformers":
            print("vLLM is not installed; serving by transformers' own server.", file=sys.stderr, flush=True)
    if engine == "vllm" and not find_spec("vllm"):
        raise ValueError("--engine vllm: vLLM is not installed. Install it: pip install 'axolotl-moe-peft[serve]'.")
    return engine
