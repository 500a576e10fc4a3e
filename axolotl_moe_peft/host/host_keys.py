"""Keys of Axolotl's own that do not go with an adapter of this package, and why."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# Keys of the host's LoRA that an own key of the block replaces, the first one that the block has.
_REPLACED = {
    "lora_r": ("rank",),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "lora_target_modules": ("target_modules",),
    "lora_target_linear": ("target_modules",),
    "peft_layers_to_transform": ("layers_to_transform", "target_modules"),  # a regular expression chooses layers, too
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
    "peft_ensure_weight_tying",
    "relora",
    "qlora_sharded_model_loading",
)
BITS_AND_BYTES = ("load_in_4bit", "load_in_8bit")
_QUANTISED_OTHERWISE = ("gptq", "quantize_moe_experts", "model_quantization_config")
# Why an adapter cannot be merged; those that are not here can.
_UNMERGEABLE = {
    "perft": "it runs in parallel with the MoE block, partly chosen per token, and no weight of the base model "
    "computes that",
    "tt_lora_moe": "which expert acts is chosen for each sequence, and no weight of the base model computes that; "
    "merge a single expert's own tt_lora adapter instead",
    "pt_moe": "it is a prompt before the text, which no weight of the base model computes",
}
# Why an adapter cannot be trained by a method of `rl:`.
_SUPERVISED_ONLY = {
    "tt_lora_moe": "its router is trained on the prompts of labelled rows, and the trainers of `rl:` call the model "
    "without labels",
    "pt_moe": "its prompt is chosen by the part of a row before the labels, and the trainers of `rl:` call the model "
    "without labels",
}
# Optimisers that cannot hold these adapters, by the beginning of their names, and why.
_UNFIT_OPTIMIZERS = {
    "muon": "it takes matrices only, and the adapter's parameters are stacks of them",
    "dion": "it takes matrices only, and the adapter's parameters are stacks of them",
    "galore_": "it projects the gradients of the base's own weights, which are frozen",
    "apollo_": "it projects the gradients of the base's own weights, which are frozen",
    "lomo": "it takes all of the model's weights, the frozen ones included",
    "adalomo": "it takes all of the model's weights, the frozen ones included",
}
# Values of `rl:` for which Axolotl hands the trainer the adapter's configuration alone.
_BUILT_BY_THE_TRAINER = ("dpo", "ipo", "kto")


def check_host_keys(data: dict[str, Any], own_keys: Collection[str]) -> dict[str, Any]:
    """Check the YAML's keys beside the adapter's block.

    Args:
        data: the YAML, whose `adapter` is one of this package.
        own_keys: the keys of that adapter's block.

    Returns:
        The YAML as the host should go on with it.

    Raises:
        ValueError: a key means nothing with the adapter, or does not work with it.
    """
    adapter = data["adapter"]
    for key, candidates in _REPLACED.items():
        if data.get(key):
            own = next((candidate for candidate in candidates if candidate in own_keys), None)
            instead = f"write `{own}` in the `{adapter}:` block" if own else "remove it"
            raise ValueError(f"`{key}` means nothing with `adapter: {adapter}`; {instead}.")
    for key in _MEANINGLESS:
        if data.get(key):
            raise ValueError(f"`{key}` means nothing with `adapter: {adapter}`; remove it.")
    for name, reason in _UNFIT_OPTIMIZERS.items():
        if str(data.get("optimizer")).startswith(name):
            raise ValueError(
                f"`optimizer: {data['optimizer']}` does not work with `adapter: {adapter}`: {reason}. Use one "
                "like adamw_torch, adafactor or schedule_free_adamw."
            )
    for key in _QUANTISED_OTHERWISE:
        if data.get(key):
            raise ValueError(
                f"`{key}` does not work with `adapter: {adapter}`: it is for Axolotl's own lora and qlora, or not "
                "tested here. Remove the key; load the base in bf16 or with `load_in_4bit: true`."
            )
    for key in filter(data.get, BITS_AND_BYTES):
        for sharding in filter(data.get, ("fsdp", "fsdp_config", "deepspeed")):
            raise ValueError(
                f"`{key}` does not work with `adapter: {adapter}` and `{sharding}`: Axolotl shards a quantised "
                "base for its own qlora only. Remove one of the two."
            )
    if all(map(data.get, BITS_AND_BYTES)):
        raise ValueError("`load_in_4bit` and `load_in_8bit` are both given; remove one.")
    if adapter == "tt_lora_moe" and data.get("pretraining_dataset"):
        raise ValueError("`pretraining_dataset` has no `expert:` for the router to learn; use `datasets`.")
    if adapter == "tt_lora_moe" and data.get("deepspeed"):
        raise ValueError(
            "`deepspeed` does not work with `adapter: tt_lora_moe`: what is frozen, its experts too, is left out "
            "of DeepSpeed's checkpoints and, with ZeRO-3, of the saved adapter. Remove the key, or shard the base "
            "with `fsdp_version: 2` and `fsdp_config`."
        )
    if data.get("rl") and adapter in _SUPERVISED_ONLY:
        raise ValueError(f"`rl: {data['rl']}` does not work with `adapter: {adapter}`: {_SUPERVISED_ONLY[adapter]}.")
    if data.get("rl") in _BUILT_BY_THE_TRAINER and data.get("lora_model_dir") and not data.get("merge_lora"):
        raise ValueError(
            f"`lora_model_dir` with `rl: {data['rl']}`: Axolotl builds the adapter anew from its configuration "
            "there and would ignore the saved one. Remove `lora_model_dir`."
        )
    if data.get("merge_lora") and adapter in _UNMERGEABLE:
        raise ValueError(
            f"`axolotl merge-lora` cannot merge an adapter of type {adapter}: {_UNMERGEABLE[adapter]}. Nothing "
            "was written. Keep the adapter beside the base: `axolotl inference --lora-model-dir ...`, PEFT's "
            "from_pretrained."
        )
    if data.get("merge_lora"):
        if data.get("merge_method") == "memory_efficient":
            raise ValueError(
                f"`merge_method: memory_efficient` reads LoRA's own tensors only and cannot merge an adapter of "
                f"type {adapter}. Remove the key; the model is then merged in memory."
            )
        data = {**data, "merge_method": "legacy"}
    # not a field of the host's: gone after validation
    if data.get("inference") and not data.get("lora_model_dir"):
        raise ValueError(
            f"`adapter: {adapter}` without `lora_model_dir` would run inference with an untrained adapter. Give "
            "the trained one's folder: --lora-model-dir ./outputs/..."
        )
    return data
