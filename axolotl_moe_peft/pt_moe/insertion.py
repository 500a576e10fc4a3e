"""PromptInsertion: puts a prompt before every sequence that goes into a decoder, and takes it out of what comes out.

A batch's way: `_begin_call` (the model is called) -> `_insert` (its decoder is) -> the decoder -> `_strip` ->
`_end_call`. What lies outside the decoder, the labels, the loss, the logits, is as without a prompt.

Shape suffixes: B rows, S their length, L their length with the prompts in, Q sequences (rows, or the segments of
packed rows), T virtual tokens, D width of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..shared.batches import Sequences, find_sequences, predicts_tokens
from ..shared.fingerprint import Fingerprints
from ..shared.generation import (
    CacheNote,
    Generation,
    PerThread,
    Stream,
    arguments_of,
    bind,
    cache_in,
    cache_of,
    cached_length,
    check_continued,
    keep,
    only_input,
)
from ..shared.trainer_step import labels_of
from .bases import keeps_apart
from .calls import check_arguments, check_cache, check_images, check_isolation, check_length, check_mask_length
from .config import PTMoeConfig
from .layer import PTMoeLayer
from .layout import Layout, insert_ones
from .mrope import has_several_kinds, images_follow_text

# which tokens are of images, in words of vision-language models
_OF_IMAGES = ("visual_pos_masks", "moe_mm_token_type_ids")
# torch.compile loses what hooks put into a thread's state and take out of an output: the prompt would stay in it
_eager = torch.compiler.disable
_FLASH_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True, eq=False)
class _Call:
    """What the decoder of a running call does not see."""

    input_ids: Tensor | None = None
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    stream: Stream | None = None


@dataclass(frozen=True, eq=False)
class _Inserted:
    """What was put into the running call of the decoder: prompts, or a cache that has them."""

    decided_by: str
    inserted: int
    layout: Layout | None = None
    rows: dict[str, Tensor] | None = None
    note: CacheNote | None = None


class PromptInsertion:
    """Owns the hooks on a model and its decoder, and what is known of their running calls.

    Args:
        layer: the prompts.
        model: the model that is called with labels.
        decoder: its part from embeddings to last hidden states; the model itself if it is nothing more.
    """

    def __init__(self, layer: PTMoeLayer, model: nn.Module, decoder: nn.Module) -> None:
        self.layer, self.decoder = layer, decoder
        self.takes_positions = "position_ids" in arguments_of(type(decoder).forward)
        self.max_positions = getattr(decoder.config.get_text_config(), "max_position_embeddings", None)
        self._predicts_tokens = predicts_tokens(model)  # else what it reads has no answer in it
        self.several_kinds = has_several_kinds(model)
        self.keeps_apart = {kinds: keeps_apart(decoder, kinds) for kinds in (None, 3, 4)[: 1 + 2 * self.several_kinds]}
        self.images_follow_text = images_follow_text(model)
        self._thread, self._fingerprints = PerThread(), Fingerprints()
        self._generation = Generation(model, "pt_moe", self._is_active)
        self._handles = [
            model.register_forward_pre_hook(self._begin_call, with_kwargs=True),
            model.register_forward_hook(self._end_call, always_call=True),
            decoder.register_forward_pre_hook(self._insert, with_kwargs=True),
            decoder.register_forward_hook(self._strip, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Leave the calls of the model and its decoder alone from now on."""
        self._generation.detach()
        for handle in self._handles:
            handle.remove()

    def _is_active(self) -> bool:
        return self.layer.active_adapter_name() is not None

    @_eager
    def _begin_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = bind(model, args, kwargs)
        stream = self._generation.stream(call)
        labels = labels_of(call) if self._predicts_tokens else None
        self._thread.call = _Call(call.get("input_ids"), labels, call.get("position_ids"), stream)

    @_eager
    def _end_call(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._thread.call = _Call()

    @property
    def _call(self) -> _Call:
        return getattr(self._thread, "call", _Call())

    @_eager
    def _insert(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self._thread.inserted = None
        adapter_name = self.layer.active_adapter_name()
        call = bind(decoder, args, kwargs)
        cache, decided_by = cache_of(decoder, call), self._described(adapter_name)
        note = check_continued("pt_moe", cache, decided_by, "no prompt", lambda: self._weights(adapter_name))
        if adapter_name is None:
            return None
        check_arguments(call, self.several_kinds)
        check_cache(cache)
        if note is not None:
            call = self._continue(self.layer.ptmoe_config[adapter_name], cache, note, call)
            self._thread.inserted = _Inserted(decided_by, note.inserted, note=note)
            return (), call
        layout, call = self._begin(adapter_name, cache, call)
        count = self.layer.ptmoe_config[adapter_name].num_virtual_tokens
        self._thread.inserted = _Inserted(decided_by, count, layout, self._to_note(layout, call))
        return (), call

    @_eager
    def _strip(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        inserted, self._thread.inserted = getattr(self._thread, "inserted", None), None
        if inserted is None or output is None:
            return None
        cache, layout = cache_in(output) or cache_of(decoder, kwargs), inserted.layout
        if layout is None:
            inserted.note.update(cache)
            return None
        # nobody continues after a step of training, in which reading the weights would wait for the device
        weights = None if cache is None or self.layer.training else self._weights(self.layer.active_adapter_name())
        keep(cache, inserted.decided_by, inserted.rows, inserted.inserted, weights)
        if isinstance(output, tuple):
            return layout.strip(output)
        for name, part in output.items():
            output[name] = layout.strip(part)
        return output

    def _described(self, adapter_name: str | None) -> str | None:
        if adapter_name is None:
            return None
        count = self.layer.ptmoe_config[adapter_name].num_virtual_tokens
        return f"the prompt of adapter {adapter_name!r} ({count} virtual tokens)"

    def _weights(self, adapter_name: str) -> int | None:
        names = ("ptmoe_experts", "ptmoe_shared")
        parameters = (getattr(self.layer, name) for name in names)
        return self._fingerprints.of(adapter_name, [p[adapter_name] for p in parameters if adapter_name in p])

    # -------------------------------------------------------------------------------------------- a new prompt

    def _begin(self, adapter_name: str, cache: Cache | None, call: dict[str, Any]) -> tuple[Layout, dict[str, Any]]:
        """The decoder's arguments with a prompt before every sequence."""
        config, decoder = self.layer.ptmoe_config[adapter_name], self.decoder
        self.layer.check_initial_text(adapter_name)
        embeds_BSD = call.get("inputs_embeds")
        if embeds_BSD is None:
            embeds_BSD = decoder.get_input_embeddings()(call["input_ids"])
        learns = self.layer.training and self._call.stream is None
        sequences = self._find_sequences(config, call, embeds_BSD, learns)
        layout = Layout.of(sequences, config.num_virtual_tokens)
        check_length(layout.longest, self.max_positions, config)
        mask = call.get("attention_mask")
        # with a mask of two dimensions transformers does not look at positions, which alone keep segments apart
        mask = None if mask is None or layout.packed else layout.grow_mask(mask)
        prompts_QTD = self.layer.prompts(adapter_name, sequences, embeds_BSD, learns)
        new = {
            "input_ids": None,
            "inputs_embeds": layout.insert(embeds_BSD, prompts_QTD),
            "attention_mask": mask,
        }
        position_ids, kinds = call.get("position_ids"), None
        if position_ids is not None and position_ids.dim() == 3:
            if not self.images_follow_text:
                check_images(decoder, position_ids)
            kinds = len(position_ids)
        if self.takes_positions:
            new["position_ids"] = layout.position_BL if kinds is None else layout.move(position_ids)
        new |= {name: layout.grow_mask(call[name], 0) for name in _OF_IMAGES if call.get(name) is not None}
        if mask is None and layout.isolated:
            apart = self.keeps_apart.get(kinds, False) if layout.packed else self.takes_positions
            check_isolation(decoder, apart, cache is not None, layout.shape[0])
            new["use_cache"] = False  # nor does it with a cache, and a new one is its default
        if call.get("seq_idx") is not None:
            new["seq_idx"] = (layout.position_BL == 0).cumsum(1, dtype=torch.int32) - 1
        # what flash attention takes is found anew from the positions
        return layout, {name: value for name, value in call.items() if name not in _FLASH_ARGUMENTS} | new

    def _find_sequences(
        self, config: PTMoeConfig, call: dict[str, Any], embeds_BSD: Tensor, learns: bool
    ) -> Sequences:
        labels, routed = self._call.labels, config.num_experts > 1
        if learns and routed and config.router_input == "prompt" and labels is None and self._predicts_tokens:
            raise ValueError(
                "pt_moe: a model in training mode was called without labels, which tell prompt from answer "
                "(`router_input: prompt`). Losses that are computed outside the model (`rl:`, custom ones) are not "
                "supported; for evaluation call model.eval() first."
            )
        if labels is not None and labels.shape != embeds_BSD.shape[:2]:
            labels = None
        ids = self._call.input_ids  # what is inside a vision-language model gets embeddings
        if call.get("input_ids") is None and ids is not None and ids.shape == embeds_BSD.shape[:2]:
            call = call | {"input_ids": ids}
        call = {name: value for name, value in call.items() if value is not None}
        call |= {"labels": labels, "position_ids": self._positions(call, embeds_BSD.shape[1])}
        return only_input(find_sequences(call, config.router_input if routed else "sequence"), self._call.stream)

    def _positions(self, call: dict[str, Any], length: int) -> Tensor | None:
        """position_ids (B, S) as given, or from flash attention's cumulative lengths, which stand for them."""
        # a decoder that has no use for positions does not see those that the model was called with
        position_ids, ends = call.get("position_ids", self._call.position_ids), call.get("cu_seq_lens_q")
        if position_ids is not None or ends is None:
            return position_ids
        position = torch.arange(length, device=ends.device)
        return (position - ends[torch.searchsorted(ends, position, right=True) - 1]).unsqueeze(0)

    def _to_note(self, layout: Layout, call: dict[str, Any]) -> dict[str, Tensor] | None:
        """What has to be known of a cache's rows to continue them."""
        if layout.packed:
            return None
        rows = {"prompt_end": layout.ends()}
        if self.several_kinds:
            position_ids = call["position_ids"]
            ahead_B = layout.ahead(position_ids) if position_ids.dim() == 3 else torch.zeros_like(rows["prompt_end"])
            rows["ahead"] = ahead_B
        return rows

    # -------------------------------------------------------------------------------- a cache that has its prompts

    def _continue(self, config: PTMoeConfig, cache: Cache, note: CacheNote, call: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments for tokens after those of a cache."""
        past = cached_length(cache)
        new = (call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]).shape[1]
        self._check_note(note, past)
        mask, position_ids = call.get("attention_mask"), call.get("position_ids")
        if mask is None and self.several_kinds:
            position_ids = past + torch.arange(new, device=note.rows["ahead"].device).unsqueeze(0)
        elif mask is None:
            position_ids = None if position_ids is None else position_ids + config.num_virtual_tokens
        else:
            if past is not None:
                check_mask_length(mask, past, new, config)
            mask = insert_ones(mask, config.num_virtual_tokens)
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        if self.max_positions is not None and past is not None and past + new > self.max_positions:
            # the cache counts padding, which is no position
            length = past + new if position_ids is None else int(position_ids.max()) + 1
            check_length(length, self.max_positions, config)
        if self.several_kinds:
            # as text, which the models themselves take it for; what they know of earlier positions is the last call's
            position_ids = position_ids + note.rows["ahead"].unsqueeze(1)
        call = call | {"attention_mask": mask}
        return call | {"position_ids": position_ids} if self.takes_positions else call

    @staticmethod
    def _check_note(note: CacheNote, past: int | None) -> None:
        if note.rows is None:
            raise ValueError("pt_moe: packed rows cannot be continued; call the model with `use_cache=False`.")
        cropped = past is not None and note.length is not None and past < note.length
        if cropped and bool((note.rows["prompt_end"] > past).any()):
            raise ValueError(
                f"pt_moe: the cache was cropped to {past} positions, which cuts off the prompt. Begin with a new one."
            )
