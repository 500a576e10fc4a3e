"""`axolotl moe-report`: the routing report of an adapter that is trained already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import setup_model_and_tokenizer
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import cleanup_distributed
from axolotl.utils.trainer import setup_trainer

from ..registration import METHODS
from .base_model import check_base_model
from .host_keys import REPORT
from .report import report_of


def load_config(path: str, lora_model_dir: str | None = None, output_dir: str | None = None) -> DictDefault:
    """The validated YAML, asking for the report of a saved adapter.

    Args:
        path: of the YAML.
        lora_model_dir: the adapter; None: what the YAML names, or else the adapter in its `output_dir`.
        output_dir: where the report goes; None: that of the YAML.

    Raises:
        ValueError: the YAML is wrong, has another adapter, or there is no trained one.
    """
    data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    adapter = data.get("adapter") if isinstance(data, dict) else None
    if adapter not in METHODS:
        raise ValueError(f"adapter: {adapter!r} is none of this package; use one of {', '.join(METHODS)}.")
    if isinstance(data.get(adapter), dict):  # else validation says what is wrong
        data[adapter][REPORT] = True
    if data.get("deepspeed"):
        raise ValueError("moe-report runs without DeepSpeed; give a YAML without `deepspeed`.")
    data["lora_model_dir"] = lora_model_dir or data.get("lora_model_dir") or _trained(data)
    if output_dir is not None:
        data["output_dir"] = output_dir
    return load_cfg(DictDefault(data))


def _trained(data: dict[str, Any]) -> str:
    folder = data.get("output_dir")
    if not folder or not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"there is no trained adapter in output_dir ({folder!r}); give the folder of one: --lora-model-dir ..."
        )
    return folder


def report_saved(cfg: DictDefault) -> None:
    """Write the report of the adapter in `lora_model_dir` into `output_dir`.

    Args:
        cfg: the validated YAML, which asks for the report.

    Raises:
        ValueError: the run cannot be set up.
    """
    check_base_model(cfg)  # before an hour of tokenising
    dataset_meta = load_datasets(cfg=cfg)
    model, tokenizer, _, processor = setup_model_and_tokenizer(cfg)
    trainer = setup_trainer(
        cfg=cfg,
        train_dataset=dataset_meta.train_dataset,
        eval_dataset=dataset_meta.eval_dataset,
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        total_num_steps=dataset_meta.total_num_steps,
    )
    report_of(trainer.callback_handler.callbacks).write_of_saved()
    cleanup_distributed()
