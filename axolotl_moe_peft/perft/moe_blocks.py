"""What the MoE blocks of transformers look like inside.

The standard interface (Mixtral, OLMoE, Qwen3-MoE and most others): a module with a router, called `gate` or `router`,
and a module `experts` that is called with (hidden_states (T, D), indices (T, k), weights (T, k)). The router returns
them too, next to each other, with its logits (T, E) beyond the weights; or only the logits. What departs from this is
in moe_families.py. T tokens, E base experts, k of them per token, D model width.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..shared.tuner import whole
from .moe_families import BaseRouting, Family, family_of

ROUTER_NAMES = ("gate", "router")

# Tokens of a probe, from nearly undecided logits to saturated scores, and how near the k weights (of sum one) must be.
_PROBE_TOKENS, _PROBE_SCALES, _PROBE_TOLERANCE = 64, (-1.0, 1.5), 0.02

_NO_EXPERTS_CALL = "its experts are not called as one module with hidden states, indices and weights"
_NOT_ONLY_EXPERTS = "its router also chooses among outputs that are no experts"


class ExpertsCall(NamedTuple):
    """What reached the experts in a probe: their input (T, width) and the routing."""

    hidden_states: Tensor
    routing: BaseRouting


class _ProbeDone(Exception):
    """Ends the call of a block once its experts' input is known."""


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block of a base model.

    Attributes:
        name: its full name in the model.
        module: the block itself. Where a decoder layer holds router and experts beside other things (Gemma 4), the
            experts: their input is what an adapter must see, and their output what it adds to.
        router, experts: its children; experts is None where they are no module (JetMoe).
        family: what is special about it.
    """

    name: str
    module: nn.Module
    router: nn.Module
    experts: nn.Module | None
    family: Family

    @property
    def layer_index(self) -> int | None:
        """The first number in the name, i.e. the decoder layer."""
        number = re.search(r"(?:^|\.)(\d+)\.", self.name)
        return int(number[1]) if number else None

    def norm_topk_prob(self, config: Any) -> bool:
        """Whether the base router's k weights sum to one. Families without the configuration's field mostly do so."""
        if self.family.norm_topk_prob is not None:
            return self.family.norm_topk_prob(self.module)
        return bool(getattr(config.get_text_config(), "norm_topk_prob", True))

    def read_router(self, output: Any) -> BaseRouting:
        """What the router returned, as far as it can be told."""
        if self.family.routing is not None:
            return self.family.routing(self.module, output)
        if isinstance(output, Tensor):
            return BaseRouting(logits_TE=output)
        if not isinstance(output, (tuple, list)):
            return BaseRouting()
        integers = [i for i, t in enumerate(output) if isinstance(t, Tensor) and not t.is_floating_point()]
        if len(integers) != 1:
            return BaseRouting()
        at, step = integers[0], -1 if integers[0] else 1  # indices first: the order is reversed (Granite)
        logits_at = at + 2 * step
        logits_TE = output[logits_at] if 0 <= logits_at < len(output) else None
        return self._experts_only(BaseRouting(logits_TE, output[at + step], output[at]))

    def read_experts_call(self, args: tuple, kwargs: dict[str, Any], routing: BaseRouting) -> ExpertsCall | None:
        """What the experts are called with; None if that is not hidden states with indices and weights."""
        hidden_states, *choice = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        indices = [t for t in choice if not t.is_floating_point()]
        if len(choice) != 2 or len(indices) != 1:
            return None
        weights = next(t for t in choice if t.is_floating_point())
        routing = self._experts_only(routing._replace(weights_TK=weights, indices_TK=indices[0]))
        return ExpertsCall(hidden_states, routing)

    def _experts_only(self, routing: BaseRouting) -> BaseRouting:
        """Give choices of outputs that are no experts the weight 0."""
        if self.family.num_experts is None:
            return routing
        real = routing.indices_TK < self.family.num_experts(self.module)
        return routing._replace(weights_TK=routing.weights_TK * real, indices_TK=routing.indices_TK * real)

    @torch.no_grad()
    def probe(self, hidden_size: int) -> ExpertsCall | None:
        """Route a few tokens (works on the meta device too) and see what the experts are called with.

        Returns:
            None if they are not called as one module with hidden states, indices and weights.
        """
        seen: list[ExpertsCall] = []
        routing = BaseRouting()

        def note_router(router: nn.Module, args: tuple, output: Any) -> None:
            nonlocal routing
            routing = self.read_router(output)
            if self.family.routing is not None:
                seen.append(ExpertsCall(hidden_states, routing))
                raise _ProbeDone

        def note_experts(experts: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call = self.read_experts_call(args, kwargs, routing)
            seen.extend([call] if call is not None else [])
            raise _ProbeDone

        hidden_states = self._probe_tokens(hidden_size)
        handles = [self.router.register_forward_hook(note_router)]
        called, arguments = self.module, {}
        if called is self.experts:
            called, hidden_states = self.router, hidden_states[0]
        elif self.experts is not None:
            handles.append(self.experts.register_forward_pre_hook(note_experts, with_kwargs=True))
        if "input_ids" in inspect.signature(called.forward).parameters:  # DeepSeek V4 routes by token in some layers
            arguments["input_ids"] = hidden_states.new_zeros(hidden_states.shape[:-1], dtype=torch.int64)
        experts = set() if self.experts is None else set(self.experts.parameters())
        read = [p for p in called.parameters() if p not in experts]
        training = called.training
        called.eval()  # no jitter: the random numbers of training stay where they were
        try:
            with whole(read), _autocast(hidden_states):
                called(hidden_states, **arguments)
        except _ProbeDone:
            pass
        finally:
            called.train(training)
            for handle in handles:
                handle.remove()
        if called is self.router and routing.weights_TK is not None:
            seen.append(ExpertsCall(hidden_states, routing))
        return seen[0] if seen else None

    def _probe_tokens(self, hidden_size: int) -> Tensor:
        parameters = [p for m in (self.experts, self.router) if m is not None for p in m.parameters()]
        weight = next(p for p in parameters if p.is_floating_point())
        scales = torch.logspace(*_PROBE_SCALES, _PROBE_TOKENS).unsqueeze(-1)
        tokens = torch.randn(1, _PROBE_TOKENS, hidden_size, generator=torch.Generator().manual_seed(0)) * scales
        return tokens.to(weight.device, weight.dtype)

    def embedded_sizes(self, hidden_size: int) -> tuple[int, int, int]:
        """E, k and the width of the experts' input.

        Raises:
            ValueError: the experts are not called with indices and weights.
        """
        call = self.probe(hidden_size)
        if call is None:
            raise self._refusal("variant: embedded", _NO_EXPERTS_CALL)
        logits_TE, _, indices_TK = call.routing
        if self.family.num_experts is not None:
            num_experts = self.family.num_experts(self.module)
        elif logits_TE is not None:
            num_experts = logits_TE.shape[-1]
        else:
            raise self._refusal(
                "variant: embedded", "its router does not return logits, which tell how many there are"
            )
        return num_experts, indices_TK.shape[-1], call.hidden_states.shape[-1]

    def base_weights_per_tok(self, hidden_size: int) -> int:
        """k, if the router's weights are those of k experts' outputs.

        Raises:
            ValueError: they are not.
        """
        call = self.probe(hidden_size)
        if call is None:
            raise self._refusal("gate_weights: base", _NO_EXPERTS_CALL)
        if self.family.weights_scale_inputs:
            raise self._refusal("gate_weights: base", "its router's weights scale what goes into the experts")
        if self.family.num_experts is not None:
            raise self._refusal("gate_weights: base", _NOT_ONLY_EXPERTS)
        return call.routing.weights_TK.shape[-1]

    def base_scores(self, hidden_size: int) -> Callable[[Tensor], Tensor]:
        """The function that turns the base router's logits into its scores: softmax or sigmoid.

        Which one is found by routing a few tokens: the weights must be the chosen experts' scores, up to a factor.

        Raises:
            ValueError: it is neither, or there are no logits, so that there is no balance loss of this router.
        """
        call = self.probe(hidden_size)
        if call is None:
            raise self._refusal("base_router_aux_loss_coef", _NO_EXPERTS_CALL)
        if self.family.num_experts is not None:
            raise self._refusal("base_router_aux_loss_coef", _NOT_ONLY_EXPERTS)
        logits_TE, weights_TK, indices_TK = call.routing
        if logits_TE is None:
            raise self._refusal("base_router_aux_loss_coef", "its router does not return its logits")
        dim = -1 if indices_TK.shape[-1] > 1 else 0  # one weight per token: compared over the tokens
        fitting = []
        for function in (partial(torch.softmax, dim=-1), torch.sigmoid):
            scores_TK = function(logits_TE.float()).gather(-1, indices_TK)
            share, expected = (x / x.sum(dim, keepdim=True) for x in (weights_TK.float(), scores_TK))
            if (share - expected).abs().max() < _PROBE_TOLERANCE:
                fitting.append(function)
        if len(fitting) != 1:
            reason = "its router's weights are not the softmax or the sigmoid of its logits, or do not tell which"
            raise self._refusal("base_router_aux_loss_coef", reason)
        return fitting[0]

    def _refusal(self, key: str, reason: str) -> ValueError:
        return ValueError(
            f"perft.{key} is not possible with {type(self.module).__name__} ({self.name}): {reason}. Leave the key "
            "out, or leave such layers out with `layers_to_transform`."
        )


def _autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Mixed precision as in training: Axolotl keeps the modules named `gate` of a bf16 base in float32."""
    if x.is_meta or x.dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, x.dtype)


def find_moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """Every MoE block of the model, in order, adapted ones included (their `base_layer` is looked at)."""
    blocks = []
    for name, module in model.named_modules():
        if name.endswith(".base_layer"):
            continue
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        children, family = dict(inner.named_children()), family_of(inner)
        router = next((children[r] for r in ROUTER_NAMES if r in children), None)
        experts = children.get("experts")
        if router is None or (experts is None and family.routing is None):
            continue
        if isinstance(inner, GradientCheckpointingLayer):
            inner = experts.get_base_layer() if isinstance(experts, BaseTunerLayer) else experts
            blocks.append(MoeBlock(f"{name}.experts", inner, router, inner, family))
        else:
            blocks.append(MoeBlock(name, inner, router, experts, family))
    return blocks


def select_moe_blocks(
    model: nn.Module,
    target_modules: Sequence[str] | str | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
) -> list[MoeBlock]:
    """The MoE blocks that `target_modules` and `layers_to_transform` choose.

    Args:
        model: the base model.
        target_modules: names, suffixes of names, or one regular expression for the full name; None for all.
        layers_to_transform: decoder layers; None for all.

    Raises:
        ValueError: the model has no MoE block, or an entry chooses none.
    """
    blocks = find_moe_blocks(model)
    if not blocks:
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"perft: no MoE block in {type(model).__name__} (model_type {model_type}): no module has both a router "
            f"({' or '.join(f'`{name}`' for name in ROUTER_NAMES)}) and `experts`. PERFT adapts MoE blocks; for a "
            "dense base model use `adapter: lora` or `adapter: tt_lora`."
        )
    if isinstance(target_modules, str):
        chosen = [b for b in blocks if re.fullmatch(target_modules, b.name)]
        unmatched = [] if chosen else [target_modules]
    elif target_modules is not None:
        chosen = [b for b in blocks if any(_has_suffix(b.name, t) for t in target_modules)]
        unmatched = [t for t in target_modules if not any(_has_suffix(b.name, t) for b in blocks)]
    else:
        chosen, unmatched = blocks, []
    if unmatched or not chosen:
        raise ValueError(
            f"perft.target_modules: {', '.join(map(repr, unmatched)) or repr(target_modules)} matches no MoE block. "
            f"The MoE blocks of this model are {_list_names(blocks)}; leave the key out to adapt all of them."
        )
    if layers_to_transform is None:
        return chosen
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform)
    unknown = [i for i in layers if i not in {b.layer_index for b in chosen}]
    if unknown or not layers:
        raise ValueError(
            f"perft.layers_to_transform: {unknown or layers} names no layer with an MoE block; "
            f"there are MoE blocks in layers {sorted(b.layer_index for b in chosen)}."
        )
    return [b for b in chosen if b.layer_index in layers]


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _list_names(blocks: list[MoeBlock]) -> str:
    names = [b.name for b in blocks]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
