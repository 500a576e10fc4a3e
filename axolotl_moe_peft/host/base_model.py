"""The base model of a validated YAML before it is loaded: whether the adapter fits it."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from ..perft.selection import find_moe_blocks
from .attach import peft_config
from .host_keys import REPORT
from .quantised import check_published_format, check_routers_read_float16, check_stacked_experts
from .report_key import wants_report
from .saved import CONTINUED, continued


def check_base_model(cfg: DictDefault) -> None:
    """Attach the adapter to the base's architecture without weights, for the errors that this raises.

    Raises:
        ValueError: the adapter does not fit the base model, or the base is not to be quantised so.
    """
    architecture, config = load_model_config(cfg), peft_config(cfg)
    check_published_format(cfg, architecture)
    _check_room_before_the_text(cfg, architecture, config)
    _check_there_is_a_classifier(cfg, architecture)
    with torch.device("meta"):
        model = model_without_weights(cfg)
    if model is None:
        return  # remote code or a classifier: the check waits until it is loaded
    if wants_report(cfg) and not config.has_router and not find_moe_blocks(model):
        raise ValueError(
            f"{cfg.adapter}.{REPORT}: true reports what routers do, and neither this adapter nor the base model "
            f"({type(model).__name__}) has one. Remove the key."
        )
    check_stacked_experts(cfg, model)
    check_routers_read_float16(cfg, model)
    # where the base's code needs values (JetMoe's router counts tokens in Python) the check waits until it is loaded
    with contextlib.suppress(NotImplementedError):
        attach_without_weights(model, cfg)


def attach_without_weights(model: PreTrainedModel, cfg: DictDefault) -> PeftModel:
    """Attach the YAML's adapter, new or that of `lora_model_dir`, to a base without weights.

    Raises:
        NotImplementedError: the base's code needs values.
        ValueError: the adapter does not fit the base model.
    """
    config = peft_config(cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of is said once, when the adapter is attached
        if not cfg.lora_model_dir:
            return get_peft_model(model, config.calibrated(model, None) if config.calibration_rows else config)
        adapted = get_peft_model(model, continued(config, CONTINUED, cfg.lora_model_dir))
        adapted.base_model.add_what_is_new(config)
        return adapted


def model_without_weights(cfg: DictDefault, **settings: Any) -> PreTrainedModel | None:
    """The base model's architecture, on the device of the context; None if it is not one of transformers' for text.

    Args:
        cfg: the validated YAML.
        settings: of the model, as `from_config` takes them; those that are None are left out.
    """
    architecture = load_model_config(cfg)
    # as the host's own loader chooses
    reads_images = cfg.is_multimodal and type(architecture) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    is_known = reads_images or type(architecture) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_known or cfg.reward_model or cfg.process_reward_model:
        return None
    auto_class = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    return auto_class.from_config(architecture, **{key: s for key, s in settings.items() if s is not None})


def _check_there_is_a_classifier(cfg: DictDefault, architecture: PretrainedConfig) -> None:
    for key, kind, known in (
        ("reward_model", "sequences", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        ("process_reward_model", "tokens", MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    ):
        if cfg[key] and not cfg.trust_remote_code and type(architecture) not in known:
            raise ValueError(
                f"{key}: transformers has no classifier of {kind} for base_model: {cfg.base_model!r} "
                f"({type(architecture).__name__}). Use another base model."
            )


def _check_room_before_the_text(cfg: DictDefault, architecture: PretrainedConfig, config: PeftConfig) -> None:
    if not config.positions_before_text:
        return
    if architecture.is_encoder_decoder:
        raise ValueError(
            f"base_model: {cfg.base_model!r} ({type(architecture).__name__}) is an encoder-decoder; `adapter: "
            f"{cfg.adapter}` puts its prompt before the text of a decoder. Use a decoder-only model."
        )
    most = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if most is not None and cfg.sequence_len + config.positions_before_text > most:
        raise ValueError(
            f"sequence_len: {cfg.sequence_len} and the prompt of {config.positions_before_text} tokens before each "
            f"sequence ({cfg.adapter}.num_virtual_tokens) are more than the {most} positions of the base model. Use "
            f"`sequence_len: {most - config.positions_before_text}` at most."
        )
