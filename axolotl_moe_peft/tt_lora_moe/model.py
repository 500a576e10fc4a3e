"""TTLoraMoeModel: a pool of frozen TT-LoRA experts, and a router that picks one for each sequence.

Top-1 routing gives the router no gradient from the task loss, so training does not run the experts at all: a step is
one frozen pass of the base model over the batch and the router's cross-entropy. In evaluation and generation the
router reads the prompt first, and the model then runs with each sequence's expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..shared.auxiliary import share_of_accumulated_batch
from ..shared.batches import IGNORE_INDEX, Sequences, find_sequences
from ..shared.generation import CACHE_NAMES, bind, cache_in, cache_of
from ..shared.statistics import Figures, RouterStatistics
from ..shared.summary import ParameterRow, parameter_row
from ..shared.tuner import Tuner
from .config import TTLoraMoeConfig, check_expert_entry
from .experts import Expert, check_same_modules, load_expert, load_experts
from .layer import Choice, TTLoraPoolLinear
from .router import PromptRouter

# arguments of a causal language model that are not for its decoder, and what it must not cache
_NOT_FOR_THE_DECODER = (
    *CACHE_NAMES,
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "shift_labels",
    "use_cache",
)


class _Features(NamedTuple):
    """What the router reads: for its logits (N, H), and for the deviation of their noise (N, H)."""

    for_logits_NH: Tensor
    for_noise_NH: Tensor


class TTLoraMoeModel(Tuner):
    """TT-LoRA MoE (arXiv 2504.21190, stage 2): exactly one frozen TT-LoRA expert for each sequence.

    In training mode a call needs `labels`, which tell the prompts, and `expert_labels`, the index of the right expert:
    (B,), or (B, S) where rows are packed, -100 for unknown. It returns the router's cross-entropy as the loss and no
    logits. Otherwise it returns what the base model returns, computed with the chosen experts.

    Args:
        model: a causal language model of transformers.
        config: a TTLoraMoeConfig.
        adapter_name: name of the adapter.

    Attributes:
        chosen_experts: of the last call that chose, by adapter name: int64 (N,), in reading order of the sequences.
        statistics, eval_statistics: loss and accuracy of the router in training and in evaluation with
            `expert_labels`; `.pop()` reads them.

    Raises:
        ValueError: an expert cannot be read, or does not fit the model or the other experts.
    """

    prefix = "ttmoe_"
    tuner_layer_cls = BaseTunerLayer  # the pool's layers and the router

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if model.base_model is model:
            raise ValueError(
                f"tt_lora_moe needs a causal language model with a decoder; {type(model).__name__} has none."
            )
        self.statistics, self.eval_statistics = RouterStatistics(), RouterStatistics()
        self.chosen_experts: dict[str, Tensor] = {}
        self._choices: dict[str, Choice] = {}  # of the running call; empty while a router reads the base model
        self._choices_by_cache: WeakKeyDictionary[Any, dict[str, Choice]] = WeakKeyDictionary()
        self._choices_of_generation: dict[str, Choice] | None = None  # while `generate` runs; without a cache
        self._expert_labels: Tensor | None = None
        self._not_loaded: set[str] = set()
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]

    def _attach(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self._experts = load_experts(config.experts, model)
        config.experts = [expert.entry for expert in self._experts]
        self._not_loaded |= {adapter_name} if any(expert.cores is None for expert in self._experts) else set()
        super()._attach(model, adapter_name, *args, **kwargs)
        del self._experts

    def _prepare_adapter_config(self, peft_config: TTLoraMoeConfig, model_config: dict) -> TTLoraMoeConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: TTLoraMoeConfig, key: str) -> bool:
        return key in self._experts[0].shapes

    def _create_and_replace(
        self,
        peft_config: TTLoraMoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not hasattr(self.model, "prompt_router"):
            # a child of the model, where PEFT looks for what to switch and to delete
            self.model.prompt_router = PromptRouter(self.model.config.get_text_config().hidden_size)
        if adapter_name not in self._router.ttmoe_weight:
            self._router.update_layer(adapter_name, peft_config, self.model.get_input_embeddings().weight.device)
        layer = target
        if not isinstance(target, TTLoraPoolLinear):
            layer = TTLoraPoolLinear(target, self._choices)
            self._replace_module(parent, target_name, layer, target)
        cores = None
        if adapter_name not in self._not_loaded:
            cores = torch.cat([expert.cores[current_key] for expert in self._experts])
        layer.update_layer(adapter_name, [expert.shapes[current_key] for expert in self._experts], cores)

    def add_expert(self, name: str, path: str, adapter_name: str = "default") -> None:
        """Put one more trained expert into the pool.

        The experts of the pool and their rows of the router stay as they are, bit by bit; the new expert's rows are
        random until the router is trained again.

        Args:
            name, path: as in `experts`.
            adapter_name: name of the adapter.

        Raises:
            ValueError: the name is taken, or the expert cannot be read or does not fit.
        """
        config, entry = self.peft_config[adapter_name], {"name": name, "path": path}
        check_expert_entry(entry)
        if name in config.expert_names:
            raise ValueError(f"tt_lora_moe.experts: the pool has an expert {name!r} already; names must differ.")
        expert = load_expert(entry, self.model)
        layers = {
            key.removesuffix(".base_layer"): layer
            for key, layer in self.model.named_modules()
            if isinstance(layer, TTLoraPoolLinear) and adapter_name in layer.experts
        }
        pool = Expert(config.experts[0], {key: layer.experts[adapter_name][0] for key, layer in layers.items()}, None)
        check_same_modules(expert, pool)
        for key, layer in layers.items():
            layer.add_expert(adapter_name, expert.shapes[key], expert.cores[key])
        self._router.add_expert(adapter_name)
        config.experts = [*config.experts, expert.entry]

    def train(self, mode: bool = True) -> TTLoraMoeModel:
        super().train(mode)
        self.model.eval()  # frozen features: no dropout, and nothing to checkpoint
        return self

    def forward(self, *args: Any, expert_labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the base model with each sequence's expert, or in training mode take a step of the router."""
        if self.training and not self._router.disable_adapters:
            return self._router_step(self._batch(args, kwargs), expert_labels)
        self._expert_labels = expert_labels
        try:
            return self.model(*args, **kwargs)
        finally:
            self._expert_labels = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`; each sequence keeps the expert that its prompt gets, with a cache or without.

        Raises:
            ValueError: the prompt would be read in chunks, so that the router would see the first one only.
        """
        generation_config = kwargs.get("generation_config") or self.model.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(generation_config, "prefill_chunk_size", None):
            raise ValueError("prefill_chunk_size: the router of tt_lora_moe reads whole prompts. Remove it.")
        self._choices_of_generation = {}
        try:
            return self.model.generate(*args, **kwargs)
        finally:
            self._choices_of_generation = None

    def _router_step(self, batch: dict[str, Any], expert_labels: Tensor | None) -> CausalLMOutputWithPast:
        for key, tensor in (("labels", batch.get("labels")), ("expert_labels", expert_labels)):
            if tensor is None:
                raise ValueError(
                    f"tt_lora_moe trains its router on batches with `labels`, which tell where the prompts end, and "
                    f"`expert_labels`, the index of each row's expert; there are no `{key}`. In Axolotl give every "
                    "dataset an `expert:`; in transformers' Trainer set remove_unused_columns=False."
                )
        loss = 0.0
        for adapter_name in self.active_adapters:
            config = self.peft_config[adapter_name]
            sequences = find_sequences(batch, config.router_input)
            features = self._features(config, sequences, batch)
            logits_NE = self._router(features.for_logits_NH, adapter_name)
            noisy_NE = logits_NE
            if config.router_noise:
                std_NE = self._router.noise_std(features.for_noise_NH, adapter_name)
                noisy_NE = logits_NE + torch.randn_like(std_NE) * std_NE
            labels_N = _labels_of_sequences(expert_labels, sequences)
            losses_N = _cross_entropies(noisy_NE, labels_N)
            loss = loss + losses_N.sum() / (labels_N != IGNORE_INDEX).sum().clamp(min=1)
            self.chosen_experts[adapter_name] = logits_NE.argmax(-1)
            self._record(self.statistics.of(adapter_name), config, losses_N, logits_NE, labels_N)
        return CausalLMOutputWithPast(loss=loss * share_of_accumulated_batch(batch, self.model))

    @torch.no_grad()
    def _features(self, config: TTLoraMoeConfig, sequences: Sequences, batch: dict[str, Any]) -> _Features:
        self._choices.clear()
        if config.router == "base_hidden":
            decoder_batch = {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_DECODER}
            hidden_BSH = self.model.base_model(**decoder_batch, use_cache=False).last_hidden_state
            at_end_NH = hidden_BSH.flatten(0, 1)[sequences.last_prompt_token()]
            return _Features(at_end_NH, sequences.prompt_mean(hidden_BSH))
        embeddings_BSH = batch.get("inputs_embeds")
        if embeddings_BSH is None:
            embeddings_BSH = self.model.get_input_embeddings()(batch["input_ids"])
        mean_NH = sequences.prompt_mean(embeddings_BSH)
        return _Features(mean_NH, mean_NH)

    @torch.no_grad()
    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._choices.clear()
        if self._router.disable_adapters or not self.active_adapters:
            return
        if self._not_loaded.intersection(self.active_adapters):
            raise RuntimeError(
                "the experts of this pool were not loaded: its config is that of a saved adapter, whose experts come "
                "with its file. Use PeftModel.from_pretrained(base, folder)."
            )
        batch = self._batch(args, kwargs)
        cache = cache_of(model, batch)
        if cache is not None and int(cache.get_seq_length()) > 0:
            if cache not in self._choices_by_cache:
                raise RuntimeError(
                    "past_key_values were made without this adapter, so no experts are known for them; pass the whole "
                    "input instead."
                )
            self._choices.update(self._choices_by_cache[cache])
            return
        choices = self._choices_of_generation or {name: self._choose(name, batch) for name in self.active_adapters}
        if self._choices_of_generation is not None and not batch.get("use_cache"):
            self._choices_of_generation = choices
        self._choices.update(choices)

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        cache = cache_in(output)
        if cache is not None and self._choices:
            self._choices_by_cache[cache] = dict(self._choices)
        self._choices.clear()

    def _choose(self, adapter_name: str, batch: dict[str, Any]) -> Choice:
        config = self.peft_config[adapter_name]
        sequences = find_sequences(batch, config.router_input)
        logits_NE = self._router(self._features(config, sequences, batch).for_logits_NH, adapter_name)
        expert_N = self.chosen_experts[adapter_name] = logits_NE.argmax(-1)
        if self._expert_labels is not None:
            labels_N = _labels_of_sequences(self._expert_labels, sequences)
            figures = self.eval_statistics.of(adapter_name)
            self._record(figures, config, _cross_entropies(logits_NE, labels_N), logits_NE, labels_N)
        padding_BS = sequences.index_BS < 0
        expert_BS = torch.where(padding_BS, -1, expert_N[sequences.index_BS.clamp(min=0)])
        expert_B1 = expert_BS.amax(1, keepdim=True)
        one_per_row = bool((padding_BS | (expert_BS == expert_B1)).all())
        return Choice(expert_B1 if one_per_row else expert_BS, expert_N.unique().tolist())

    def _record(
        self,
        figures: Figures,
        config: TTLoraMoeConfig,
        losses_N: Tensor,
        logits_NE: Tensor,
        labels_N: Tensor,
    ) -> None:
        figures.record_by_expert("router_loss", losses_N, labels_N, config.expert_names)
        right_N = (logits_NE.argmax(-1) == labels_N).float()
        figures.record_by_expert("router_accuracy", right_N, labels_N, config.expert_names)

    def _batch(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in bind(self.model, args, kwargs).items() if value is not None}

    @property
    def _router(self) -> PromptRouter:
        return self.model.prompt_router

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        loaded = {key.rpartition(".")[2] for key in args[0] if ".ttmoe_cores." in key}
        self._not_loaded -= loaded

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        pass  # the experts stay as they were trained, and their router is float32

    def parameter_rows(self, adapter_name: str = "default") -> list[ParameterRow]:
        """What is trainable in the model, by part: the router, and anything else (nothing)."""
        by_name = (getattr(self._router, name) for name in self._router.adapter_layer_names)
        router = [parameters[adapter_name] for parameters in by_name if adapter_name in parameters]
        own = {id(p) for p in router}
        other = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        return [parameter_row("router", router), parameter_row("other", other)]

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A TT-LoRA MoE cannot be merged: which expert acts is chosen for each sequence, and no weight of the base "
            "model computes that. Keep the adapter beside the base (PeftModel.from_pretrained(base, folder)), or "
            "merge a single expert's own tt_lora adapter; `unload()` gives the base model back."
        )

    def unload(self) -> nn.Module:
        """Return the base model without any adapter, router or hook of ours."""
        for handle in self._handles:
            handle.remove()
        model = super().unload()
        del model.prompt_router
        return model


def _labels_of_sequences(expert_labels: Tensor, sequences: Sequences) -> Tensor:
    """The label of each sequence, (N,), from (B,) or (B, S)."""
    if expert_labels.dim() == 1:
        expert_labels = expert_labels.unsqueeze(1)
    return expert_labels.expand_as(sequences.index_BS).flatten()[sequences.last_prompt_token()]


def _cross_entropies(logits_NE: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NE, labels_N, ignore_index=IGNORE_INDEX, reduction="none")
