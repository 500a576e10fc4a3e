"""The plugin's part of an Axolotl YAML: one block per adapter, and its checks."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from peft import PeftConfig
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from ..registration import METHODS, config_class
from ..shared.config import ModulesToSaveConfig
from ..tt_lora_moe import TTLoraMoeConfig
from ..tt_lora_moe.experts import could_be_on_the_hub, read_expert
from .host_keys import BITS_AND_BYTES, check_host_keys

CONFIGS: dict[str, type[PeftConfig]] = {name: config_class(name) for name in METHODS}

# What may differ between a saved adapter and the YAML that continues its training: it shapes training, not the model.
_TRAINING_FIELDS = (
    "dropout",
    "init",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "base_router_aux_loss_coef",
    "router_noise",
    "router_noise_std",
    "init_text",
    "experts",  # a saved pool has its experts in it; those that the YAML has beside them are added
)
# Keys that one setting of the block makes meaningless: (key, setting, value of the setting with which it counts).
_COUNTS_ONLY_WITH = {
    "perft": (
        ("alpha", "expert_type", "lora"),
        ("hidden_act", "expert_type", "parallel_adapter"),
        ("router_aux_loss_coef", "variant", "routed"),
        ("router_z_loss_coef", "variant", "routed"),
    ),
    "tt_lora": (),
    "tt_lora_moe": (),
    "pt_moe": (),
}


def own_fields(config_cls: type[PeftConfig]) -> dict[str, dataclasses.Field]:
    """The fields that a method's config adds to those that PEFT knows, by name: the keys of its block."""
    inherited = {f.name for f in dataclasses.fields(ModulesToSaveConfig)}
    return {f.name: f for f in dataclasses.fields(config_cls) if f.name not in inherited}


def _block_model(config_cls: type[PeftConfig]) -> type[BaseModel]:
    """A pydantic model with the fields that are the method's own."""
    hints = get_type_hints(config_cls)
    fields = {
        name: (hints[name], Field(description=f.metadata["help"], **_default(f)))
        for name, f in own_fields(config_cls).items()
    }
    return create_model(f"{config_cls.__name__}Block", __config__=ConfigDict(extra="forbid"), **fields)


def _default(field: dataclasses.Field) -> dict[str, Any]:
    if field.default is dataclasses.MISSING:
        return {"default_factory": field.default_factory}
    return {"default": field.default}


_Blocks = create_model(
    "_Blocks",
    **{
        name: (_block_model(config_cls) | None, Field(default=None, description=f"Needs `adapter: {name}`."))
        for name, config_cls in CONFIGS.items()
    },
)


class MoePeftArgs(_Blocks):
    """Merged by Axolotl into its own schema, so that the checks see the whole YAML."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys_of_the_host(cls, data: Any) -> Any:
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
        _check_keys_of_the_block(adapter, data[adapter])
        return check_host_keys(data, own_fields(CONFIGS[adapter]))

    @model_validator(mode="after")
    def _check_block(self) -> MoePeftArgs:
        adapter = getattr(self, "adapter", None)
        if adapter not in CONFIGS:
            return self
        block = getattr(self, adapter)
        config = CONFIGS[adapter](**block.model_dump())
        for key, setting, value in _COUNTS_ONLY_WITH[adapter]:
            if key in block.model_fields_set and getattr(block, key) and getattr(block, setting) != value:
                raise ValueError(
                    f"{adapter}.{key} means nothing with {setting}: {getattr(block, setting)}; remove it, or use "
                    f"{setting}: {value}."
                )
        if (key := _loss_past_the_model(self)) and (coefs := _router_losses(adapter, config)):
            raise ValueError(
                f"`{key}` computes the loss past the model's own forward pass, where the router losses of "
                f"`adapter: {adapter}` cannot act. Remove the key, or set "
                f"{' and '.join(f'{adapter}.{coef}: 0.0' for coef in coefs)}."
            )
        folder = getattr(self, "lora_model_dir", None)
        if folder and could_be_on_the_hub(folder):
            return self  # PEFT downloads it once the model is loaded
        saved = check_saved_adapter(config, folder) if folder else None
        if adapter == "tt_lora_moe":
            for expert in config.experts:
                if not could_be_on_the_hub(expert["path"]) and expert["name"] not in (
                    saved.expert_names if saved else ()
                ):
                    read_expert(expert, getattr(self, "base_model", None))
        return self

    @model_validator(mode="after")
    def _ask_for_a_quantised_base(self) -> MoePeftArgs:
        # the host's own keyword arguments of from_pretrained; the plugin fills them in once the dtype is known
        if getattr(self, "adapter", None) in CONFIGS and any(getattr(self, key, None) for key in BITS_AND_BYTES):
            given = self.overrides_of_model_kwargs or {}
            self.overrides_of_model_kwargs = {**given, "quantization_config": {}}
        return self


def _loss_past_the_model(args: Any) -> str | None:
    """The key with which a trainer of `rl:` calls the decoder and Liger's loss instead of the model."""
    if getattr(args, "rl", None) is None:
        return None
    if getattr(args, "dpo_use_liger_kernel", None):
        return "dpo_use_liger_kernel"
    return "trl.use_liger_loss" if getattr(getattr(args, "trl", None), "use_liger_loss", None) else None


def _router_losses(adapter: str, config: PeftConfig) -> list[str]:
    """The keys of the router losses that act."""
    idle = {key for key, setting, value in _COUNTS_ONLY_WITH[adapter] if getattr(config, setting) != value}
    return [
        key
        for key in own_fields(type(config))
        if key.endswith("_loss_coef") and key not in idle and getattr(config, key)
    ]


def check_datasets(data: Mapping[str, Any]) -> None:
    """Check `expert:` of the datasets, the router's label, and that there are prompts for a router to read.

    Args:
        data: the raw YAML. Validation is too late: Axolotl's schema drops `expert` before any other check.

    Raises:
        ValueError: a name is missing, unknown or without meaning, or the rows have no prompts.
    """
    datasets, test_datasets = dataset_entries(data, "datasets"), dataset_entries(data, "test_datasets")
    adapter = data.get("adapter")
    if adapter != "tt_lora_moe":
        for what, dataset in datasets + test_datasets:
            if dataset.get("expert") is not None:
                raise ValueError(f"{what}.expert means nothing with `adapter: {adapter}`; remove it.")
    elif names := expert_names(data):  # else the block is wrong, which validation tells
        _check_experts_of_datasets(datasets, test_datasets, names)
    block = data.get(adapter) if adapter in ("tt_lora_moe", "pt_moe") else None
    if isinstance(block, Mapping) and block.get("router_input", "prompt") == "prompt":
        if adapter == "tt_lora_moe" or block.get("num_experts") != 1:  # a single prompt is not chosen
            _check_prompts(adapter, data, datasets + test_datasets)


def _check_experts_of_datasets(
    datasets: list[tuple[str, Any]], test_datasets: list[tuple[str, Any]], names: list[Any]
) -> None:
    known = ", ".join(map(str, names))
    for what, dataset in datasets:
        if dataset.get("expert") is None:
            raise ValueError(
                f"{what} ({dataset.get('path')}) has no `expert:`; name the expert that its rows belong to, which is "
                f"the router's label: one of {known}."
            )
    for what, dataset in datasets + test_datasets:
        if dataset.get("expert") not in (None, *names):
            raise ValueError(
                f"{what}.expert: {dataset['expert']!r} is no name in tt_lora_moe.experts; use one of {known}."
            )


def _check_prompts(adapter: str, data: Mapping[str, Any], datasets: list[tuple[str, Any]]) -> None:
    keys = [f"{what}.type: completion" for what, d in datasets if str(d.get("type")).split(":")[0] == "completion"]
    keys += ["train_on_inputs: true"] if data.get("train_on_inputs") else []
    keys += ["pretraining_dataset"] if data.get("pretraining_dataset") else []
    if keys:
        raise ValueError(
            f"`{keys[0]}` leaves no prompts that the router could read; it reads what comes before the first "
            "supervised token. Use `datasets` of a type with prompts and `train_on_inputs: false`, or let the router "
            f"read whole sequences with `router_input: sequence` in the `{adapter}:` block, in training and at "
            "inference."
        )


def dataset_entries(data: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """The entries of a list of datasets in the raw YAML, each with its place in it; what is no entry is left out."""
    entries = data.get(key) if isinstance(data.get(key), list) else []
    return [(f"{key}[{i}]", entry) for i, entry in enumerate(entries) if isinstance(entry, Mapping)]


def expert_names(data: Mapping[str, Any]) -> list[Any]:
    """Names of the experts in the raw YAML's `tt_lora_moe:` block."""
    block = data.get("tt_lora_moe")
    experts = block.get("experts") if isinstance(block, Mapping) else None
    return [e.get("name") for e in experts if isinstance(e, Mapping)] if isinstance(experts, list) else []


def _check_keys_of_the_block(adapter: str, block: dict[str, Any]) -> None:
    known = list(own_fields(CONFIGS[adapter]))
    for key in block:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{nearest[0]}`? " if nearest else ""
            raise ValueError(f"{adapter}.{key}: no such key; {hint}The keys are {', '.join(known)}.")


def check_saved_adapter(config: PeftConfig, folder: str) -> PeftConfig:
    """Check that a saved adapter is what the YAML's block describes, and return its config.

    Args:
        config: the block as a PEFT config.
        folder: a local folder, or the id of a repository on the hub (downloaded by PEFT).

    Raises:
        ValueError: the folder is incomplete or unreadable, holds another method's adapter, or differs from the block
            in more than what shapes training only.
    """
    path = Path(folder)
    if not could_be_on_the_hub(folder):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (path / name).is_file():
                raise ValueError(f"lora_model_dir: {folder!r} holds no {name}; give the folder of a saved adapter.")
    try:
        saved = PeftConfig.from_pretrained(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"lora_model_dir: the adapter_config.json of {folder!r} cannot be read: {error!r}.") from None
    if saved.peft_type != config.peft_type:
        raise ValueError(
            f"lora_model_dir: {folder!r} holds an adapter of type {saved.peft_type.value}, the YAML asks for "
            f"{config.peft_type.value}."
        )
    for name in own_fields(type(config)):
        given, made_with = getattr(config, name), getattr(saved, name)
        if name not in _TRAINING_FIELDS and given != made_with:
            raise ValueError(
                f"the block says {name}: {given!r}, but the adapter in {folder!r} was made with {made_with!r}. Make "
                "the block the same as the saved adapter_config.json."
            )
    if isinstance(saved, TTLoraMoeConfig) and config.expert_names[: len(saved.experts)] != saved.expert_names:
        raise ValueError(
            f"tt_lora_moe.experts: the pool in {folder!r} has the experts {', '.join(saved.expert_names)}, the block "
            f"{', '.join(config.expert_names)}. List those of the pool first, in its order (their paths may be gone), "
            "and new ones behind them."
        )
    return saved
