"""The plugin's part of an Axolotl YAML: one block per adapter, and its checks."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, get_type_hints

from peft import PeftConfig
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, StrictBool, create_model, model_validator

from ..registration import METHODS, config_class
from .calibration import check_rows_can_be_counted
from .host_keys import BITS_AND_BYTES, QUANTISED_EXPERTS, REPORT, check_host_keys, check_keys_beside_router_losses
from .on_disk import check_base_is_there
from .report_key import check_report, wants_report
from .rows import KEY as ROWS_WITHOUT_PROMPT
from .saved import CONTINUED, continued, own_fields, saved_adapters
from .spelling import check_spelling

# keys of a block that are for the rows: no part of the adapter
_FOR_ROWS = {
    ROWS_WITHOUT_PROMPT: (
        Literal["raise", "drop"],
        Field(default="raise", description="Rows whose first token is supervised: an error, or left out."),
    )
}

# keys of a block that are for the run
_FOR_RUN = {
    REPORT: (
        StrictBool,
        Field(
            default=False,
            description="Write routing.json and routing.html at the end of training, from the evaluation data.",
        ),
    )
}

CONFIGS: dict[str, type[PeftConfig]] = {name: config_class(name) for name in METHODS}


def _block_model(config_cls: type[PeftConfig]) -> type[BaseModel]:
    """A pydantic model with the fields that are the method's own."""
    hints = get_type_hints(config_cls)
    fields = {
        name: (hints[name], Field(description=f.metadata["help"], **_default(f)))
        for name, f in own_fields(config_cls).items()
    }
    if "router_input" in fields:
        fields |= _FOR_ROWS
    if config_cls.unreportable is None:
        fields |= _FOR_RUN
    return create_model(f"{config_cls.__name__}Block", __config__=ConfigDict(extra="forbid"), **fields)


def _default(field: dataclasses.Field) -> dict[str, Any]:
    if field.default is dataclasses.MISSING:
        return {"default_factory": field.default_factory}
    return {"default": field.default}


BLOCKS: dict[str, type[BaseModel]] = {name: _block_model(config_cls) for name, config_cls in CONFIGS.items()}

_Blocks = create_model(
    "_Blocks",
    **{
        name: (block | None, Field(default=None, description=f"Needs `adapter: {name}`."))
        for name, block in BLOCKS.items()
    },
)


class MoePeftArgs(_Blocks):
    """Merged by Axolotl into its own schema, so that the checks see the whole YAML."""

    @model_validator(mode="wrap")
    @classmethod
    def _let_experts_be_quantised(cls, data: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
        # the host's loader quantises experts for any adapter, and its schema lets lora and qlora alone ask for it
        if data.get("adapter") not in CONFIGS or not data.get(QUANTISED_EXPERTS):
            return validate(data)
        check_host_keys(data, own_fields(CONFIGS[data["adapter"]]))
        validated = validate({key: value for key, value in data.items() if key != QUANTISED_EXPERTS})
        setattr(validated, QUANTISED_EXPERTS, data[QUANTISED_EXPERTS])
        return validated

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        adapter = data.get("adapter")
        for name in CONFIGS:
            if name != adapter and data.get(name) is not None:
                raise ValueError(
                    f"`{name}:` is given, but `adapter:` is {adapter!r}, so the block would be ignored. Write "
                    f"`adapter: {name}`, or remove the block."
                )
        if adapter not in CONFIGS:
            return data
        if data.get(adapter) is None:
            raise ValueError(f"`adapter: {adapter}` needs a `{adapter}:` block; `{adapter}: {{}}` takes the defaults.")
        own_keys = own_fields(CONFIGS[adapter])
        _check_keys_of_the_block(adapter, data[adapter], list(BLOCKS[adapter].model_fields))
        check_host_keys(data, own_keys)
        check_spelling(data, [cls])
        data = _check_command(data)
        if wants_report(data) and not data.get("inference") and not data.get("merge_lora"):
            check_report(data)
        return data

    @model_validator(mode="after")
    def _check_block(self) -> MoePeftArgs:
        adapter = getattr(self, "adapter", None)
        if adapter not in CONFIGS:
            return self
        check_base_is_there(self.base_model)
        block = getattr(self, adapter)
        config = config_of(adapter, block)
        for key, (setting, value) in config.idle_fields.items():
            if key in block.model_fields_set and getattr(block, key):
                raise ValueError(
                    f"{adapter}.{key} means nothing with {setting}: {getattr(block, setting)}; remove it, or use "
                    f"{setting}: {value}."
                )
        if ROWS_WITHOUT_PROMPT in block.model_fields_set and not config.reads_prompts:
            raise ValueError(
                f"{adapter}.{ROWS_WITHOUT_PROMPT} means nothing where the router does not choose by prompts "
                "(`router_input: sequence`, a single prompt); remove it."
            )
        check_keys_beside_router_losses(self, config)
        saved = {key: continued(config, key, folder) for key, folder in saved_adapters(self)}
        for key in ("deepspeed", "fp16") if config.edits_optimizer else ():
            if getattr(self, key, None):
                raise ValueError(
                    f"{adapter}.rank_allocation does not go with `{key}`: ranks move between weights, gradients and "
                    "optimiser states that must be there as they are, and not as flat copies or scaled. Use bf16, on "
                    "several GPUs with DDP or FSDP2, or leave the block out."
                )
        if not saved:
            check_rows_can_be_counted(self, config)
        config.check_parts(getattr(self, "base_model", None), saved.get(CONTINUED))
        return self

    @model_validator(mode="after")
    def _ask_for_a_quantised_base(self) -> MoePeftArgs:
        # the host's own keyword arguments of from_pretrained; the plugin fills them in once the dtype is known
        if getattr(self, "adapter", None) in CONFIGS and any(getattr(self, key, None) for key in BITS_AND_BYTES):
            given = self.overrides_of_model_kwargs or {}
            self.overrides_of_model_kwargs = {**given, "quantization_config": {}}
        return self


def config_of(adapter: str, block: Any) -> PeftConfig:
    """The PEFT config of an adapter's block.

    Args:
        adapter: its name.
        block: the block, validated or as the YAML has it.

    Raises:
        ValueError: the block is wrong.
    """
    return CONFIGS[adapter](**BLOCKS[adapter].model_validate(block).model_dump(exclude={*_FOR_ROWS, *_FOR_RUN}))


def _check_keys_of_the_block(adapter: str, block: Any, known: list[str]) -> None:
    if not isinstance(block, dict):
        raise ValueError(f"`{adapter}:` is {block!r}; it is a block of keys: {', '.join(known)}.")
    for key in block:
        if key == REPORT and (reason := CONFIGS[adapter].unreportable):
            raise ValueError(f"{adapter}.{key}: {reason}, so that there is nothing to report; remove it.")
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{nearest[0]}`? " if nearest else ""
            raise ValueError(f"{adapter}.{key}: no such key; {hint}The keys are {', '.join(known)}.")


def _check_command(data: dict[str, Any]) -> dict[str, Any]:
    """Check what `axolotl merge-lora` and `axolotl inference` put into the YAML; they are no fields of the schema.

    Returns:
        The YAML as the host should go on with it.
    """
    adapter = data["adapter"]
    if data.get("merge_lora"):
        if reason := CONFIGS[adapter].unmergeable:
            raise ValueError(
                f"`axolotl merge-lora` cannot merge an adapter of type {adapter}: {reason}. Nothing was written. Keep "
                "the adapter beside the base: `axolotl inference --lora-model-dir ...`, PEFT's from_pretrained."
            )
        if data.get("merge_method") == "memory_efficient":
            raise ValueError(
                f"`merge_method: memory_efficient` reads LoRA's own tensors only and cannot merge an adapter of "
                f"type {adapter}. Remove the key; the model is then merged in memory."
            )
        data = {**data, "merge_method": "legacy"}
    if data.get("inference") and not data.get("lora_model_dir"):
        raise ValueError(
            f"`adapter: {adapter}` without `lora_model_dir` would run inference with an untrained adapter. Give "
            "the trained one's folder: --lora-model-dir ./outputs/..."
        )
    return data
