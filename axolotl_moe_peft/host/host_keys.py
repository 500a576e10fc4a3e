"""Keys of Axolotl's own that do not go with an adapter of this package: their table, and the check against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from ..registration import METHODS, config_class

BITS_AND_BYTES = ("load_in_4bit", "load_in_8bit")
QUANTISED_EXPERTS = "quantize_moe_experts"
REPORT = "routing_report"  # of an adapter's block


@dataclass(frozen=True)
class HostKey:
    """A key, the adapters with which it is refused, and what the user reads.

    Attributes:
        name: the key; `trl.use_liger_loss` for a key in a block.
        reason: why it cannot be right. Names in braces are class attributes of the adapter's config.
        instead: what to write.
        own: keys of the adapter's block that take its place, the first one that the block has.
        attribute: the class attribute of an adapter's config that decides; None: every adapter.
        having: whether it is refused with the adapters that have the attribute, or with the others.
        values: the values that are refused, None is not asked; by default those that are true.
        shown: the refused values, where they are some of many.
        beside: other keys, of which one must be given too.
        unless: keys of which each makes it right all the same.
        losses: refused only where router losses act.
    """

    name: str
    reason: str = ""
    instead: str = "Remove the key."
    own: tuple[str, ...] = ()
    attribute: str | None = None
    having: bool = True
    values: Callable[[Any], bool] = bool
    shown: str = ""
    beside: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    losses: bool = False

    def concerns(self, adapter: str) -> bool:
        """Whether it is refused with that adapter, some of its values at least."""
        return self.attribute is None or bool(getattr(config_class(adapter), self.attribute)) is self.having

    def reason_for(self, adapter: str) -> str:
        """Why it is refused with that adapter."""
        config_cls = config_class(adapter)
        return self.reason.format(needs_labels=config_cls.needs_labels, loss_of_its_own=config_cls.loss_of_its_own)


def _more_than_one(value: Any) -> bool:
    return str(value).isdecimal() and int(value) > 1  # a text on the command line


def _begins_with(*names: str) -> Callable[[Any], bool]:
    return lambda value: str(getattr(value, "value", value)).startswith(names)


def _names(part: str) -> Callable[[Any], bool]:
    return lambda value: any(part in str(name) for name in value)


def _is_one_of(*names: str) -> Callable[[Any], bool]:
    return lambda value: str(getattr(value, "value", value)) in names


_LORA = "it is a key of LoRA"
_MATRICES = "it takes matrices only, and the adapter's parameters are stacks of them"
_FROZEN = "it projects the gradients of the base's own weights, which are frozen"
_WHOLE_MODEL = "it takes all of the model's weights, the frozen ones included"
_OTHER_OPTIMIZER = "Use one like adamw_torch, adafactor or schedule_free_adamw."
_PAST_THE_MODEL = (
    "it computes the loss past the model's own forward pass, where the router losses of the adapter cannot act"
)
_OWN_LOSS = "the adapter trains by {loss_of_its_own} and computes no logits in training"
_PAIRS = (
    "it tells of every pair of tokens whether one sees the other, which has no room for a prompt, and lets answers be "
    "read before they are to be known"
)
_SHARDED = "it gives every process a part of the base's layers, and an adapter of this package needs whole ones"

HOST_KEYS: tuple[HostKey, ...] = (
    HostKey("lora_r", own=("rank",)),
    HostKey("lora_alpha", own=("alpha",)),
    HostKey("lora_dropout", own=("dropout",)),
    HostKey("lora_target_modules", own=("linear_target_modules", "target_modules")),
    HostKey("lora_target_linear", own=("linear_target_modules", "target_modules")),
    # a regular expression chooses layers, too
    HostKey("peft_layers_to_transform", own=("layers_to_transform", "target_modules")),
    *(
        HostKey(name, _LORA)
        for name in (
            "lora_target_parameters",
            "lora_rank_pattern",
            "lora_alpha_pattern",
            "lora_fan_in_fan_out",
            "lora_on_cpu",
            "loraplus_lr_ratio",
            "loraplus_lr_embedding",
            "peft",
            "peft_layers_pattern",
            "peft_use_dora",
            "peft_use_rslora",
            "peft_layer_replication",
            "peft_init_lora_weights",
            "peft_ensure_weight_tying",
            "relora",
            "qlora_sharded_model_loading",
        )
    ),
    *(HostKey(f"lora_{part}_kernel", _LORA) for part in ("mlp", "qkv", "o", "embedding")),
    *(
        HostKey(
            name,
            "nothing but its router is trained",
            attribute="trains_modules_of_the_base",
            having=False,
        )
        for name in ("lora_modules_to_save", "peft_trainable_token_indices")
    ),
    HostKey(
        "peft_trainable_token_indices",
        "PEFT keeps a copy of the embeddings, which in all processes but the first has no values then",
        "Remove `cpu_ram_efficient_loading`.",
        attribute="trains_modules_of_the_base",
        beside=("fsdp_config.cpu_ram_efficient_loading",),
    ),
    HostKey(
        "unfrozen_parameters",
        "what else is trained is not saved with the adapter, and what it does not name is frozen, the adapter too",
        "Remove the key; `lora_modules_to_save` trains and saves modules of the base.",
    ),
    HostKey("optimizer", _MATRICES, _OTHER_OPTIMIZER, values=_begins_with("muon", "dion"), shown="muon, dion"),
    HostKey(
        "optimizer", _FROZEN, _OTHER_OPTIMIZER, values=_begins_with("galore_", "apollo_"), shown="galore_*, apollo_*"
    ),
    HostKey(
        "optimizer", _WHOLE_MODEL, _OTHER_OPTIMIZER, values=_begins_with("lomo", "adalomo"), shown="lomo, adalomo"
    ),
    HostKey(
        "gptq",
        "it takes kernels that Axolotl does not bring, and no adapter has been seen to train through them",
        "Remove the key; use the base as it is published in bf16, with `load_in_4bit: true`.",
    ),
    HostKey(
        "model_quantization_config",
        "no gradient comes through the kernels of that format",
        "Add `model_quantization_config_kwargs: {dequantize: true}`.",
        unless=("model_quantization_config_kwargs.dequantize",),
    ),
    *(
        HostKey(
            name,
            "Axolotl shards a quantised base for its own qlora only",
            "Remove one of the two.",
            beside=("fsdp", "fsdp_config", "deepspeed"),
        )
        for name in (*BITS_AND_BYTES, QUANTISED_EXPERTS)
    ),
    HostKey(
        QUANTISED_EXPERTS,
        "nothing says in how many bits",
        "Add `load_in_4bit: true` or `load_in_8bit: true`.",
        unless=(*BITS_AND_BYTES, "model_quantization_config"),
    ),
    HostKey("load_in_4bit", "a base is quantised in one way", "Remove one of the two.", beside=("load_in_8bit",)),
    HostKey(
        "pretraining_dataset",
        "its rows have no `expert:` for the router to learn",
        "Use `datasets`.",
        attribute="needs_expert_labels",
    ),
    HostKey(
        "deepspeed",
        "what is frozen, the adapter's experts too, is left out of DeepSpeed's checkpoints and, with ZeRO-3, of the "
        "saved adapter",
        "Remove the key, or shard the base with `fsdp_version: 2` and `fsdp_config`.",
        attribute="frozen_parts",
    ),
    *(
        HostKey(
            name,
            f"the report runs rows of tokens with answers through the model, and {reason}",
            f"Remove `{REPORT}`.",
            attribute="unreportable",
            having=False,
            beside=tuple(f"{method}.{REPORT}" for method in METHODS if not config_class(method).unreportable),
        )
        for name, reason in (
            ("rl", "these are prompts or pairs of answers"),
            ("reward_model", "these are pairs of answers"),
            ("process_reward_model", "these have classes for labels"),
            ("processor_type", "these become tokens only in the trainer's collator"),
        )
    ),
    HostKey(
        "processor_type",
        "which part of a row is its prompt, and which expert it belongs to, Axolotl's collator of images does not "
        "tell before it trains",
        "Remove the key, or use `adapter: perft` or `adapter: tt_lora`.",
        attribute="needs_labels",
    ),
    HostKey("rl", "{needs_labels}", "Train it on `datasets` with answers, without `rl:`.", attribute="needs_labels"),
    HostKey(
        "lora_model_dir",
        "Axolotl builds the adapter anew from its configuration there and would ignore the saved one",
        "Remove `lora_model_dir`.",
        attribute="needs_labels",
        having=False,
        beside=("rl: dpo", "rl: ipo", "rl: kto"),
        unless=("merge_lora",),
    ),
    HostKey("dpo_use_liger_kernel", _PAST_THE_MODEL, "", beside=("rl",), losses=True),
    HostKey("trl.use_liger_loss", _PAST_THE_MODEL, "", beside=("rl",), losses=True),
    *(HostKey(name, _OWN_LOSS, attribute="loss_of_its_own") for name in ("use_eaft", "use_dft", "kd_trainer")),
    *(
        HostKey(name, _PAIRS, attribute="needs_labels", values=values, shown=shown)
        for name, values, shown in (
            ("diffusion", bool, ""),
            ("diffusion_lm", bool, ""),
            ("plugins", _names("DiffusionPlugin"), "axolotl.integrations.diffusion.DiffusionPlugin"),
        )
    ),
    *(
        HostKey(
            "gradient_accumulation_steps",
            "Axolotl adds up the losses of the batches there instead of averaging them, and the router losses with "
            "another scale than theirs would be others",
            "Use `gradient_accumulation_steps: 1`.",
            values=_more_than_one,
            shown="above 1",
            beside=(name,),
            losses=True,
        )
        for name in ("diffusion", "diffusion_lm")
    ),
    *(
        HostKey(
            name,
            "its router learns which expert a prompt belongs to, with the experts' own heads or none",
            "Train a `tt_lora` adapter for classification.",
            attribute="loss_of_its_own",
        )
        for name in ("reward_model", "process_reward_model")
    ),
    HostKey(
        "reward_model",
        "Axolotl packs rows of tokens, and these are pairs of answers",
        "Remove `sample_packing`.",
        beside=("sample_packing",),
        attribute="loss_of_its_own",
        having=False,
    ),
    HostKey(
        "process_reward_model",
        "the head of a classifier of tokens would be quantised with the base before it is trained",
        "Train on a base in 16 bits.",
        beside=("load_in_4bit", "load_in_8bit"),
        attribute="loss_of_its_own",
        having=False,
    ),
    *(
        HostKey(
            name,
            "it gives every process a part of a sequence, and the adapters are computed and their figures taken on "
            "whole ones",
            values=_more_than_one,
            shown="above 1",
        )
        for name in ("context_parallel_size", "sequence_parallel_degree")
    ),
    HostKey("tensor_parallel_size", _SHARDED, "Use FSDP2.", values=_more_than_one, shown="above 1"),
    HostKey(
        "expert_parallel_size",
        "it gives every process some of the base's experts, and gathers of an adapter only LoRA's parameters",
        "Use FSDP2.",
        values=_more_than_one,
        shown="above 1",
    ),
)


def check_host_keys(data: Mapping[str, Any], own_keys: Mapping[str, Any]) -> None:
    """Check a YAML's keys beside the adapter's block, as far as they do not depend on it.

    Args:
        data: the YAML, whose `adapter` is one of this package.
        own_keys: the keys of that adapter's block.

    Raises:
        ValueError: a key means nothing with the adapter, or does not work with it.
    """
    for key in _given(data):
        if not key.losses and key.concerns(data["adapter"]):
            raise ValueError(_message(key, data, own_keys))


def check_keys_beside_router_losses(args: Any, config: PeftConfig) -> None:
    """Check the keys that depend on the adapter's router losses.

    Args:
        args: the validated YAML.
        config: the adapter's block as its PEFT config.

    Raises:
        ValueError: a key does not work while the block's router losses act.
    """
    losses = [f"{args.adapter}.{name}: 0.0" for name in config.router_losses]
    for key in _given(args):
        if key.losses and losses and key.concerns(args.adapter):
            raise ValueError(f"{_message(key, args, {})} Remove the key, or set {' and '.join(losses)}.")


def _given(data: Any) -> Iterator[HostKey]:
    """The rows of the table whose key is in the YAML, with a refused value and a key that must stand beside it."""
    for key in HOST_KEYS:
        value = _value(data, key.name)
        beside = not key.beside or any(_stands(data, entry) for entry in key.beside)
        if (
            value is not None
            and key.values(value)
            and beside
            and not any(_stands(data, entry) for entry in key.unless)
        ):
            yield key


def _value(data: Any, name: str) -> Any:
    for part in name.split("."):
        data = data.get(part) if isinstance(data, Mapping) else getattr(data, part, None)
    return data


def _stands(data: Any, entry: str) -> bool:
    name, _, wanted = entry.partition(": ")
    value = _value(data, name)
    return str(getattr(value, "value", value)) == wanted if wanted else bool(value)


def _message(key: HostKey, data: Any, own_keys: Mapping[str, Any]) -> str:
    adapter, value = _value(data, "adapter"), _value(data, key.name)
    given = f"`{key.name}: {getattr(value, 'value', value)}`" if key.shown or key.name == "rl" else f"`{key.name}`"
    own = next((candidate for candidate in key.own if candidate in own_keys), None)
    if key.own:
        instead = f"write `{own}` in the `{adapter}:` block" if own else "remove it"
        return f"{given} means nothing with `adapter: {adapter}`; {instead}."
    if key.reason == _LORA:
        return f"{given} means nothing with `adapter: {adapter}`; remove it."
    beside = "".join(f" and `{entry}`" for entry in key.beside if _stands(data, entry))
    return f"{given} does not work with `adapter: {adapter}`{beside}: {key.reason_for(adapter)}. {key.instead}".strip()
