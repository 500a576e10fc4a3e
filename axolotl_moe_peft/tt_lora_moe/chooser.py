"""ExpertChooser: lets the router choose before a model runs, and tells the pool's layers what it chose.

A batch's way: `_before_forward` (the model is called) -> `_choices_of` (of its cache, of its `generate`, or new ones:
`_choose`, for which the base model may read the prompt) -> the model, whose layers find the choices of their thread
-> `_after_forward`, which notes them in the cache.

Shape suffixes: B rows, S tokens, N sequences, E experts, H hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..shared.batches import IGNORE_INDEX, Sequences, find_sequences
from ..shared.choices import note_choices
from ..shared.decoder import decoder_of
from ..shared.fingerprint import Fingerprints
from ..shared.generation import (
    CACHE_NAMES,
    CacheNote,
    Generation,
    PerThread,
    Stream,
    bind,
    cache_in,
    cache_of,
    check_continued,
    keep,
    only_input,
)
from ..shared.routing import Routing
from ..shared.statistics import Figures, RouterStatistics
from .config import TTLoraMoeConfig
from .head import head_name
from .layer import Choice, RunningChoices, TTLoraPoolLinear
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


class _Running(PerThread):
    """What else is known of the call that runs in this thread."""

    note: CacheNote | None = None
    expert_labels: Tensor | None = None


class Features(NamedTuple):
    """What the router reads: for its logits (N, H), and for the deviation of their noise (N, H)."""

    for_logits_NH: Tensor
    for_noise_NH: Tensor


class ExpertChooser:
    """Owns the hooks on a model, and what is known of its running calls.

    Args:
        model: a causal language model with a decoder.
        router: its router.

    Attributes:
        choices: what the pool's layers read.
        chosen_experts: of the last call that chose, by adapter name: int64 (N,), in reading order of the sequences.
        statistics, eval_statistics: loss and accuracy of the router in training and in evaluation with
            `expert_labels`.
        configs: by adapter name.
        layers: those of the pool.
        placeholders: adapters whose experts are about to be loaded, and a layer's cores to tell.
    """

    def __init__(self, model: nn.Module, router: PromptRouter) -> None:
        self.model, self.router = model, router
        self.choices, self.running = RunningChoices(), _Running()
        self.layers: list[TTLoraPoolLinear] = []
        self._fingerprints = Fingerprints()
        self.chosen_experts: dict[str, Tensor] = {}
        self.statistics, self.eval_statistics = RouterStatistics(), RouterStatistics()
        self.configs: dict[str, TTLoraMoeConfig] = {}
        self.placeholders: dict[str, nn.ParameterDict] = {}
        self._generation = Generation(model, "tt_lora_moe", self._is_active)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Leave the model's calls alone from now on."""
        self._generation.detach()
        for handle in self._handles:
            handle.remove()

    def active_adapters(self) -> list[str]:
        """The adapters that choose."""
        if self.router.disable_adapters:
            return []
        return [name for name in self.router.active_adapters if name in self.router.ttmoe_weight]

    def _is_active(self) -> bool:
        return bool(self.active_adapters())

    def batch(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the model that are not None, by name."""
        return {name: value for name, value in bind(self.model, args, kwargs).items() if value is not None}

    def sequences(self, config: TTLoraMoeConfig, batch: dict[str, Any]) -> Sequences:
        """The sequences of a batch and their prompts; of a classifier all is prompt, as no label is in its input."""
        if head_name(self.model):
            batch = {name: value for name, value in batch.items() if name != "labels"}
        return find_sequences(batch, config.router_input)

    @torch.no_grad()
    def features(self, config: TTLoraMoeConfig, sequences: Sequences, batch: dict[str, Any]) -> Features:
        """What the router of this configuration reads of a batch; the base model runs without experts."""
        self.choices.by_adapter = {}
        if config.router == "base_hidden":
            decoder_batch = {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_DECODER}
            hidden_BSH = decoder_of(self.model)(**decoder_batch, use_cache=False).last_hidden_state
            at_end_NH = hidden_BSH.flatten(0, 1)[sequences.last_prompt_token()]
            return Features(at_end_NH, sequences.prompt_mean(hidden_BSH))
        embeddings_BSH = batch.get("inputs_embeds")
        if embeddings_BSH is None:
            embeddings_BSH = self.model.get_input_embeddings()(batch["input_ids"])
        mean_NH = sequences.prompt_mean(embeddings_BSH)
        return Features(mean_NH, mean_NH)

    @torch.no_grad()
    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.choices.by_adapter, self.running.note = {}, None
        batch, active = self.batch(args, kwargs), self.active_adapters()
        cache, stream = cache_of(model, batch), self._generation.stream(batch)
        note = check_continued("tt_lora_moe", cache, _described(active), "no experts", lambda: self._weights(active))
        if not active:
            return
        self._check_loaded(active)
        if model.training:
            raise ValueError(
                "tt_lora_moe: this model was called in training mode by itself. Its router is trained through "
                "peft.get_peft_model; for evaluation and generation call model.eval() first."
            )
        self.choices.by_adapter = self._choices_of(note, stream, active, batch)
        self.running.note = note

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        by_adapter, self.choices.by_adapter = self.choices.by_adapter, {}
        cache = None if output is None else cache_in(output) or cache_of(model, bind(model, args, kwargs))
        if cache is None or not by_adapter:
            return
        if self.running.note is not None:
            self.running.note.update(cache)
            return
        rows = {name: choice.expert_BS for name, choice in by_adapter.items()}
        one_per_row = all(expert_BS.shape[1] == 1 for expert_BS in rows.values())
        weights = self._weights(list(by_adapter))
        keep(cache, _described(list(by_adapter)), rows if one_per_row else None, weights=weights)

    def _choices_of(
        self, note: CacheNote | None, stream: Stream | None, active: list[str], batch: dict[str, Any]
    ) -> dict[str, Choice]:
        if note is not None:
            return _continued(note)
        if stream is None:
            return {name: self._choose(name, batch, None) for name in active}
        if stream.decision is None:
            stream.decision = {name: self._choose(name, batch, stream) for name in active}
        return stream.decision

    def _choose(self, adapter_name: str, batch: dict[str, Any], stream: Stream | None) -> Choice:
        config = self.configs[adapter_name]
        sequences = only_input(self.sequences(config, batch), stream)
        logits_NE = self.router(self.features(config, sequences, batch).for_logits_NH, adapter_name)
        expert_N = self.chosen_experts[adapter_name] = logits_NE.argmax(-1)
        note_choices(adapter_name, None, Routing(logits_NE, expert_N.unsqueeze(1)))
        if self.running.expert_labels is not None:
            labels_N = labels_of_sequences(self.running.expert_labels, sequences)
            figures = self.eval_statistics.of(adapter_name)
            record(figures, config, cross_entropies(logits_NE, labels_N), logits_NE, labels_N)
        padding_BS = sequences.index_BS < 0
        expert_BS = torch.where(padding_BS, -1, expert_N[sequences.index_BS.clamp(min=0)])
        expert_B1 = expert_BS.amax(1, keepdim=True)
        one_per_row = bool((padding_BS | (expert_BS == expert_B1)).all())
        return Choice(expert_B1 if one_per_row else expert_BS, expert_N.unique().tolist())

    def _weights(self, adapter_names: list[str]) -> int | None:
        """The fingerprint of the experts of these adapters."""
        parameters = [layer.ttmoe_cores[n] for layer in self.layers for n in adapter_names if n in layer.ttmoe_cores]
        return self._fingerprints.of(", ".join(adapter_names), parameters)

    def _check_loaded(self, active: list[str]) -> None:
        for name in active:
            cores = self.placeholders.get(name, {}).get(name)
            if cores is None:
                continue
            if cores.is_meta or not bool(cores.any()):  # no tensor train of zeros was ever trained
                raise RuntimeError(
                    "the experts of this pool were not loaded: its config is that of a saved adapter, whose experts "
                    "come with its file. Use PeftModel.from_pretrained(base, folder)."
                )
            del self.placeholders[name]


def _described(adapter_names: list[str]) -> str | None:
    return f"the experts of adapter {', '.join(map(repr, adapter_names))}" if adapter_names else None


def _continued(note: CacheNote) -> dict[str, Choice]:
    """The choices of a cache's rows."""
    if note.rows is None:
        raise ValueError("tt_lora_moe: packed rows cannot be continued; call the model with `use_cache=False`.")
    if not note.is_current:
        raise ValueError(
            "tt_lora_moe: the tensors of the cache were replaced past its methods, so that nobody knows which expert "
            "its rows have. Use reorder_cache, batch_select_indices, batch_repeat_interleave, crop."
        )
    if note.derived is None:
        note.derived = {
            name: Choice(expert_B1, [e for e in expert_B1.unique().tolist() if e >= 0])
            for name, expert_B1 in note.rows.items()
        }
    return note.derived


def labels_of_sequences(expert_labels: Tensor, sequences: Sequences) -> Tensor:
    """The label of each sequence, (N,), from (B,) or (B, S)."""
    if expert_labels.dim() == 1:
        expert_labels = expert_labels.unsqueeze(1)
    return expert_labels.expand_as(sequences.index_BS).flatten()[sequences.last_prompt_token()]


def cross_entropies(logits_NE: Tensor, labels_N: Tensor) -> Tensor:
    """The router's cross-entropy for each sequence, (N,); 0 where its expert is unknown."""
    return F.cross_entropy(logits_NE, labels_N, ignore_index=IGNORE_INDEX, reduction="none")


def record(figures: Figures, config: TTLoraMoeConfig, losses_N: Tensor, logits_NE: Tensor, labels_N: Tensor) -> None:
    """Record the router's loss and accuracy, of all sequences and of each expert's."""
    figures.record_by_expert("router_loss", losses_N, labels_N, config.expert_names)
    right_N = (logits_NE.argmax(-1) == labels_N).float()
    figures.record_by_expert("router_accuracy", right_N, labels_N, config.expert_names)
