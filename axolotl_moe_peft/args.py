"""The plugin's part of an Axolotl YAML: one block per adapter, and the keys that do not go with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from peft import PeftConfig
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from .perft import PerftConfig

CONFIGS: dict[str, type[PeftConfig]] = {"perft": PerftConfig}

# Keys of the host's LoRA that an own key of the block replaces.
_REPLACED = {
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "lora_target_linear": "target_modules",
    "peft_layers_to_transform": "layers_to_transform",
}
# Keys of the host's LoRA without a counterpart here.
_MEANINGLESS = (
    "lora_target_parameters",
    "lora_modules_to_save",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "lora_fan_in_fan_out",
    "lora_on_cpu",
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
    "lora_embedding_kernel",
    "loraplus_lr_ratio",
    "peft",
    "peft_layers_pattern",
    "peft_use_dora",
    "peft_use_rslora",
    "peft_layer_replication",
    "peft_init_lora_weights",
    "peft_trainable_token_indices",
    "relora",
    "qlora_sharded_model_loading",
)
_QUANTISED = ("load_in_4bit", "load_in_8bit", "gptq", "quantize_moe_experts", "model_quantization_config")
# Keys that one setting of the block makes meaningless: (key, setting, value of the setting with which it counts).
_COUNTS_ONLY_WITH = {
    "perft": (
        ("alpha", "expert_type", "lora"),
        ("hidden_act", "expert_type", "parallel_adapter"),
        ("router_aux_loss_coef", "variant", "routed"),
        ("router_z_loss_coef", "variant", "routed"),
    )
}


def _block_model(adapter: str, config_cls: type[PeftConfig]) -> type[BaseModel]:
    """A pydantic model with the fields that the method's PEFT config adds to PeftConfig's."""
    inherited = {f.name for f in dataclasses.fields(PeftConfig)}
    hints = get_type_hints(config_cls)
    fields = {
        f.name: (hints[f.name], Field(default=f.default, description=f.metadata["help"]))
        for f in dataclasses.fields(config_cls)
        if f.name not in inherited
    }
    return create_model(f"{config_cls.__name__}Block", __config__=ConfigDict(extra="forbid"), **fields)


PerftBlock = _block_model("perft", PerftConfig)


class MoePeftArgs(BaseModel):
    """Merged by Axolotl into its own schema, so that the checks see the whole YAML."""

    perft: PerftBlock | None = Field(default=None, description="PERFT adapters; needs `adapter: perft`.")

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
        for key, own in _REPLACED.items():
            if data.get(key):
                raise ValueError(
                    f"`{key}` means nothing with `adapter: {adapter}`; write `{own}` in the `{adapter}:` block."
                )
        for key in _MEANINGLESS:
            if data.get(key):
                raise ValueError(f"`{key}` means nothing with `adapter: {adapter}`; remove it.")
        for key in _QUANTISED:
            if data.get(key):
                raise ValueError(
                    f"`{key}` does not work with `adapter: {adapter}`: Axolotl quantises the base only for its own "
                    "lora and qlora. Remove the key and load the base in bf16."
                )
        if data.get("merge_lora"):
            raise ValueError(
                f"`axolotl merge-lora` cannot merge an adapter of type {adapter}: it runs in parallel with the MoE "
                "block, partly chosen per token, and no weight of the base model computes that. Nothing was written. "
                "Keep the adapter beside the base (`axolotl inference --lora-model-dir ...` or PEFT's from_pretrained)."
            )
        return data

    @model_validator(mode="after")
    def _check_block(self) -> MoePeftArgs:
        adapter = getattr(self, "adapter", None)
        if adapter not in CONFIGS:
            return self
        block = getattr(self, adapter)
        CONFIGS[adapter](**block.model_dump())
        for key, setting, value in _COUNTS_ONLY_WITH[adapter]:
            if key in block.model_fields_set and getattr(block, key) and getattr(block, setting) != value:
                raise ValueError(
                    f"{adapter}.{key} means nothing with {setting}: {getattr(block, setting)}; remove it, or use "
                    f"{setting}: {value}."
                )
        self._check_lora_model_dir(adapter)
        return self

    def _check_lora_model_dir(self, adapter: str) -> None:
        folder = getattr(self, "lora_model_dir", None)
        if not folder:
            if getattr(self, "inference", None):
                raise ValueError(
                    f"`adapter: {adapter}` without `lora_model_dir` would run inference with an untrained adapter. "
                    "Give the trained one's folder: --lora-model-dir ./outputs/..."
                )
            return
        looks_local = Path(folder).is_absolute() or folder.startswith(".") or folder.count("/") != 1
        if Path(folder).is_dir() or looks_local:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                if not (Path(folder) / name).is_file():
                    raise ValueError(
                        f"lora_model_dir: {folder!r} holds no {name}; give the folder of a saved adapter."
                    )
