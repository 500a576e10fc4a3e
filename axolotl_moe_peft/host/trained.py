"""What is left to do in the host once a run has saved its adapter."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist
from axolotl.utils.dict import DictDefault

from ..launcher import register_in_children

_WEIGHTS_OF_MODELS = ("model*.safetensors", "pytorch_model*.bin")


def finish(cfg: DictDefault) -> None:
    """Leave the adapter as what loads it expects it, and have lm_eval, if the YAML asks for it, load it."""
    # the host calls twice, and before it has left its other processes it saves by that file (FSDP2)
    is_connected = dist.is_available() and dist.is_initialized()
    if not is_connected and os.environ.get("RANK", "0") == "0":
        remove_model_config(Path(cfg.output_dir))
    if cfg.lm_eval_tasks and cfg.lm_eval_post_train:
        evaluate_adapter(cfg)


def remove_model_config(folder: Path) -> None:
    """Remove the base model's config.json, which the host has put beside an adapter.

    transformers takes a folder with both for a whole model and looks in it for the base's weights.
    """
    if not any(path for pattern in _WEIGHTS_OF_MODELS for path in folder.glob(pattern)):
        (folder / "config.json").unlink(missing_ok=True)


def evaluate_adapter(cfg: DictDefault) -> None:
    """Give lm_eval, which the host starts as a program of its own, base and adapter, and let it know the methods.

    The host would give it the output folder as a whole model.
    """
    if not cfg.lm_eval_model:
        cfg.lm_eval_model = f"{cfg.base_model},peft={cfg.output_dir}"
    register_in_children()
