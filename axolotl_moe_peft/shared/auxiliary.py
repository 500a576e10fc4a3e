"""Router losses that live inside the layers.

A router loss cannot simply be added to `outputs.loss`: under reentrant gradient checkpointing (a default of Axolotl
0.19) the logits of the forward pass have no graph, and a plain Trainer or TRL would not know about it. So its gradient
enters where the logits are computed: `add_auxiliary_loss` is the identity on a tensor of the layer, and its backward
hands the loss the gradient that it would have had as a summand of the main loss.

Where the model computes the main loss, that gradient is what arrives at `outputs.loss` in backward (1 /
gradient_accumulation_steps, the fp16 scaler's factor, ...). A tensor hook on the loss reads it, and runs before the
backward of any layer of that forward pass, so that layers which checkpointing recomputes in backward also find the
token mask and the scale of their own pass. Where a trainer computes the loss, from logits or from hidden states, no
tensor of the model has it: the gradients that arrive there are the loss's derivatives, whose scale says nothing. There
the trainer's step tells (trainer_step.py), and in a training loop of one's own `AuxiliaryLosses.follow`.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .batches import IGNORE_INDEX, predicts_tokens, real_token_mask
from .global_batch import GlobalBatch
from .routing import ROUTER_LOSSES, Routing, acting_losses, expert_counts
from .statistics import RouterStatistics
from .trainer_step import TrainerStep, current_step, labels_of, padding_mask_of, watch_trainers

_UNKNOWN_SCALE = (
    "the router losses of an adapter act, but the loss is computed outside the model and outside a Trainer, where "
    "their scale cannot be known. Before each backward call `model.base_model.auxiliary.follow(loss)` with the loss "
    "as it is before it is divided by accumulation steps or scaled, or set the adapter's coefficients "
    "(`router_aux_loss_coef`, `router_z_loss_coef`, `base_router_aux_loss_coef`) to 0."
)
_NO_SCALE_IN_EVALUATION = (
    "gradients flow through a model in evaluation mode from something that is not the model's own loss; the router "
    "losses of its adapter have no part in them. To train so, call `model.base_model.auxiliary.follow(loss)`."
)


@dataclass(eq=False)
class ForwardPass:
    """What the layers need to know about one forward pass of the model with gradients.

    Attributes:
        token_mask: bool (B, S), true for real tokens; None counts every token.
        share: the micro-batch's share of the accumulated batch where the model divides its loss by the number of
            tokens of all its micro-batches (`num_items_in_batch`), else 1.
        scale: gradient of the objective with respect to this pass's auxiliary losses, read off the loss in backward;
            None where the model's loss has no part in it.
        step: the trainer's step that the pass belongs to, which knows the scale otherwise.
        training: whether the model is in training mode.
        module: the module whose call it is; None once it has returned: layers called later are recomputed by
            checkpointing.
        runs: how often each adapter's layers have run in it; a layer's loss is the mean over its runs.
        loads: of each router, the choices per token of every expert in the global batch so far, (N,), if it is asked
            for; layers that checkpointing recomputes find it as it was.
    """

    token_mask: Tensor | None = None
    share: Tensor | float = 1.0
    scale: Tensor | float | None = None
    step: TrainerStep | None = None
    training: bool = True
    module: nn.Module | None = None
    runs: Counter[Hashable] = field(default_factory=Counter)
    loads: dict[Hashable, Tensor] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        return self.module is not None

    def flat_mask(self, num_tokens: int) -> Tensor | None:
        """The mask as (B * S,), for a router that sees this many tokens."""
        mask = self.token_mask
        if mask is not None and mask.numel() != num_tokens:
            raise RuntimeError(
                f"the router of an adapter sees {num_tokens} tokens, the model's batch has {mask.numel()}: router "
                "losses do not work where a sequence is split inside the model (context or sequence parallelism)."
            )
        return None if mask is None else mask.flatten()

    def find_scale(self) -> Tensor | float:
        """The scale, once backward has come to the pass's layers."""
        if self.scale is None and self.step is not None:
            self.scale = self.step.loss_scale()
        if self.scale is None:
            if self.training:
                raise RuntimeError(_UNKNOWN_SCALE)
            warnings.warn(_NO_SCALE_IN_EVALUATION, stacklevel=3)
            self.scale = 0.0
        return self.scale


class _AddAuxiliaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, forward_pass: ForwardPass, layer: Hashable) -> Tensor:
        ctx.forward_pass, ctx.layer, ctx.dtype, ctx.device = forward_pass, layer, loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor, None, None]:
        scale, of_loss = ctx.forward_pass.find_scale(), {"dtype": ctx.dtype, "device": ctx.device}
        # a number that is copied to an accelerator is waited for, one that it is filled with is not
        scale = scale.to(**of_loss) if isinstance(scale, Tensor) else torch.full((), scale, **of_loss)
        return grad_x, scale / max(ctx.forward_pass.runs[ctx.layer], 1), None, None


def add_auxiliary_loss(x: Tensor, loss: Tensor, forward_pass: ForwardPass, layer: Hashable = None) -> Tensor:
    """Return `x` unchanged; in backward, `loss` (0-dim) receives `forward_pass.scale` as its gradient.

    `x` must be on the way to the main loss, or backward never comes by. Of a layer that runs several times in a pass
    each run's loss has its part of the gradient.
    """
    return _AddAuxiliaryLoss.apply(x, loss, forward_pass, layer)


class AuxiliaryLosses:
    """Follows a model's forward passes on behalf of the adapter layers that share this object.

    Args:
        model: the model that is called.

    Attributes:
        current: the pass that runs, or whose backward runs; None without gradients.
        statistics: what the layers recorded of the passes in training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        watch_trainers()
        self._model = model
        self.current: ForwardPass | None = None
        self.statistics = RouterStatistics()
        self._unread: WeakSet[ForwardPass] = WeakSet()  # passes whose scale nobody has read yet
        self._global_batch = GlobalBatch()
        self._handles = []
        for module in _callable_parts(model):
            self._handles += [
                module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                module.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            ]

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model is in no pass
        return vars(self) | {"current": None, "_unread": None, "_global_batch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_unread": WeakSet(), "_global_batch": GlobalBatch()})

    @property
    def is_sharded(self) -> bool:
        """Whether processes have parts of the model's parameters each, so that none can write to a whole one."""
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # a second, for those who ask

        by_fsdp = any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in self._model.modules())
        return by_fsdp or any(hasattr(p, "ds_id") for p in self._model.parameters())  # DeepSpeed's ZeRO-3

    def detach(self) -> None:
        """Stop following the model."""
        for handle in self._handles:
            handle.remove()

    def follow(self, loss: Tensor) -> None:
        """Take the scale of the router losses from a main loss that was computed outside the model.

        For a training loop of one's own; Trainers are known. Call it between forward and backward.

        Args:
            loss: 0-dim, the mean over the batch that the model was last called with (since the last call of this
                method), as it is before it is divided by accumulation steps or scaled.
        """
        passes = list(self._unread)
        self._unread.clear()

        def read_scale(gradient: Tensor) -> None:
            for forward_pass in passes:
                forward_pass.scale = gradient

        loss.register_hook(read_scale)

    def losses(
        self,
        adapter_name: str,
        layer: str,
        config: Any,
        routing: Routing,
        prefix: str = "",
        padded: bool = True,
    ) -> Tensor | None:
        """The sum of a router's losses times their coefficients, 0-dim float32; None if there are none.

        What is to be logged is recorded on the way: the losses, and which experts the adapter's own router chose.

        Args:
            adapter_name: whose router, or whose configuration tells of the base's router.
            layer: name of the layer that the router belongs to.
            config: the adapter's config, with the coefficients.
            routing: what the router decided.
            prefix: `base_` for the base model's router.
            padded: whether that was for all tokens of the pass, padding among them, or for what is real only.
        """
        forward_pass = self.current
        if forward_pass is None:
            return None
        mask_T = forward_pass.flat_mask(len(routing.logits_TN)) if padded else None
        if mask_T is not None:
            mask_T = mask_T.to(routing.logits_TN.device)  # `device_map` puts layers on other devices than the batch
        figures = self.statistics.of(adapter_name) if forward_pass.running and forward_pass.training else None
        if figures is not None and not prefix:
            figures.record_usage(layer, expert_counts(routing.indices_TK, routing.logits_TN.shape[-1], mask_T))
        count = float(len(routing.logits_TN) > 0) if mask_T is None else mask_T.any()
        total, coefs = None, acting_losses(config, prefix)
        if "router_aux_loss" in coefs and forward_pass.training and config.router_aux_loss_scope == "global_batch":
            key = (adapter_name, prefix, layer)
            if forward_pass.running:
                forward_pass.loads[key] = self._global_batch.load(key, forward_pass.step, routing, mask_T)
            routing = replace(routing, load_N=forward_pass.loads[key])
        for name, coef in coefs.items():
            loss = ROUTER_LOSSES[name](routing, mask_T)
            if figures is not None:
                figures.record(prefix + name, layer, loss, count)
            total = coef * loss if total is None else total + coef * loss
        return total

    def add(self, x: Tensor, loss: Tensor | None, adapter_name: str, layer: str) -> Tensor:
        """Return `x` of a layer unchanged, with an adapter's `loss` in its gradient if there is one."""
        forward_pass = self.current
        if loss is None or forward_pass is None:
            return x
        forward_pass.runs[adapter_name, layer] += forward_pass.running
        return add_auxiliary_loss(x, loss, forward_pass, (adapter_name, layer))

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # RL trainers generate, and score, in training mode
            self.current = None
            return
        if module is not self._model and self.current is not None and self.current.running:
            return  # a part of the model, in the model's own call
        batch = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
        self.current = ForwardPass(
            token_mask=real_token_mask(
                batch.get("input_ids"), padding_mask_of(batch), batch.get("position_ids"), labels_of(batch)
            ),
            share=share_of_accumulated_batch(batch, module),
            step=current_step(),
            training=module.training,
            module=module,
        )
        self._unread.add(self.current)

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        forward_pass = self.current
        if forward_pass is None or forward_pass.module is not module:
            return
        forward_pass.module = None
        if output is None:  # an exception is on its way
            return
        if isinstance(output, tuple):  # return_dict=False
            output = dict(zip(("loss", "logits") if kwargs.get("labels") is not None else ("logits",), output))
        for name, part in output.items():
            for tensor in part if isinstance(part, tuple) else (part,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(partial(self._enter_backward, forward_pass, is_loss=name == "loss"))

    def _enter_backward(self, forward_pass: ForwardPass, gradient: Tensor, is_loss: bool) -> None:
        self.current = forward_pass
        if is_loss:
            forward_pass.scale = gradient * forward_pass.share


def share_of_accumulated_batch(batch: dict[str, Any], model: nn.Module) -> Tensor | float:
    """The factor of the mean over a batch in the loss that a model computes: what `num_items_in_batch` makes of it.

    Models for causal language modelling divide by that number; the others of transformers take no notice of it.
    """
    num_items, labels = batch.get("num_items_in_batch"), batch.get("labels")
    if num_items is None or labels is None or not predicts_tokens(model):
        return 1.0
    labels = batch["shift_labels"] if batch.get("shift_labels") is not None else labels[..., 1:]
    return (labels != IGNORE_INDEX).sum() / num_items


def _callable_parts(model: nn.Module) -> list[nn.Module]:
    """The model, and its decoder, which losses that read hidden states call past it."""
    parts = [model, getattr(model, "base_model", None), getattr(model, "get_decoder", lambda: None)()]
    return [part for i, part in enumerate(parts) if isinstance(part, nn.Module) and part not in parts[:i]]
