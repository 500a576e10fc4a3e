"""PerftLayer: an MoE block, or a dense MLP, with adapters in parallel with it.

Shape suffixes: T tokens (batch and sequence flattened), D model width, N adapters, K adapters per token, R rank. E, k:
the base block's experts and experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..shared.auxiliary import AuxiliaryLosses
from ..shared.choices import note_choices
from ..shared.routing import Routing, acting_losses
from ..shared.tuner import TunerLayer
from .block import FeedForward, MoeBlock
from .config import PerftConfig
from .moe_families import BaseRouting
from .probe import base_scores
from .units import Units
from .variants import VARIANTS, BlockAdapter

# The authors leave the routers at transformers' `initializer_range`, and zero the up-projections almost.
_ROUTER_STD = 0.02
_PAPER_UP_STD = 1e-6
# What the base router of the block that runs has decided: from its hook to the adapters of the same call. Threads that
# call one model have a value each.
_base_routing: ContextVar[BaseRouting] = ContextVar("base_routing", default=BaseRouting())


class PerftLayer(nn.Module, TunerLayer):
    """Wraps an MoE block or a dense MLP, which stays as it is and is only called.

    Adapter parameters, by adapter name, in float32:
        perft_down (N, R, D), perft_up (N, D, R), and for variant `routed` perft_router (N, D).

    Args:
        block: what to wrap.
        auxiliary: the model's auxiliary losses, shared by all its layers.
    """

    adapter_layer_names = ("perft_down", "perft_up", "perft_router")
    other_param_names = (
        "perft_config",
        "norm_topk_prob",
        "num_active_experts",
        "num_layers",
        "unit_of_expert",
        "_use",
    )

    def __init__(self, block: FeedForward, auxiliary: AuxiliaryLosses) -> None:
        super().__init__()
        self.base_layer = block.module
        self.block = block
        self.auxiliary = auxiliary
        self.perft_down = nn.ParameterDict()
        self.perft_up = nn.ParameterDict()
        self.perft_router = nn.ParameterDict()
        self.perft_config: dict[str, PerftConfig] = {}
        self.norm_topk_prob: dict[str, bool] = {}
        self.num_active_experts: dict[str, int] = {}
        self.num_layers: dict[str, int] = {}
        # by device, and no buffer: that would lose what it says where a base arrives on the meta device
        self.unit_of_expert: dict[str, dict[torch.device, Tensor]] = {}
        self._use: dict[str, Tensor] = {}  # of each unit since it was last taken, where ranks move by it
        self._base_scores: Callable[[Tensor], Tensor] | None = None
        self._handles = []
        if isinstance(block, MoeBlock):
            self._handles.append(block.router.register_forward_hook(self._note_base_routing))
            if block.experts is not None and block.family.routing is None:
                self._handles.append(block.experts.register_forward_hook(self._add_to_experts, with_kwargs=True))
        self.train(self.base_layer.training)

    def update_layer(self, adapter_name: str, config: PerftConfig, num_layers: int) -> None:
        """Add an adapter of this configuration and initialise it.

        Args:
            adapter_name, config: the adapter.
            num_layers: how many blocks carry the adapter; router losses are averaged over them.
        """
        num_experts, num_active, width, unit_of_expert = VARIANTS[config.variant].sizes(config, self.block)
        device = next(self.base_layer.parameters()).device
        if config.base_router_aux_loss_coef and device.type != "meta":
            self._base_scores = base_scores(self.block)
        shape = {"dtype": torch.float32, "device": device}
        self.perft_down[adapter_name] = nn.Parameter(torch.empty(num_experts, config.num_slots, width, **shape))
        self.perft_up[adapter_name] = nn.Parameter(torch.empty(num_experts, width, config.num_slots, **shape))
        if config.variant == "routed":
            self.perft_router[adapter_name] = nn.Parameter(torch.empty(num_experts, self.block.hidden_size, **shape))
        self.perft_config[adapter_name] = config
        self.num_active_experts[adapter_name] = num_active
        if unit_of_expert is not None:
            host = torch.device("cpu")
            self.unit_of_expert[adapter_name] = {host: torch.tensor(unit_of_expert, device=host)}
            self._unit_of_expert(adapter_name, device)
        asked = config.norm_topk_prob
        self.norm_topk_prob[adapter_name] = self.block.norm_topk_prob if asked is None else asked
        self.num_layers[adapter_name] = num_layers
        self.reset_parameters(adapter_name)
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str) -> None:
        """Initialise as `config.init` says: LoRA's own (up-projections 0), or the authors' code."""
        config = self.perft_config[adapter_name]
        down_NRD, up_NDR = self.perft_down[adapter_name], self.perft_up[adapter_name]
        if config.init == "zero":
            bound = 1 / math.sqrt(down_NRD.shape[-1])
            nn.init.uniform_(down_NRD, -bound, bound)
            nn.init.zeros_(up_NDR)
        else:
            nn.init.normal_(down_NRD, std=math.sqrt(2 / config.rank))
            nn.init.normal_(up_NDR, std=_PAPER_UP_STD)
        # slots beyond the first are for ranks that move; see rank_allocation.py
        down_NRD[:, config.rank :] = 0
        up_NDR[..., config.rank :] = 0
        if config.variant == "routed":
            nn.init.normal_(self.perft_router[adapter_name], std=_ROUTER_STD)

    def adapter(self, adapter_name: str) -> BlockAdapter:
        """The adapter as its variant computes with it."""
        config = self.perft_config[adapter_name]
        units = Units(config, self.perft_down[adapter_name], self.perft_up[adapter_name], self.training)
        router_ND = self.perft_router[adapter_name] if adapter_name in self.perft_router else None
        unit_of_expert_E = self._unit_of_expert(adapter_name, units.down_NRD.device)
        norm_topk_prob = self.norm_topk_prob[adapter_name]
        return BlockAdapter(units, router_ND, norm_topk_prob, self.block.family, unit_of_expert_E)

    def _unit_of_expert(self, adapter_name: str, device: torch.device) -> Tensor | None:
        """`Sizes.unit_of_expert` as a tensor, copied to a device once."""
        copies = self.unit_of_expert.get(adapter_name)
        if copies is not None and device not in copies:
            copies[device] = copies[torch.device("cpu")].to(device)
        return None if copies is None else copies[device]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the base block and add what the active adapters compute from the same hidden states (..., D).

        Returns:
            What the base block returns, with the adapters in its (first) output.

        Raises:
            RuntimeError: this is a replica of nn.DataParallel.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "PERFT does not work under nn.DataParallel, whose replicas share the routers' hooks with the model "
                "that they copy. Launch one process per GPU (torchrun, accelerate launch), or let the trainer see one "
                "GPU (CUDA_VISIBLE_DEVICES)."
            )
        before = _base_routing.set(BaseRouting())
        try:
            output = self.base_layer(hidden_states, *args, **kwargs)
            routing = _base_routing.get()
        finally:
            _base_routing.reset(before)
        if self.disable_adapters:
            return output
        out, *rest = output if isinstance(output, tuple) else (output,)
        for adapter_name in self._active():
            out = self._adapt(adapter_name, hidden_states, out, routing)
        return (out, *rest) if isinstance(output, tuple) else out

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give the base block back as it was. Merging is refused earlier, by PerftModel."""
        for handle in self._handles:
            handle.remove()
        return self.base_layer

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.perft_down]

    def _adapt(self, adapter_name: str, hidden_states: Tensor, out: Tensor, routing: BaseRouting) -> Tensor:
        config = self.perft_config[adapter_name]
        x_TD = hidden_states.reshape(-1, self.block.hidden_size)
        addition = VARIANTS[config.variant].add_to_block(self.adapter(adapter_name), x_TD, routing)
        if self.block.family.routing is not None:
            self._note_use(adapter_name, routing)
        if addition.routing is not None and self.block.reads_text:
            note_choices(adapter_name, self.block.name, addition.routing)
        if addition.delta_TD is None:
            return self._add_router_losses(adapter_name, out, addition.routing, routing)
        # to what is added, not to the sum, to which some layers add in place (Falcon's)
        return _add(out, self._add_router_losses(adapter_name, addition.delta_TD, addition.routing, routing))

    def _add_router_losses(self, adapter_name: str, x: Tensor, own: Routing | None, base: BaseRouting) -> Tensor:
        """`x` unchanged, with the losses of the adapter's router and of the base's in its gradient."""
        auxiliary, config, layer = self.auxiliary, self.perft_config[adapter_name], self.block.name
        if auxiliary.current is None or not self.perft_down[adapter_name].requires_grad:
            return x
        padded = self.block.reads_text  # a vision tower's patches are not the batch's tokens
        losses = []
        if own is not None:
            losses.append(auxiliary.losses(adapter_name, layer, config, own, padded=padded))
        if acting_losses(config, "base_"):
            losses.append(auxiliary.losses(adapter_name, layer, config, self._scored(base), "base_", padded))
        losses = [loss for loss in losses if loss is not None]
        loss = sum(losses) / self.num_layers[adapter_name] if losses else None
        return auxiliary.add(x, loss, adapter_name, layer)

    def take_use(self, adapter_name: str) -> Tensor:
        """How much the base router let each unit act on real tokens since this was last asked: float32 (N,)."""
        down_NRD = self.perft_down[adapter_name]
        none_N = torch.zeros(len(down_NRD), dtype=torch.float32, device=down_NRD.device)
        return self._use.pop(adapter_name, none_N)

    @torch.no_grad()
    def _note_use(self, adapter_name: str, routing: BaseRouting) -> None:
        forward_pass = self.auxiliary.current
        if self.perft_config[adapter_name].rank_allocation is None or forward_pass is None:
            return
        if not (forward_pass.running and forward_pass.training and self.perft_down[adapter_name].requires_grad):
            return
        weights_TK, indices_TK = routing.weights_TK.detach().float(), routing.indices_TK
        mask_T = forward_pass.flat_mask(len(weights_TK)) if self.block.reads_text else None
        if mask_T is not None:
            weights_TK = weights_TK * mask_T.to(weights_TK.device).unsqueeze(-1)
        num_units = len(self.perft_down[adapter_name])
        unit_of_expert_E = self._unit_of_expert(adapter_name, indices_TK.device)
        if unit_of_expert_E is not None:
            indices_TK = unit_of_expert_E[indices_TK]
        use = weights_TK.new_zeros(num_units + 1).index_add(0, indices_TK.flatten(), weights_TK.flatten())[:num_units]
        self._use[adapter_name] = use + self._use.get(adapter_name, 0)

    def _scored(self, routing: BaseRouting) -> Routing:
        """What the base router decided, with the scores by which it did."""
        logits_TE = routing.logits_TE.float()
        if self._base_scores is None and not logits_TE.is_meta:  # the base was, when the adapter was added
            self._base_scores = base_scores(self.block)
        # there are no values to tell by in an estimate of memory, of which either takes as much
        scores = self._base_scores or torch.sigmoid
        return Routing(logits_TE, routing.indices_TK, scores(logits_TE))

    def _note_base_routing(self, router: nn.Module, args: tuple, output: Any) -> None:
        _base_routing.set(self.block.read_router(output))

    def _add_to_experts(self, experts: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Add what acts inside the call of the base experts, before whatever the block does next."""
        call = self.block.read_experts_call(args, kwargs, _base_routing.get())
        if self.disable_adapters or call is None:
            return output
        hidden_states, routing = call
        _base_routing.set(routing)
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        for adapter_name in self._active():
            variant = VARIANTS[self.perft_config[adapter_name].variant]
            delta_TD = variant.add_to_experts(self.adapter(adapter_name), x_TD, routing)
            self._note_use(adapter_name, routing)
            if delta_TD is not None:
                output = _add(output, delta_TD)
        return output


def _add(out: Tensor, delta_TD: Tensor) -> Tensor:
    return out + delta_TD.view(out.shape).to(out.dtype)
