"""PTMoeLayer: prompt experts and their router, and how the prompt of a sequence is mixed from them.

Shape suffixes: Q sequences (rows, or the segments of packed rows), T virtual tokens, N experts, K experts per
sequence, R rank, D width of the embeddings, B rows, S their length.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..shared.auxiliary import AuxiliaryLosses
from ..shared.batches import Sequences
from ..shared.choices import note_choices
from ..shared.precision import without_autocast
from ..shared.routing import Routing, router_logits, top_k_routing
from .config import PTMoeConfig

_ROUTER_STD = 0.02
# A centred router input has this length, and its router this start: logits of about 1, as different for unlike prompts
# as can be, so that the experts part from the first step on; and at a prompt's learning rate, 0.1 with Adam, they move
# by about 1 a step and not by 10.
_CENTERED_LENGTH, _CENTERED_ROUTER_STD = 0.5, 2.0
# Prompts from which on the mean that is subtracted stays as it is.
MEAN_OF = 256
# Singular values below this share of the largest are rounding errors of zeros.
_RANK_TOLERANCE = 1e-6


class PTMoeLayer(nn.Module, BaseTunerLayer):
    """The prompt experts and their router. It is never called: PromptInsertion asks it for prompts.

    Adapter parameters, by adapter name, in float32: ptmoe_experts (N, T, R) and ptmoe_shared (R, D), or without rank
    ptmoe_experts (N, T, D); with more than one expert ptmoe_router_weight (N, D) and ptmoe_router_bias (N,), and where
    the router's input is centred ptmoe_router_mean (D,) and ptmoe_router_mean_count (1,), which are measured and not
    trained.

    Args:
        auxiliary: the model's auxiliary losses.
    """

    adapter_layer_names = ("ptmoe_experts", "ptmoe_shared", "ptmoe_router_weight", "ptmoe_router_bias")
    other_param_names = ("ptmoe_router_mean", "ptmoe_router_mean_count", "ptmoe_config")

    def __init__(self, auxiliary: AuxiliaryLosses) -> None:
        super().__init__()
        self.auxiliary = auxiliary
        self.ptmoe_experts = nn.ParameterDict()
        self.ptmoe_shared = nn.ParameterDict()
        self.ptmoe_router_weight = nn.ParameterDict()
        self.ptmoe_router_bias = nn.ParameterDict()
        # parameters, as FSDP2 brings no buffers to the other processes
        self.ptmoe_router_mean = nn.ParameterDict()
        self.ptmoe_router_mean_count = nn.ParameterDict()
        self.ptmoe_config: dict[str, PTMoeConfig] = {}
        # what adapters that could not start from their text start from, until they are loaded
        self.without_text: dict[str, nn.Parameter] = {}
        self._device: torch.device | None = None
        self._calls_to_measure: dict[str, int] = {}  # by adapter, once its training has begun

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
        if config.center_router_input:
            mean_D, count = torch.zeros(hidden_size, **shape), torch.zeros(1, **shape)
            self.ptmoe_router_mean[adapter_name] = nn.Parameter(mean_D, requires_grad=False)
            self.ptmoe_router_mean_count[adapter_name] = nn.Parameter(count, requires_grad=False)
        self._calls_to_measure.pop(adapter_name, None)
        self.ptmoe_config[adapter_name] = config
        self.without_text.pop(adapter_name, None)
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
            std = _CENTERED_ROUTER_STD if config.center_router_input else _ROUTER_STD
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
            nn.init.zeros_(self.ptmoe_router_bias[adapter_name])

    def prompts(self, adapter_name: str, sequences: Sequences, embeds_BSD: Tensor, learns: bool) -> Tensor:
        """The prompt of each sequence, chosen by the mean embedding of what its router may read.

        Args:
            adapter_name: whose prompts.
            sequences: of the batch.
            embeds_BSD: the batch's embeddings.
            learns: whether the router learns from this call: with noise on its logits, its loss and its statistics.

        Returns:
            (Q, T, D) in the dtype of the embeddings.
        """
        config = self.ptmoe_config[adapter_name]
        with without_autocast(embeds_BSD.device):
            experts_NTR = self.ptmoe_experts[adapter_name].float()
            loss = None
            if config.num_experts == 1:
                mixed_QTR = experts_NTR.expand(sequences.count, -1, -1)
            else:
                weights_QN, loss = self._route(adapter_name, sequences.prompt_mean(embeds_BSD.detach()), learns)
                # all experts take part, the unchosen with weight 0: DDP waits for every gradient
                mixed_QTR = (weights_QN @ experts_NTR.flatten(1)).unflatten(1, experts_NTR.shape[1:])
            prompts_QTD = mixed_QTR
            if adapter_name in self.ptmoe_shared:
                # as one matrix: a trainable factor and a frozen one then take the same product, bit by bit
                rows = mixed_QTR.flatten(0, 1) @ self.ptmoe_shared[adapter_name].float()
                prompts_QTD = rows.unflatten(0, mixed_QTR.shape[:2])
        return self.auxiliary.add(prompts_QTD.to(embeds_BSD.dtype), loss, adapter_name, "prompt")

    def _route(self, adapter_name: str, x_QD: Tensor, learns: bool) -> tuple[Tensor, Tensor | None]:
        """Each expert's weight, (Q, N), K of them not 0; and the router loss if there is one."""
        config = self.ptmoe_config[adapter_name]
        if config.center_router_input:
            x_QD = self._center(adapter_name, x_QD, learns)
        logits_QN = router_logits(x_QD, self.ptmoe_router_weight[adapter_name], self.ptmoe_router_bias[adapter_name])
        if learns and config.router_noise_std:
            logits_QN = logits_QN * (1 + config.router_noise_std * torch.randn_like(logits_QN))
        weights_QK, indices_QK = top_k_routing(logits_QN, config.top_k, norm_topk_prob=False)
        if not config.scale_by_router_prob:
            weights_QK = 0 * weights_QK + 1
        weights_QN = torch.zeros_like(logits_QN).scatter(1, indices_QK, weights_QK)
        # of a mixture of all, what is counted is the expert with the largest share
        loss, routing = None, Routing(logits_QN, indices_QK[:, :1] if config.takes_all_experts else indices_QK)
        note_choices(adapter_name, None, routing)
        if self.ptmoe_experts[adapter_name].requires_grad:
            loss = self.auxiliary.losses(adapter_name, "prompt", config, routing, padded=False)
        return weights_QN, loss

    def _center(self, adapter_name: str, x_QD: Tensor, learns: bool) -> Tensor:
        """Each sequence's input less what all have in common, at a fixed length."""
        if learns and torch.is_grad_enabled() and self.ptmoe_router_weight[adapter_name].requires_grad:
            self._measure_on_the_way(adapter_name, x_QD)
        centered_QD = x_QD - self.ptmoe_router_mean[adapter_name]
        return _CENTERED_LENGTH * F.normalize(centered_QD, dim=-1)

    @torch.no_grad()
    def set_router_mean(self, adapter_name: str, mean_D: Tensor) -> None:
        """Take this for what all router inputs have in common, for good."""
        self.ptmoe_router_mean[adapter_name].copy_(mean_D)
        self.ptmoe_router_mean_count[adapter_name].fill_(MEAN_OF)

    def _measure_on_the_way(self, adapter_name: str, x_QD: Tensor) -> None:
        """Let the first prompts of training, in all processes, be part of the mean."""
        if adapter_name not in self._calls_to_measure:
            missing = MEAN_OF - int(self.ptmoe_router_mean_count[adapter_name])
            self._calls_to_measure[adapter_name] = missing
            if missing > 0 and self.auxiliary.is_sharded:
                raise RuntimeError(
                    "pt_moe: what prompts have in common cannot be measured in a model that FSDP has sharded. Call "
                    "`model.base_model.measure_on(batches)` before it is, or set center_router_input: false."
                )
        if self._calls_to_measure[adapter_name] > 0:
            self._calls_to_measure[adapter_name] -= 1  # every call has a prompt
            self._add_to_mean(adapter_name, x_QD)

    @torch.no_grad()
    def _add_to_mean(self, adapter_name: str, x_QD: Tensor) -> None:
        """Make these sequences' inputs part of the mean unless it is complete; every process must call."""
        mean_D, count = self.ptmoe_router_mean[adapter_name], self.ptmoe_router_mean_count[adapter_name]
        added = torch.cat([x_QD.sum(0), x_QD.new_full((1,), len(x_QD))])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(added)
        is_open, new_count = count < MEAN_OF, count + added[-1]
        new_mean_D = mean_D + (added[:-1] - added[-1] * mean_D) / new_count.clamp(min=1)
        mean_D.copy_(torch.where(is_open, new_mean_D, mean_D))
        count.copy_(torch.where(is_open, new_count, count))

    def active_adapter_name(self) -> str | None:
        """The adapter whose prompts are inserted; None if there is none.

        Raises:
            ValueError: several are active.
        """
        names = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.ptmoe_experts]
        if len(names) > 1:
            raise ValueError(f"pt_moe: one prompt at a time; {', '.join(names)} are active.")
        return names[0] if names else None

    def check_initial_text(self, adapter_name: str) -> None:
        """Only now is it known that an adapter was not loaded, which needs no tokenizer."""
        # transformers' loader puts another parameter in its place, PEFT's fills it and comes by here
        if self.without_text.get(adapter_name) is not self.ptmoe_experts[adapter_name]:
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
        del self.without_text[adapter_name]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        # there is no base layer; PEFT asks where an adapter that was made on the meta device goes
        return self._device, None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self.ptmoe_experts:
            if f"{prefix}ptmoe_experts.{name}" in state_dict:
                self.without_text.pop(name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
