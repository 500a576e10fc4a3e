"""PerftModel: attaches PERFT adapters to the MoE blocks of a model, or to its dense MLPs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..shared.auxiliary import AuxiliaryLosses
from ..shared.config import enumerate_names
from ..shared.summary import ParameterRow, parameter_row
from ..shared.tuner import Tuner
from .base_losses import BaseLosses
from .block import FeedForward
from .config import PerftConfig
from .layer import PerftLayer
from .linear import PerftLinear
from .probe import base_scores
from .rank_allocation import RankAllocation, RankAllocationCallback
from .selection import find_moe_blocks, select_blocks, select_linear_layers
from .variants import VARIANTS

if TYPE_CHECKING:
    from transformers import Trainer


class PerftModel(Tuner):
    """PERFT: routed or always-on adapters in parallel with the experts of MoE blocks (arXiv 2411.08212).

    With `target_modules: mlp` they are in parallel with the MLPs of dense layers.

    Args:
        model: a causal language model of transformers.
        config: a PerftConfig.
        adapter_name: name of the adapter.

    Attributes:
        auxiliary: the router losses' context.
        statistics: what was measured of the routers in training; `.pop()` reads the figures since the last read.

    Raises:
        ValueError: nothing in the model fits the configuration.
    """

    prefix = "perft_"
    tuner_layer_cls = BaseTunerLayer  # blocks and linear layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # a call, not `.forward` as in BaseTuner: the auxiliary losses follow the model through its hooks
        return self.model(*args, **kwargs)

    def _prepare_model(self, peft_config: PerftConfig, model: nn.Module) -> None:
        blocks = select_blocks(model, peft_config.target_modules, peft_config.layers_to_transform)
        for block in blocks:
            _check_that_it_is_there(block)
            VARIANTS[peft_config.variant].sizes(peft_config, block)
            on_meta = any(p.is_meta for p in block.module.parameters())
            if peft_config.base_router_aux_loss_coef and not on_meta:
                base_scores(block)
        names = [block.name for block in blocks]
        if strangers := set(peft_config.expert_ids or ()) - set(names):
            raise ValueError(
                f"perft.expert_ids: {enumerate_names(strangers)} is not adapted, or not in this model. The adapted "
                f"blocks are {enumerate_names(set(names))}."
            )
        self._blocks: dict[str, FeedForward] = {block.name: block for block in blocks}
        self._linear_layers = select_linear_layers(model, peft_config, blocks)
        if not hasattr(self, "auxiliary"):  # now that nothing can be refused any more
            self.auxiliary = AuxiliaryLosses(model)
            self.statistics = self.auxiliary.statistics
            self._base_losses = BaseLosses(model)

    def prepare_trainer(self, trainer: Trainer) -> None:
        """Keep a trainer from adding the base router's loss beside the adapter's, and have ranks move in it.

        Raises:
            ValueError: ranks cannot move in it, or its arguments ask for the base router's loss.
        """
        configs = {name: self.peft_config[name] for name in self.active_adapters}
        coefs = {name: config.base_router_aux_loss_coef for name, config in configs.items()}
        self._base_losses.prepare_trainer(trainer, coefs)
        for name, config in configs.items():
            if config.rank_allocation:
                self._let_ranks_move(trainer, name, config)

    def _let_ranks_move(self, trainer: Trainer, adapter_name: str, config: PerftConfig) -> None:
        callbacks = trainer.callback_handler.callbacks
        for there in (callback for callback in callbacks if isinstance(callback, RankAllocationCallback)):
            if there.allocation.adapter_name != adapter_name:
                raise ValueError(
                    "perft.rank_allocation: this trainer moves the ranks of adapter "
                    f"{there.allocation.adapter_name!r}; train {adapter_name!r} with another one."
                )
            return
        if trainer.is_deepspeed_enabled:
            raise ValueError("perft.rank_allocation does not go with DeepSpeed, whose optimiser holds flat copies.")
        if trainer.args.fp16 and config.rank_allocation["score"] == "saliency":
            raise ValueError(
                "perft.rank_allocation.score: saliency reads gradients, which fp16 scales by a factor that changes. "
                "Use bf16, or score: gate."
            )
        allocation = self.rank_allocation(adapter_name)
        reduce = partial(trainer.accelerator.reduce, reduction="sum")
        callback = RankAllocationCallback(allocation, reduce, trainer.state)
        trainer.add_callback(callback)
        # as the trainer notes for those that it has from the start
        trainer.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())

    def rank_allocation(self, adapter_name: str = "default") -> RankAllocation:
        """What moves an adapter's ranks in a training loop of one's own; Trainers are served without."""
        layers = [m for m in self.model.modules() if isinstance(m, PerftLayer) and adapter_name in m.perft_down]
        return RankAllocation(layers, adapter_name)

    def _check_target_module_exists(self, peft_config: PerftConfig, key: str) -> bool:
        return key in self._blocks or key in self._linear_layers

    def _create_and_replace(
        self,
        peft_config: PerftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if current_key in self._linear_layers:
            if not isinstance(target, PerftLinear):
                layer = PerftLinear(target)
                self._replace_module(parent, target_name, layer, target)
            layer.update_layer(adapter_name, peft_config)
            return
        block = self._blocks[current_key]
        if not isinstance(target, PerftLayer):
            layer = PerftLayer(block, self.auxiliary)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config, len(self._blocks))

    @property
    def adapted_layers(self) -> list[int]:
        """Indices of the decoder layers with an adapter."""
        return [layer.block.layer_index for layer in self.model.modules() if isinstance(layer, PerftLayer)]

    @property
    def blocks_left_alone(self) -> list[str]:
        """Names of MoE blocks without an adapter, such as those of a vision tower; `target_modules` can name them."""
        adapted = {layer.block.name for layer in self.model.modules() if isinstance(layer, PerftLayer)}
        return [block.name for block in find_moe_blocks(self.model) if block.name not in adapted]

    def parameter_rows(self, adapter_name: str = "default") -> list[ParameterRow]:
        """What is trainable in the model, by part: the adapter's own parameters, and anything else (nothing)."""
        experts, routers, linear, activated = [], [], [], 0
        for layer in self.model.modules():
            if isinstance(layer, PerftLinear) and adapter_name in layer.perft_config:
                linear += [layer.perft_linear_down[adapter_name], layer.perft_linear_up[adapter_name]]
            if isinstance(layer, PerftLayer) and adapter_name in layer.perft_down:
                down_NRD, up_NDR = layer.perft_down[adapter_name], layer.perft_up[adapter_name]
                experts += [down_NRD, up_NDR]
                per_expert = (down_NRD.numel() + up_NDR.numel()) // len(down_NRD)
                activated += per_expert * layer.num_active_experts[adapter_name]
                routers += [layer.perft_router[adapter_name]] if adapter_name in layer.perft_router else []
        return [
            parameter_row("experts", experts, activated),
            parameter_row("router", routers),
            *([parameter_row("linear", linear)] if linear else []),
            self.row_of_others(adapter_name),
        ]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # BaseTuner's version copies `weight`, which an MoE block does not have
        setattr(parent, child_name, new_module)

    def unload(self) -> nn.Module:
        """Return the base model without any adapter or hook of ours."""
        self.auxiliary.detach()
        self._base_losses.restore()
        return super().unload()


def _check_that_it_is_there(block: FeedForward) -> None:
    """Refuse a block whose weights accelerate keeps elsewhere; on the meta device alone they are still to come."""
    offloaded = any(hasattr(module, "_hf_hook") for module in block.module.modules())
    if offloaded and any(parameter.is_meta for parameter in block.module.parameters()):
        raise ValueError(
            f"perft: {block.name} is offloaded (`device_map` puts it on the CPU or the disk), and an "
            "adapter beside it has no device of its own. Load the base model without offloading, such as quantised "
            "or over several GPUs, or leave such layers out with `layers_to_transform`."
        )
