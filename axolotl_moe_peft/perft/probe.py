"""Probing an MoE block: routing a few tokens tells what its code does not say.

Shape suffixes: T tokens, E base experts, k of them per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..shared.precision import autocast_as_in_training
from ..shared.tuner import whole
from .block import ExpertsCall, FeedForward, MoeBlock
from .moe_families import BaseRouting

# Tokens of a probe, from nearly undecided logits to saturated scores, and how near the k weights (of sum one) must be.
_PROBE_TOKENS, _PROBE_SCALES, _PROBE_TOLERANCE = 64, (-1.0, 1.5), 0.02

_DENSE = "it is a dense MLP, without experts and without a router"
_NO_EXPERTS_CALL = "its experts are not called as one module with hidden states, indices and weights"
_NOT_ONLY_EXPERTS = "its router also chooses among outputs that are no experts"


class _ProbeDone(Exception):
    """Ends the call of a block once its experts' input is known."""


@torch.no_grad()
def probe(block: MoeBlock) -> ExpertsCall | None:
    """Route a few tokens (works on the meta device too) and see what the experts are called with.

    Returns:
        None if they are not called as one module with hidden states, indices and weights.
    """
    seen: list[ExpertsCall] = []
    routing = BaseRouting()

    def note_router(router: nn.Module, args: tuple, output: Any) -> None:
        nonlocal routing
        routing = block.read_router(output)
        if block.family.routing is not None:
            seen.append(ExpertsCall(hidden_states, routing))
            raise _ProbeDone

    def note_experts(experts: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = block.read_experts_call(args, kwargs, routing)
        seen.extend([call] if call is not None else [])
        raise _ProbeDone

    hidden_states = _probe_tokens(block)
    handles = [block.router.register_forward_hook(note_router)]
    called, arguments = block.module, {}
    if called is block.experts:
        called, hidden_states = block.router, hidden_states[0]
    elif block.experts is not None:
        handles.append(block.experts.register_forward_pre_hook(note_experts, with_kwargs=True))
    if "input_ids" in inspect.signature(called.forward).parameters:  # DeepSeek V4 routes by token in some layers
        arguments["input_ids"] = hidden_states.new_zeros(hidden_states.shape[:-1], dtype=torch.int64)
    experts = set() if block.experts is None else set(block.experts.parameters())
    read = [p for p in called.parameters() if p not in experts]
    training = called.training
    called.eval()  # no jitter: the random numbers of training stay where they were
    try:
        with whole(read), autocast_as_in_training(hidden_states):
            called(hidden_states, **arguments)
    except _ProbeDone:
        pass
    finally:
        called.train(training)
        for handle in handles:
            handle.remove()
    if called is block.router and routing.weights_TK is not None:
        seen.append(ExpertsCall(hidden_states, routing))
    return seen[0] if seen else None


def _probed(block: FeedForward, key: str) -> ExpertsCall:
    """What a probe of the block finds.

    Raises:
        ValueError: `key` needs what the block does not have.
    """
    if not isinstance(block, MoeBlock):
        raise _refusal(block, key, _DENSE)
    call = probe(block)
    if call is None:
        raise _refusal(block, key, _NO_EXPERTS_CALL)
    return call


def embedded_sizes(block: FeedForward) -> tuple[int, int, int]:
    """E, k and the width of the experts' input.

    Raises:
        ValueError: there are no experts, or they are not called with indices and weights.
    """
    call = _probed(block, "variant: embedded")
    logits_TE, _, indices_TK = call.routing
    if block.family.num_experts is not None:
        num_experts = block.family.num_experts(block.module)
    elif logits_TE is not None:
        num_experts = logits_TE.shape[-1]
    else:
        reason = "its router does not return logits, which tell how many there are"
        raise _refusal(block, "variant: embedded", reason)
    return num_experts, indices_TK.shape[-1], call.hidden_states.shape[-1]


def base_weights_per_tok(block: FeedForward) -> int:
    """k, if the router's weights are those of k experts' outputs.

    Raises:
        ValueError: they are not.
    """
    call = _probed(block, "gate_weights: base")
    if block.family.weights_scale_inputs:
        raise _refusal(block, "gate_weights: base", "its router's weights scale what goes into the experts")
    if block.family.num_experts is not None:
        raise _refusal(block, "gate_weights: base", _NOT_ONLY_EXPERTS)
    return call.routing.weights_TK.shape[-1]


def base_scores(block: FeedForward) -> Callable[[Tensor], Tensor]:
    """The function that turns the base router's logits into its scores: softmax or sigmoid.

    Which one is found by routing a few tokens: the weights must be the chosen experts' scores, up to a factor.

    Raises:
        ValueError: it is neither, or there are no logits or no router, so that there is no balance loss of it.
    """
    call = _probed(block, "base_router_aux_loss_coef")
    if block.family.num_experts is not None:
        raise _refusal(block, "base_router_aux_loss_coef", _NOT_ONLY_EXPERTS)
    logits_TE, weights_TK, indices_TK = call.routing
    if logits_TE is None:
        raise _refusal(block, "base_router_aux_loss_coef", "its router does not return its logits")
    dim = -1 if indices_TK.shape[-1] > 1 else 0  # one weight per token: compared over the tokens
    fitting = []
    for function in (partial(torch.softmax, dim=-1), torch.sigmoid):
        scores_TK = function(logits_TE.float()).gather(-1, indices_TK)
        share, expected = (x / x.sum(dim, keepdim=True) for x in (weights_TK.float(), scores_TK))
        if (share - expected).abs().max() < _PROBE_TOLERANCE:
            fitting.append(function)
    if len(fitting) != 1:
        reason = "its router's weights are not the softmax or the sigmoid of its logits, or do not tell which"
        raise _refusal(block, "base_router_aux_loss_coef", reason)
    return fitting[0]


def _probe_tokens(block: MoeBlock) -> Tensor:
    parameters = [p for m in (block.experts, block.router) if m is not None for p in m.parameters()]
    weight = next(p for p in parameters if p.is_floating_point())
    size = (1, _PROBE_TOKENS, block.hidden_size)
    with torch.device("cpu"):
        scales = torch.logspace(*_PROBE_SCALES, _PROBE_TOKENS).unsqueeze(-1)
        tokens = torch.randn(size, generator=torch.Generator().manual_seed(0)) * scales
    return tokens.to(weight.device, weight.dtype)


def _refusal(block: FeedForward, key: str, reason: str) -> ValueError:
    return ValueError(
        f"perft.{key} is not possible with {type(block.module).__name__} ({block.name}): {reason}. Leave the key "
        "out, or leave such layers out with `layers_to_transform`."
    )
