"""MoePeftPlugin: lets Axolotl train the methods of this package. The only module that imports axolotl."""

from __future__ import annotations

from typing import Any

from .versions import check_version

check_version("axolotl")

import torch  # noqa: E402
from axolotl.integrations.base import AdapterCapabilities, BasePlugin  # noqa: E402
from axolotl.loaders.utils import load_model_config  # noqa: E402
from axolotl.utils.dict import DictDefault  # noqa: E402
from axolotl.utils.logging import get_logger  # noqa: E402
from peft import PeftConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from transformers import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .args import CONFIGS, check_saved_adapter  # noqa: E402
from .auxiliary import AuxiliaryLosses  # noqa: E402
from .summary import format_table  # noqa: E402

LOG = get_logger(__name__)


class MoePeftPlugin(BasePlugin):
    """Adds `adapter: perft` and its block to Axolotl."""

    def get_input_args(self) -> str:
        return "axolotl_moe_peft.args.MoePeftArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in CONFIGS]

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        # the first hook after validation: a base that does not fit should fail before an hour of tokenising
        _check_base_model(cfg)

    def pre_model_load(self, cfg: DictDefault) -> None:
        _check_base_model(cfg)

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if cfg.adapter not in CONFIGS:
            return None
        config = _peft_config(cfg)
        if config_only:
            if cfg.lora_model_dir:
                raise ValueError(
                    f"`lora_model_dir` with `rl: {cfg.rl.value}`: Axolotl builds the adapter anew from its "
                    "configuration there and would ignore the saved one. Remove `lora_model_dir`."
                )
            return None, config
        kwargs = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            kwargs["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            check_saved_adapter(config, cfg.lora_model_dir)
            try:
                model = PeftModel.from_pretrained(
                    model, cfg.lora_model_dir, config=config, is_trainable=not inference, **kwargs
                )
            except (RuntimeError, SafetensorError) as error:
                raise ValueError(f"lora_model_dir: {cfg.lora_model_dir!r} cannot be loaded: {error}") from None
        else:
            model = get_peft_model(model, config, **kwargs)
        _log_what_is_trained(model, cfg)
        return model, config

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        return [AdapterCallback(cfg, trainer)] if cfg.adapter in CONFIGS else []


class AdapterCallback(TrainerCallback):
    """Checks the optimiser's parameters once, and puts the routers' figures on the host's log line."""

    def __init__(self, cfg: DictDefault, trainer: Trainer) -> None:
        self.cfg = cfg
        self.trainer = trainer
        self.fresh = not cfg.lora_model_dir

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.fresh = False
        if not self.trainer.is_deepspeed_enabled:  # DeepSpeed's optimiser holds flat copies
            _check_optimizer(kwargs["model"], kwargs["optimizer"])
        auxiliary = self._auxiliary(kwargs["model"])
        if self.cfg.rl and auxiliary is not None:  # these trainers compute the loss outside the model
            auxiliary.loss_scale = 1 / args.gradient_accumulation_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        auxiliary = self._auxiliary(kwargs["model"])
        if auxiliary is not None and control.should_log and hasattr(self.trainer, "store_metrics"):
            figures = auxiliary.statistics.pop(lambda tensor: self.trainer.accelerator.reduce(tensor, "sum"))
            self.trainer.store_metrics(figures, train_eval="train")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.fresh:
            LOG.warning("evaluated a new, untrained adapter; name the trained one's folder with --lora-model-dir")
            self.fresh = False

    def _auxiliary(self, model: torch.nn.Module) -> AuxiliaryLosses | None:
        """The router losses; None of a method without a router."""
        return getattr(self.trainer.accelerator.unwrap_model(model).base_model, "auxiliary", None)


def _peft_config(cfg: DictDefault) -> PeftConfig:
    return CONFIGS[cfg.adapter](**cfg[cfg.adapter], task_type="CAUSAL_LM")


def _check_base_model(cfg: DictDefault) -> None:
    """Attach the adapter to the base's architecture without weights, for the errors that this raises."""
    if cfg.adapter not in CONFIGS:
        return
    config = load_model_config(cfg)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return  # remote code or a multimodal model: the check waits until it is loaded
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    get_peft_model(model, _peft_config(cfg))


def _log_what_is_trained(model: PeftModel, cfg: DictDefault) -> None:
    LOG.info(
        "%s adapter attached, trainable parameters:\n%s", cfg.adapter, format_table(model.base_model.parameter_rows())
    )
    LOG.info("the base model is frozen, routers of its own included")


def _check_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for key, name in trainable.items() if key not in optimised]
    if missing or len(optimised) != len(trainable):
        raise RuntimeError(
            f"the optimiser holds {len(optimised)} parameters, the adapter has {len(trainable)}; not optimised: "
            f"{missing[:5]}. They must be exactly the adapter's; check the `optimizer:` and learning-rate group keys."
        )
