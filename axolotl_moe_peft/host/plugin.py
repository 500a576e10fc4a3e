"""MoePeftPlugin: lets Axolotl train the methods of this package.

Axolotl 0.21 loads it in every run on a machine where it is installed. So every hook leaves at once where the adapter
is none of ours, and what a run with ours needs is imported there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin

from ..registration import METHODS
from ..versions import warn_of_newer_versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.utils.dict import DictDefault
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, Trainer, TrainerCallback


_NAME = f"{__package__.partition('.')[0]}.MoePeftPlugin"


def _check_name(plugins: Any) -> None:
    """Check that the plugin has one name: by another Axolotl takes it for a second one, beside the installed."""
    for name in plugins or []:
        if name != _NAME and str(name).startswith(f"{__package__.partition('.')[0]}."):
            raise ValueError(f"plugins: {name!r} is the plugin {_NAME!r} by another name; write `- {_NAME}`.")


class MoePeftPlugin(BasePlugin):
    """Adds the adapters of this package and their blocks to Axolotl."""

    _callbacks: Sequence[TrainerCallback] = ()  # of the run's trainer
    _rows: Any = None  # the training data, where an adapter is calibrated on them

    def register(self, cfg: dict[str, Any]) -> None:
        if cfg.get("adapter") in METHODS:
            from .datasets import prepare_datasets
            from .fsdp2 import take_over_from_launcher

            _check_name(cfg.get("plugins"))
            warn_of_newer_versions()
            prepare_datasets(cfg)
            take_over_from_launcher(cfg)

    def get_input_args(self) -> str:
        return "axolotl_moe_peft.host.args.MoePeftArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in METHODS]

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> TrainDatasetMeta | None:
        if cfg.adapter not in METHODS:
            return None
        from axolotl.utils.distributed import is_main_process

        from .base_model import check_base_model

        # the first hook after validation: a base that does not fit should fail before an hour of tokenising
        check_base_model(cfg)
        if preprocess:
            return None
        from .attach import peft_config
        from .calibration import load_rows
        from .memory import free_memory, log_estimate

        if is_main_process():
            log_estimate(cfg, free_memory())
        datasets = load_rows(cfg, peft_config(cfg))
        self._rows = datasets and datasets.train_dataset
        return datasets

    def pre_model_load(self, cfg: DictDefault) -> None:
        if cfg.adapter in METHODS:
            from .base_model import check_base_model
            from .quantised import quantise

            check_base_model(cfg)
            quantise(cfg)

    def post_model_build(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        if cfg.adapter in METHODS and cfg.quantize_moe_experts:
            from .quantised import check_quantised_experts, end_caches_with_calls

            check_quantised_experts(model)
            end_caches_with_calls(model)

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if cfg.adapter not in METHODS:
            return None
        from .attach import attach, peft_config, seed_the_start

        if config_only:  # TRL's trainers attach it
            seed_the_start(cfg)
            return None, peft_config(cfg, model)
        return attach(model, cfg, inference, self._rows)

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        if cfg.adapter not in METHODS:
            return []
        from .trainer import prepare_trainer

        self._callbacks = prepare_trainer(cfg, trainer)
        return self._callbacks

    def post_train(self, cfg: DictDefault, model: PeftModel) -> None:
        if cfg.adapter in METHODS:
            from .trained import finish

            finish(cfg)

    def post_train_unload(self, cfg: DictDefault) -> None:
        if cfg.adapter in METHODS:
            from .report import check_that_it_was_written

            # post_train comes first before the adapter is saved
            check_that_it_was_written(self._callbacks)
