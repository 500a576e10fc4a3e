"""PTMoeLayer: puts a prompt before every sequence that goes into a decoder, and takes it out of what comes out.

Shape suffixes: B rows, S their length, L their length with the prompts in, Q sequences (rows, or the segments of
packed rows), T virtual tokens, N experts, K experts per sequence, R rank, D model width.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache

from ..shared.auxiliary import AuxiliaryLosses
from ..shared.batches import Sequences, find_sequences
from ..shared.generation import bind, cache_in, cache_of
from ..shared.routing import Routing, router_logits, top_k_routing
from .config import PTMoeConfig
from .layout import Layout

_ROUTER_STD = 0.02
# Singular values below this share of the largest are rounding errors of zeros.
_RANK_TOLERANCE = 1e-6
# Attribute of a cache: which adapter's prompt is in it.
_CACHE_MARK = "_pt_moe_prompt"
_FLASH_KWARGS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_PER_TOKEN_KWARGS = ("token_type_ids", "cache_position", "read_index")


# How many tokens a router may read where a call of generate runs.
_input_length: ContextVar[int | None] = ContextVar("input_length", default=None)


@contextmanager
def generation(input_length: int | None) -> Iterator[None]:
    """Within it, routers read the input only: without a cache, and with an assistant, calls have more tokens."""
    token = _input_length.set(input_length)
    try:
        yield
    finally:
        _input_length.reset(token)


class PTMoeLayer(nn.Module, BaseTunerLayer):
    """The prompt experts and their router, and the hooks that insert the prompt.

    It is a child of the decoder (the module from embeddings to last hidden states), so that everything outside, the
    labels, the loss, the logits, is as without it.

    Adapter parameters, by adapter name, in float32: ptmoe_experts (N, T, R) and ptmoe_shared (R, D), or without rank
    ptmoe_experts (N, T, D); with more than one expert ptmoe_router_weight (N, D) and ptmoe_router_bias (N,).

    Args:
        model: the model that is called with labels.
        decoder: the model's decoder; the model itself if it is nothing more.
        auxiliary: the model's auxiliary losses.
    """

    adapter_layer_names = ("ptmoe_experts", "ptmoe_shared", "ptmoe_router_weight", "ptmoe_router_bias")
    other_param_names = ("ptmoe_config",)

    def __init__(self, model: nn.Module, decoder: nn.Module, auxiliary: AuxiliaryLosses) -> None:
        super().__init__()
        self.auxiliary = auxiliary
        self.ptmoe_experts = nn.ParameterDict()
        self.ptmoe_shared = nn.ParameterDict()
        self.ptmoe_router_weight = nn.ParameterDict()
        self.ptmoe_router_bias = nn.ParameterDict()
        self.ptmoe_config: dict[str, PTMoeConfig] = {}
        # adapters that could not start from their text, until they are loaded
        self.without_text: set[str] = set()
        self.max_positions = getattr(decoder.config.get_text_config(), "max_position_embeddings", None)
        self._takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters
        self._device: torch.device | None = None
        self._call: dict[str, Any] = {}
        self._layout: Layout | None = None
        self._handles = [
            model.register_forward_pre_hook(self._note_call, with_kwargs=True),
            model.register_forward_hook(self._forget_call, always_call=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
        ]
        self.train(model.training)

    def detach(self) -> None:
        """Leave the decoder's calls alone from now on."""
        for handle in self._handles:
            handle.remove()

    def update_layer(self, adapter_name: str, config: PTMoeConfig, hidden_size: int, device: torch.device) -> None:
        """Add an adapter of this configuration; `reset_parameters` initialises it."""
        shape = {"dtype": torch.float32, "device": device}
        width = hidden_size if config.rank is None else config.rank
        experts = torch.empty(config.num_experts, config.num_virtual_tokens, width, **shape)
        self.ptmoe_experts[adapter_name] = nn.Parameter(experts)
        if config.rank is not None:
            self.ptmoe_shared[adapter_name] = nn.Parameter(torch.empty(config.rank, hidden_size, **shape))
        if config.num_experts > 1:
            self.ptmoe_router_weight[adapter_name] = nn.Parameter(
                torch.empty(config.num_experts, hidden_size, **shape)
            )
            self.ptmoe_router_bias[adapter_name] = nn.Parameter(torch.empty(config.num_experts, **shape))
        self.ptmoe_config[adapter_name] = config
        self.without_text.discard(adapter_name)
        self._device = device
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, text_NTD: Tensor) -> None:
        """Start from a text, the same on every process that has the same seed.

        A_i B = E_i as far as the rank allows, by the singular value decomposition of the stacked E_i: A = U S^1/2 and
        B = S^1/2 V^T. A text of few different tokens has fewer singular values above 0 than R. Of the others A is 0
        but B is not, or neither would ever get a gradient.

        Args:
            text_NTD: embeddings of each expert's initial text, (N, T, D); (1, T, D) is one text for all.
        """
        config = self.ptmoe_config[adapter_name]
        experts = self.ptmoe_experts[adapter_name]
        if config.rank is None:
            experts.copy_(text_NTD.expand_as(experts))
        else:
            # on the CPU, where all processes find the same signs
            u, s, vt = torch.linalg.svd(text_NTD.flatten(0, 1).double().cpu(), full_matrices=False)
            u, s, vt = u[:, : config.rank], s[: config.rank], vt[: config.rank]
            significant = s > _RANK_TOLERANCE * s[0]
            filling = s[significant].min() if significant.any() else s.new_ones(())
            factors = (u * (s * significant).sqrt()).unflatten(0, text_NTD.shape[:2])
            experts.copy_(factors.expand_as(experts))
            self.ptmoe_shared[adapter_name].copy_(torch.where(significant, s, filling).sqrt().unsqueeze(1) * vt)
        if config.num_experts > 1:
            weight = self.ptmoe_router_weight[adapter_name]
            generator = torch.Generator().manual_seed(torch.initial_seed())
            weight.copy_(torch.randn(weight.shape, generator=generator) * _ROUTER_STD)
            nn.init.zeros_(self.ptmoe_router_bias[adapter_name])

    def prompts(self, adapter_name: str, sequences: Sequences, embeds_BSD: Tensor) -> Tensor:
        """The prompt of each sequence, chosen by the mean embedding of what its router may read: (Q, T, D)."""
        config = self.ptmoe_config[adapter_name]
        with torch.autocast(embeds_BSD.device.type, enabled=False):
            experts_NTR = self.ptmoe_experts[adapter_name].float()
            loss = None
            if config.num_experts == 1:
                mixed_QTR = experts_NTR.expand(sequences.count, -1, -1)
            else:
                weights_QN, loss = self._route(adapter_name, sequences.prompt_mean(embeds_BSD.detach()))
                # all experts take part, the unchosen with weight 0: DDP waits for every gradient
                mixed_QTR = (weights_QN @ experts_NTR.flatten(1)).unflatten(1, experts_NTR.shape[1:])
            prompts_QTD = mixed_QTR
            if adapter_name in self.ptmoe_shared:
                # as one matrix: a trainable factor and a frozen one then take the same product, bit by bit
                rows = mixed_QTR.flatten(0, 1) @ self.ptmoe_shared[adapter_name].float()
                prompts_QTD = rows.unflatten(0, mixed_QTR.shape[:2])
        return self.auxiliary.add(prompts_QTD.to(embeds_BSD.dtype), loss, adapter_name, "prompt")

    def _route(self, adapter_name: str, x_QD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each expert's weight, (Q, N), K of them not 0; and the router loss if there is one."""
        config = self.ptmoe_config[adapter_name]
        logits_QN = router_logits(x_QD, self.ptmoe_router_weight[adapter_name], self.ptmoe_router_bias[adapter_name])
        if self.training and config.router_noise_std:
            logits_QN = logits_QN * (1 + config.router_noise_std * torch.randn_like(logits_QN))
        weights_QK, indices_QK = top_k_routing(logits_QN, config.top_k, norm_topk_prob=False)
        if not config.scale_by_router_prob:
            weights_QK = 0 * weights_QK + 1
        weights_QN = torch.zeros_like(logits_QN).scatter(1, indices_QK, weights_QK)
        loss = None
        if self.ptmoe_experts[adapter_name].requires_grad:
            routing = Routing(logits_QN, indices_QK)
            loss = self.auxiliary.losses(adapter_name, "prompt", config, routing, padded=False)
        return weights_QN, loss

    # ------------------------------------------------------------------------------------------- around the decoder

    def _note_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The decoder sees no labels, and no positions if it has no use for them."""
        call = bind(model, args, kwargs)
        self._call = {name: call[name] for name in ("labels", "position_ids") if call.get(name) is not None}

    def _forget_call(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._call = {}

    def _before_decoder(
        self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        self._layout = None
        adapter_name = self._active()
        call = bind(decoder, args, kwargs)
        cache = cache_of(decoder, call)
        mark, expected = getattr(cache, _CACHE_MARK, None), self._mark(adapter_name)
        if mark is None and expected is None:
            return None
        if cache is not None and cache.is_compileable:
            raise ValueError(
                f"pt_moe: a {type(cache).__name__} has its length and its masks fixed without room for the prompt. "
                "Leave `cache_implementation` out (a DynamicCache)."
            )
        filled = cache is not None and cache.get_seq_length() > 0
        if filled and mark != expected:
            raise ValueError(
                f"pt_moe: the cache was filled with {_describe(mark)}, but now it is {_describe(expected)}. Begin "
                "with a new cache."
            )
        if adapter_name is None:
            return None
        for name in _PER_TOKEN_KWARGS:
            if call.get(name) is not None:
                raise ValueError(f"pt_moe: `{name}` is not supported, as it says nothing of the prompt's positions.")
        return (), self._continue(adapter_name, cache, call) if filled else self._begin(adapter_name, decoder, call)

    def _after_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        layout, self._layout = self._layout, None
        if layout is None:
            return None
        for cache in (cache_of(decoder, kwargs), cache_in(output)):
            if cache is not None:
                setattr(cache, _CACHE_MARK, self._mark(self._active()))
        if isinstance(output, tuple):
            return layout.strip(output)
        for name, part in output.items():
            output[name] = layout.strip(part)
        return output

    def _begin(self, adapter_name: str, decoder: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments with a prompt before every sequence."""
        config = self.ptmoe_config[adapter_name]
        self._check_initial_text(adapter_name)
        mask = call.get("attention_mask")
        embeds_BSD = call.get("inputs_embeds")
        if embeds_BSD is None:
            embeds_BSD = decoder.get_input_embeddings()(call["input_ids"])
        sequences = self._find_sequences(config, call, embeds_BSD)
        layout = Layout.of(sequences, config.num_virtual_tokens)
        self._check_length(layout.longest, config)
        # with a mask of two dimensions transformers does not look at positions, which alone keep segments apart
        mask = None if mask is None or layout.packed else layout.grow_mask(mask)
        call = call | {"input_ids": None, "attention_mask": mask, "position_ids": layout.position_BL}
        if mask is None and layout.isolated:
            self._check_isolation(decoder, call, layout)
            call["use_cache"] = False  # nor does it with a cache, and a new one is its default
        if not self._takes_positions:
            del call["position_ids"]
        if call.get("seq_idx") is not None:
            call["seq_idx"] = (layout.position_BL == 0).cumsum(1, dtype=torch.int32) - 1
        for name in _FLASH_KWARGS:  # found anew from the positions
            call.pop(name, None)
        self._layout = layout
        return call | {"inputs_embeds": layout.insert(embeds_BSD, self.prompts(adapter_name, sequences, embeds_BSD))}

    def _find_sequences(self, config: PTMoeConfig, call: dict[str, Any], embeds_BSD: Tensor) -> Sequences:
        labels, routed = self._call.get("labels"), config.num_experts > 1
        if self.training and routed and config.router_input == "prompt" and labels is None:
            raise ValueError(
                "pt_moe: a model in training mode was called without labels, which tell prompt from answer "
                "(`router_input: prompt`). Losses that are computed outside the model (`rl:`, custom ones) are not "
                "supported; for generation and evaluation call model.eval() first."
            )
        if labels is not None and labels.shape != embeds_BSD.shape[:2]:
            labels = None  # a class of the whole row
        call = self._call | {name: value for name, value in call.items() if value is not None}
        call = call | {"labels": labels, "position_ids": _positions(call, embeds_BSD.shape[1])}
        sequences = find_sequences(call, config.router_input if routed else "sequence")
        if _input_length.get() is None:
            return sequences
        readable = torch.arange(embeds_BSD.shape[1], device=embeds_BSD.device) < _input_length.get()
        return replace(sequences, prompt_BS=sequences.prompt_BS & readable)

    def _continue(self, adapter_name: str, cache: Cache, call: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments where the cache already has the prompt."""
        config, past = self.ptmoe_config[adapter_name], cache.get_seq_length()
        new = (call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]).shape[1]
        mask, position_ids = call.get("attention_mask"), call.get("position_ids")
        if mask is None:
            position_ids = None if position_ids is None else position_ids + config.num_virtual_tokens
        else:
            _check_mask(mask)
            if mask.shape[1] + config.num_virtual_tokens != past + new:
                raise ValueError(
                    f"pt_moe: the cache holds {past} positions, {config.num_virtual_tokens} of them the prompt's, and "
                    f"{new} tokens are new, but the attention mask is for {mask.shape[1]} tokens. To continue from a "
                    "cache give generate only the new tokens as input_ids, and a mask for all."
                )
            mask = _insert_ones(mask, config.num_virtual_tokens)
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        if self.max_positions is not None and past + new > self.max_positions:
            # the cache counts padding, which is no position
            self._check_length(past + new if position_ids is None else int(position_ids.max()) + 1, config)
        call = call | {"attention_mask": mask}
        return call | {"position_ids": position_ids} if self._takes_positions else call

    def _check_isolation(self, decoder: nn.Module, call: dict[str, Any], layout: Layout) -> None:
        """Whether positions alone keep the segments of a row apart."""
        if cache_of(decoder, call) is not None:
            raise ValueError("pt_moe: packed rows cannot be continued; call the model with `use_cache=False`.")
        if not self._takes_positions:
            raise ValueError(
                f"pt_moe: {type(decoder).__name__} takes no position_ids, so that nothing would keep the segments of "
                "a packed row apart. Set `sample_packing: false`."
            )
        if "flash" in decoder.config._attn_implementation and layout.shape[0] > 1:
            raise ValueError(
                f"pt_moe: flash attention keeps the segments of one packed row apart, not of {layout.shape[0]}. Set "
                "`micro_batch_size: 1` with a longer sequence_len, or `attn_implementation: sdpa`."
            )

    def _active(self) -> str | None:
        names = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.ptmoe_experts]
        if len(names) > 1:
            raise ValueError(f"pt_moe: one prompt at a time; {', '.join(names)} are active.")
        return names[0] if names else None

    def _mark(self, adapter_name: str | None) -> tuple[str, int] | None:
        return None if adapter_name is None else (adapter_name, self.ptmoe_config[adapter_name].num_virtual_tokens)

    def _check_length(self, length: int, config: PTMoeConfig) -> None:
        if self.max_positions is not None and length > self.max_positions:
            raise ValueError(
                f"pt_moe: a sequence of {length - config.num_virtual_tokens} tokens and its prompt of "
                f"{config.num_virtual_tokens} take {length} positions, but the model has {self.max_positions}. Use "
                f"sequences of at most {self.max_positions - config.num_virtual_tokens} tokens (`sequence_len`), or "
                "fewer num_virtual_tokens."
            )

    def _check_initial_text(self, adapter_name: str) -> None:
        """Only now is it known that an adapter was not loaded, which needs no tokenizer."""
        if adapter_name not in self.without_text:
            return
        if self.ptmoe_config[adapter_name].init_text is not None:
            raise ValueError(
                f"pt_moe.init_text: no tokenizer of the base model was found, so adapter {adapter_name!r} could not "
                "start from the text. Load the base from a folder or hub id that has its tokenizer, or leave the key "
                "out."
            )
        warnings.warn(
            f"pt_moe: no tokenizer of the base model was found; adapter {adapter_name!r} starts from random tokens "
            "of the vocabulary and not from a neutral instruction.",
            stacklevel=2,
        )
        self.without_text.remove(adapter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        # there is no base layer; PEFT asks where an adapter that was made on the meta device goes
        return self._device, None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.without_text -= {n for n in self.ptmoe_experts if f"{prefix}ptmoe_experts.{n}" in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)


def _describe(mark: tuple[str, int] | None) -> str:
    return "no prompt" if mark is None else f"the prompt of adapter {mark[0]!r} ({mark[1]} virtual tokens)"


def _positions(call: dict[str, Any], length: int) -> Tensor | None:
    """position_ids (B, S) as given, or from flash-attention's cumulative lengths, which stand for them."""
    position_ids, ends = call.get("position_ids"), call.get("cu_seq_lens_q")
    if position_ids is not None and position_ids.dim() != 2:
        raise ValueError(
            f"pt_moe: position_ids of shape {tuple(position_ids.shape)} are not supported, only (batch, length)."
        )
    _check_mask(call.get("attention_mask"))
    if position_ids is not None or ends is None:
        return position_ids
    position = torch.arange(length, device=ends.device)
    return (position - ends[torch.searchsorted(ends, position, right=True) - 1]).unsqueeze(0)


def _check_mask(mask: Any) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        shape = tuple(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
        raise ValueError(
            f"pt_moe: an attention mask of shape {shape} is not supported, as it has no room for the prompt. Give one "
            "of shape (batch, length), or none and positions that restart at every segment."
        )


def _insert_ones(mask_BS: Tensor, count: int) -> Tensor:
    """Insert `count` ones directly before each row's first token."""
    first_B1 = (mask_BS > 0).int().argmax(1, keepdim=True)
    position = torch.arange(mask_BS.shape[1] + count, device=mask_BS.device)
    prompt = (position >= first_B1) & (position < first_B1 + count)
    source = torch.where(position < first_B1, position, position - count).clamp(min=0)
    return mask_BS.gather(1, source).masked_fill(prompt, 1)
