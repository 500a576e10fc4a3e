"""MoePeftPlugin: lets Axolotl train the methods of this package."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from typing import Any

import torch
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..pt_moe import PTMoeConfig
from ..shared.summary import format_table
from ..tt_lora_moe import TTLoraMoeConfig
from ..versions import warn_of_newer_versions
from .args import (
    CONFIGS,
    check_datasets,
    check_saved_adapter,
    could_be_on_the_hub,
    dataset_entries,
    expert_names,
    own_fields,
)
from .callback import AdapterCallback
from .dataset_experts import COLUMN, ExpertLabelCollator, tag_dataset
from .fsdp2 import Fsdp2Checkpoints

LOG = get_logger(__name__)


class MoePeftPlugin(BasePlugin):
    """Adds the adapters of this package and their blocks to Axolotl."""

    def register(self, cfg: dict[str, Any]) -> None:
        if cfg.get("adapter") not in CONFIGS:
            return
        warn_of_newer_versions()
        check_datasets(cfg)
        names = expert_names(cfg)
        if cfg.get("adapter") != "tt_lora_moe" or not names or cfg.get("inference") or cfg.get("merge_lora"):
            return
        datasets = [dataset for _, dataset in dataset_entries(cfg, "datasets")]
        for name in names:
            if not any(dataset.get("expert") == name for dataset in datasets):
                LOG.warning("no dataset has `expert: %s`: the router does not learn to choose it", name)
        for dataset in datasets + [dataset for _, dataset in dataset_entries(cfg, "test_datasets")]:
            tag_dataset(dataset, names)

    def get_input_args(self) -> str:
        return "axolotl_moe_peft.host.args.MoePeftArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in CONFIGS]

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        # the first hook after validation: a base that does not fit should fail before an hour of tokenising
        _check_base_model(cfg)

    def pre_model_load(self, cfg: DictDefault) -> None:
        _check_base_model(cfg)
        if cfg.adapter in CONFIGS and (cfg.load_in_4bit or cfg.load_in_8bit):
            # Axolotl's loader, which quantises for its own adapters only, already holds this dict
            cfg.overrides_of_model_kwargs["quantization_config"].update(_quantization(cfg))

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if cfg.adapter not in CONFIGS:
            return None
        config = _peft_config(cfg)
        if config_only:
            return None, config
        kwargs = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            kwargs["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            saved = _config_of_saved(config, cfg.lora_model_dir)
            try:
                model = PeftModel.from_pretrained(
                    model, cfg.lora_model_dir, config=saved, is_trainable=not inference, **kwargs
                )
            except (RuntimeError, SafetensorError) as error:
                raise ValueError(f"lora_model_dir: {cfg.lora_model_dir!r} cannot be loaded: {error}") from None
            _add_experts(model, config)
        else:
            # the host seeds later, and under FSDP2 each process keeps its part of its own start
            set_seed(TrainingArguments.seed if cfg.seed is None else cfg.seed)
            model = get_peft_model(model, config, **kwargs)
        _log_what_is_trained(model, cfg)
        return model, config

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        if cfg.adapter not in CONFIGS:
            return []
        if cfg.adapter == "tt_lora_moe":
            _collate_expert_labels(trainer)
        if cfg.rl and "ref" in trainer.model.peft_config:
            _copy_into_reference(trainer.model)
        callbacks: list[TrainerCallback] = [AdapterCallback(cfg, trainer)]
        if trainer.accelerator.is_fsdp2:
            callbacks.append(Fsdp2Checkpoints(cfg, trainer))
        return callbacks


def _peft_config(cfg: DictDefault) -> PeftConfig:
    block, config_cls = cfg[cfg.adapter], CONFIGS[cfg.adapter]
    # by name: the host leaves out what is null, which is not always the default
    return config_cls(**{name: block.get(name) for name in own_fields(config_cls)}, task_type="CAUSAL_LM")


def _check_base_model(cfg: DictDefault) -> None:
    """Attach the adapter to the base's architecture without weights, for the errors that this raises."""
    if cfg.adapter not in CONFIGS:
        return
    config = load_model_config(cfg)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if cfg.adapter == "pt_moe" and config.is_encoder_decoder:
            raise ValueError(
                f"base_model: {cfg.base_model!r} ({type(config).__name__}) is an encoder-decoder; `adapter: pt_moe` "
                "puts its prompt before the text of a decoder. Use a decoder-only model."
            )
        return  # remote code or a multimodal model: the check waits until it is loaded
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config = _peft_config(cfg)
    if isinstance(config, PTMoeConfig):
        _check_room_for_the_prompt(cfg, model, config)
    # what there is to warn of is said once, when the adapter is attached; and where the base's own code needs values
    # (JetMoe's router counts tokens in Python) the check waits until then, too
    with warnings.catch_warnings(), contextlib.suppress(NotImplementedError):
        warnings.simplefilter("ignore")
        if cfg.lora_model_dir and not could_be_on_the_hub(cfg.lora_model_dir):
            _add_experts(get_peft_model(model, _config_of_saved(config, cfg.lora_model_dir)), config)
        else:
            get_peft_model(model, config)


def _quantization(cfg: DictDefault) -> dict[str, Any]:
    """What `load_in_4bit` or `load_in_8bit` mean for bitsandbytes, as with `adapter: qlora` and `adapter: lora`."""
    settings: dict[str, Any] = {"load_in_8bit": True}
    if cfg.load_in_4bit:
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": cfg.torch_dtype,
            **(cfg.bnb_config_kwargs or {}),
        }
    # these families' code reads the weights of some linear layers
    skipped = {"jamba": ["mamba"], "falcon_h1": ["out_proj"]}.get(cfg.model_config_type)
    return settings | ({"llm_int8_skip_modules": skipped} if skipped else {})


def _check_room_for_the_prompt(cfg: DictDefault, model: PreTrainedModel, config: PTMoeConfig) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and cfg.sequence_len + config.num_virtual_tokens > most:
        raise ValueError(
            f"sequence_len: {cfg.sequence_len} and the prompt of {config.num_virtual_tokens} tokens before each "
            f"sequence (pt_moe.num_virtual_tokens) are more than the {most} positions of the base model. Use "
            f"`sequence_len: {most - config.num_virtual_tokens}` at most."
        )


def _config_of_saved(config: PeftConfig, folder: str) -> PeftConfig:
    """The YAML's block as a config for the saved adapter that it continues."""
    saved = check_saved_adapter(config, folder)
    if isinstance(config, TTLoraMoeConfig):  # its experts are in the adapter
        return dataclasses.replace(config, experts=saved.experts)
    return config


def _add_experts(model: PeftModel, config: PeftConfig) -> None:
    """Put the block's experts that a saved pool does not have into it."""
    if isinstance(config, TTLoraMoeConfig):
        for expert in config.experts[len(model.peft_config["default"].experts) :]:
            LOG.info("adding the expert %s to the pool", expert["name"])
            model.base_model.add_expert(expert["name"], expert["path"])


def _collate_expert_labels(trainer: Trainer) -> None:
    padding_side = trainer.processing_class.padding_side
    trainer.data_collator = ExpertLabelCollator(trainer.data_collator, padding_side)
    trainer.eval_data_collator = ExpertLabelCollator(trainer.eval_data_collator, padding_side)
    # else the host drops the column of rows that it does not pack
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns.append(COLUMN)


def _copy_into_reference(model: PeftModel) -> None:
    """Make TRL's frozen reference a copy of the adapter; TRL copies only parameters of modules named after it."""
    for name, parameter in model.named_parameters():
        if name.endswith(".default"):
            model.get_parameter(f"{name.removesuffix('default')}ref").data.copy_(parameter.data)


def _log_what_is_trained(model: PeftModel, cfg: DictDefault) -> None:
    rows = model.base_model.parameter_rows()
    LOG.info("%s adapter attached, trainable parameters:\n%s", cfg.adapter, format_table(rows))
    LOG.info("the base model is frozen, routers of its own included")
    layers = getattr(model.base_model, "adapted_layers", None)
    if layers is not None and len(layers) != model.config.get_text_config().num_hidden_layers:
        LOG.info("layers with an adapter: %s", ", ".join(map(str, layers)))
