"""PerftLayer: an MoE block with adapters in parallel with its experts.

Shape suffixes: T tokens (batch and sequence flattened), D model width, N adapters, K adapters per token, S = T * K
slots (see dispatch.py), R rank. E, k: the base block's experts and experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..shared.auxiliary import AuxiliaryLosses, ForwardPass, add_auxiliary_loss
from ..shared.routing import expert_counts, load_balancing_loss, router_z_loss, top_k_routing
from ..shared.tuner import TunerLayer, compute_dtype
from .config import PerftConfig
from .dispatch import dispatch, gather_mm, pad_rank, scatter_mm
from .moe_blocks import MoeBlock
from .moe_families import BaseRouting

# The authors leave the routers at transformers' `initializer_range`, and zero the up-projections almost.
_ROUTER_STD = 0.02
_PAPER_UP_STD = 1e-6


class PerftLayer(nn.Module, TunerLayer):
    """Wraps an MoE block; its base router and experts stay as they are and are only called.

    Adapter parameters, by adapter name, in float32:
        perft_down (N, R, D), perft_up (N, D, R), and for variant `routed` perft_router (N, D).

    Args:
        block: the MoE block to wrap.
        hidden_size: D.
        auxiliary: the model's auxiliary losses, shared by all its layers.
    """

    adapter_layer_names = ("perft_down", "perft_up", "perft_router")
    other_param_names = ("perft_config", "norm_topk_prob", "num_active_experts", "num_layers")

    def __init__(self, block: MoeBlock, hidden_size: int, auxiliary: AuxiliaryLosses) -> None:
        super().__init__()
        self.base_layer = block.module
        self.block = block
        self.hidden_size = hidden_size
        self.auxiliary = auxiliary
        self.perft_down = nn.ParameterDict()
        self.perft_up = nn.ParameterDict()
        self.perft_router = nn.ParameterDict()
        self.perft_config: dict[str, PerftConfig] = {}
        self.norm_topk_prob: dict[str, bool] = {}
        self.num_active_experts: dict[str, int] = {}
        self.num_layers: dict[str, int] = {}
        self._base_routing = BaseRouting()
        self._base_scores: Callable[[Tensor], Tensor] | None = None
        self._handles = [block.router.register_forward_hook(self._note_base_routing)]
        if block.family.routing is None:
            self._handles.append(block.experts.register_forward_hook(self._add_embedded, with_kwargs=True))
        self.train(self.base_layer.training)

    def update_layer(self, adapter_name: str, config: PerftConfig, base_norm_topk_prob: bool, num_layers: int) -> None:
        """Add an adapter of this configuration and initialise it.

        Args:
            adapter_name, config: the adapter.
            base_norm_topk_prob: whether the base router's weights sum to one.
            num_layers: how many blocks carry the adapter; router losses are averaged over them.
        """
        width = self.hidden_size
        if config.variant == "embedded":
            num_experts, num_active, width = self.block.embedded_sizes(self.hidden_size)
        else:
            num_experts = config.num_experts or 1
            num_active = config.num_experts_per_tok or num_experts
        device = next(self.base_layer.parameters()).device
        if config.base_router_aux_loss_coef and device.type != "meta":
            self._base_scores = self.block.base_scores(self.hidden_size)
        shape = {"dtype": torch.float32, "device": device}
        self.perft_down[adapter_name] = nn.Parameter(torch.empty(num_experts, config.rank, width, **shape))
        self.perft_up[adapter_name] = nn.Parameter(torch.empty(num_experts, width, config.rank, **shape))
        if config.variant == "routed":
            self.perft_router[adapter_name] = nn.Parameter(torch.empty(num_experts, self.hidden_size, **shape))
        self.perft_config[adapter_name] = config
        self.num_active_experts[adapter_name] = num_active
        norm_topk_prob = base_norm_topk_prob if config.norm_topk_prob is None else config.norm_topk_prob
        self.norm_topk_prob[adapter_name] = norm_topk_prob
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
        if config.variant == "routed":
            nn.init.normal_(self.perft_router[adapter_name], std=_ROUTER_STD)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the base block and add what the active adapters compute from the same hidden states (..., D).

        Returns:
            What the base block returns, with the adapters in its (first) output.
        """
        output = self.base_layer(hidden_states, *args, **kwargs)
        routing, self._base_routing = self._base_routing, BaseRouting()
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
        x_TD = hidden_states.reshape(-1, self.hidden_size)
        forward_pass = self.auxiliary.current if self.training else None
        losses = []
        if config.variant == "routed":
            logits_TN = self._router_logits(adapter_name, x_TD)
            weights_TK, indices_TK = top_k_routing(
                logits_TN, config.num_experts_per_tok, self.norm_topk_prob[adapter_name]
            )
            if forward_pass is not None:
                losses += self._router_losses(config, forward_pass, logits_TN, indices_TK)
            if config.gate_weights == "base":
                # 0 *: the own router stays in the graph, as DDP demands, with the gradient 0 of the authors' code
                ranked_TK = routing.weights_TK.sort(dim=-1, descending=True).values
                weights_TK = ranked_TK[:, : config.num_experts_per_tok] + 0 * weights_TK
            out = out + self._routed_units(adapter_name, x_TD, weights_TK, indices_TK).view(out.shape).to(out.dtype)
        elif config.variant == "embedded" and self.block.family.routing is not None:
            delta_TD = self._routed_units(
                adapter_name, x_TD, routing.weights_TK, routing.indices_TK, self.block.family.weights_scale_inputs
            )
            out = out + delta_TD.view(out.shape).to(out.dtype)
        elif config.variant != "embedded":
            out = out + self._dense_units(adapter_name, x_TD).view(out.shape).to(out.dtype)
        if forward_pass is not None and config.base_router_aux_loss_coef:
            losses.append(self._base_router_loss(config, forward_pass, routing))
        if losses:
            out = add_auxiliary_loss(out, sum(losses) / self.num_layers[adapter_name], forward_pass)
        return out

    def _router_logits(self, adapter_name: str, x_TD: Tensor) -> Tensor:
        # float32 throughout: in bf16 a router at the usual learning rates hardly moves, and near ties flip
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.perft_router[adapter_name].float())

    def _router_losses(
        self, config: PerftConfig, forward_pass: ForwardPass, logits_TN: Tensor, indices_TK: Tensor
    ) -> list[Tensor]:
        mask_T = _flat_mask(forward_pass, len(logits_TN))
        statistics = self.auxiliary.statistics if forward_pass.running else None
        if statistics is not None:
            statistics.record_usage(self.block.name, expert_counts(indices_TK, config.num_experts, mask_T))
        losses = []
        if config.router_aux_loss_coef:
            loss = load_balancing_loss([logits_TN], config.num_experts_per_tok, mask_T)
            losses.append(_weigh(loss, config.router_aux_loss_coef, "router_aux_loss", statistics))
        if config.router_z_loss_coef:
            loss = router_z_loss(logits_TN, mask_T)
            losses.append(_weigh(loss, config.router_z_loss_coef, "router_z_loss", statistics))
        return losses

    def _base_router_loss(self, config: PerftConfig, forward_pass: ForwardPass, routing: BaseRouting) -> Tensor:
        if self._base_scores is None:  # the base was on the meta device when the adapter was added
            self._base_scores = self.block.base_scores(self.hidden_size)
        scores_TE = self._base_scores(routing.logits_TE.float())
        loss = _base_balance_loss(scores_TE, routing.indices_TK, _flat_mask(forward_pass, len(scores_TE)))
        statistics = self.auxiliary.statistics if forward_pass.running else None
        return _weigh(loss, config.base_router_aux_loss_coef, "base_router_aux_loss", statistics)

    def _routed_units(
        self,
        adapter_name: str,
        x_TD: Tensor,
        weights_TK: Tensor,
        indices_TK: Tensor,
        weights_scale_inputs: bool = False,
    ) -> Tensor:
        """Sum over each token's K adapters of weight * unit(x), or of unit(weight * x): (T, D)."""
        config, dtype = self.perft_config[adapter_name], compute_dtype(x_TD)
        down_NRD = pad_rank(self.perft_down[adapter_name].to(dtype))
        up_NRD = pad_rank(self.perft_up[adapter_name].to(dtype).transpose(1, 2))
        slots = dispatch(indices_TK, len(down_NRD))
        x, x_slots = x_TD.to(dtype), slots
        if self._drops_input(config):
            x = F.dropout(x[slots.token_S], config.dropout)  # each unit has its own mask
            in_order = torch.arange(len(x), device=x.device)
            x_slots = slots._replace(token_S=in_order, order_S=in_order)
        z_SR = gather_mm(x, down_NRD, x_slots)
        weights_S1 = weights_TK.flatten()[slots.order_S].unsqueeze(-1).to(dtype)
        if weights_scale_inputs:
            z_SR = self._bottleneck(config, z_SR * weights_S1)
        else:
            z_SR = self._bottleneck(config, z_SR) * weights_S1
        return scatter_mm(z_SR, up_NRD, slots, len(x_TD))

    def _dense_units(self, adapter_name: str, x_TD: Tensor) -> Tensor:
        """Sum over all N adapters of unit(x): (T, D)."""
        config, dtype = self.perft_config[adapter_name], compute_dtype(x_TD)
        down_NRD, up_NDR = self.perft_down[adapter_name].to(dtype), self.perft_up[adapter_name].to(dtype)
        x_TD = x_TD.to(dtype)
        if self._drops_input(config):
            x_NTD = F.dropout(x_TD.expand(len(down_NRD), *x_TD.shape), config.dropout)
            z_NTR = self._bottleneck(config, x_NTD @ down_NRD.transpose(1, 2))
            return (z_NTR @ up_NDR.transpose(1, 2)).sum(0)
        # the units' bottlenecks side by side are one bottleneck of width N * R
        z = self._bottleneck(config, F.linear(x_TD, down_NRD.flatten(0, 1)))
        return F.linear(z, up_NDR.transpose(0, 1).flatten(1))

    def _drops_input(self, config: PerftConfig) -> bool:
        return self.training and config.dropout > 0 and config.expert_type == "lora"

    def _bottleneck(self, config: PerftConfig, z: Tensor) -> Tensor:
        if config.expert_type == "lora":
            return z * (config.alpha / config.rank)
        return ACT2FN[config.hidden_act](F.dropout(z, config.dropout, self.training))

    def _note_base_routing(self, router: nn.Module, args: tuple, output: Any) -> None:
        self._base_routing = self.block.read_router(output)

    def _add_embedded(self, experts: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Add the embedded adapters inside the call of the base experts, before whatever the block does next."""
        call = self.block.read_experts_call(args, kwargs, self._base_routing)
        if self.disable_adapters or call is None:
            return output
        hidden_states, self._base_routing = call
        for adapter_name in self._active():
            if self.perft_config[adapter_name].variant == "embedded":
                x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
                _, weights_TK, indices_TK = call.routing
                delta_TD = self._routed_units(adapter_name, x_TD, weights_TK, indices_TK)
                output = output + delta_TD.view(output.shape).to(output.dtype)
        return output


def _base_balance_loss(scores_TE: Tensor, indices_TK: Tensor, mask_T: Tensor | None) -> Tensor:
    """E * sum_e f_e p_e with the experts that the base router chose, however it did, and its scores made to sum to 1.

    Switch Transformer, eq. 4, for a softmax; DeepSeek-V3, eq. 17 to 20 (times k), for a sigmoid with or without groups
    and a correction bias, over the whole batch.
    """
    num_tokens, num_experts = scores_TE.shape
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    mask_T = probs_TE.new_ones(num_tokens) if mask_T is None else mask_T.to(probs_TE.dtype)
    counts_E = expert_counts(indices_TK, num_experts, mask_T)
    return num_experts * (counts_E @ (mask_T @ probs_TE)) / mask_T.sum().clamp(min=1) ** 2


def _flat_mask(forward_pass: ForwardPass, num_tokens: int) -> Tensor | None:
    mask = forward_pass.token_mask
    if mask is not None and mask.numel() != num_tokens:
        raise RuntimeError(
            f"the router of an adapter sees {num_tokens} tokens, the model's batch has {mask.numel()}: router losses "
            "do not work where a sequence is split inside the model (context or sequence parallelism)."
        )
    return None if mask is None else mask.flatten()


def _weigh(loss: Tensor, coef: float, name: str, statistics: Any) -> Tensor:
    if statistics is not None:
        statistics.record(name, loss)
    return coef * loss
