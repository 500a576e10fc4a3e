"""Auxiliary losses that live inside the layers, and what was measured of the routers.

A router loss cannot simply be added to `outputs.loss`: under reentrant gradient checkpointing (Axolotl's default) the
logits of the forward pass have no graph, and a plain Trainer or TRL would not know about it. So its gradient enters
where the logits are computed: `add_auxiliary_loss` is the identity on a tensor of the layer, and its backward hands
the loss the gradient that it would have had as a summand of the main loss.

That gradient is what arrives at `outputs.loss` in backward (1 / gradient_accumulation_steps, the fp16 scaler's
factor, ...). A tensor hook on the loss reads it, and runs before the backward of any layer of that forward pass, so
that layers which checkpointing recomputes in backward also find the token mask and the scale of their own pass.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .batches import IGNORE_INDEX, real_token_mask
from .routing import usage_figures

_UNKNOWN_SCALE = (
    "The router losses of an adapter act, but the loss is computed outside the model, where their scale cannot be "
    "read off it; 1 is used. With gradient accumulation set `model.base_model.auxiliary.loss_scale` to "
    "1 / accumulation steps."
)


@dataclass
class ForwardPass:
    """What the layers need to know about one forward pass of the model in training mode.

    Attributes:
        token_mask: bool (B, S), true for real tokens; None counts every token.
        share: the micro-batch's share of the accumulated batch where the trainer divides by the number of tokens of
            all its micro-batches (`num_items_in_batch`), else 1.
        scale: gradient of the objective with respect to this pass's auxiliary losses. Read off the loss in backward;
            None as long as nothing tells it.
        running: false once the model has returned; layers called later are recomputed by checkpointing.
    """

    token_mask: Tensor | None
    share: Tensor | float
    scale: Tensor | float | None
    running: bool = True


class _AddAuxiliaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, forward_pass: ForwardPass) -> Tensor:
        ctx.forward_pass, ctx.dtype, ctx.device = forward_pass, loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = ctx.forward_pass.scale
        if scale is None:
            warnings.warn(_UNKNOWN_SCALE, stacklevel=2)
            scale = ctx.forward_pass.scale = 1.0
        if not isinstance(scale, Tensor):
            scale = torch.full((), scale)
        return grad_x, scale.to(dtype=ctx.dtype, device=ctx.device), None


def add_auxiliary_loss(x: Tensor, loss: Tensor, forward_pass: ForwardPass) -> Tensor:
    """Return `x` unchanged; in backward, `loss` (0-dim) receives `forward_pass.scale` as its gradient.

    `x` must be on the way to the main loss, or backward never comes by.
    """
    return _AddAuxiliaryLoss.apply(x, loss, forward_pass)


class RouterStatistics:
    """Sums over layers and micro-batches since they were last read; nothing is copied to the host before that."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._experts: Sequence[str] = ()

    def record(self, name: str, value: Tensor, count: int = 1) -> None:
        """Add one value (0-dim), such as one layer's loss of one micro-batch, to the mean of `name`.

        With a count of 0 it is not added, but other processes that have one are not left waiting in `pop`.
        """
        self._add(name, count * value.detach().view(1), torch.full((1,), float(count), device=value.device))

    def record_by_expert(self, name: str, values_N: Tensor, labels_N: Tensor, experts: Sequence[str]) -> None:
        """Add the values of N sequences to the mean of `name` and to those of their right experts, `name`/`expert`.

        Args:
            name: of the figure.
            values_N: (N,).
            labels_N: int64 (N,), index of each sequence's right expert; those below 0 are left out.
            experts: names of all experts.
        """
        by_label = torch.stack([values_N.detach().float(), torch.ones_like(values_N, dtype=torch.float32)])
        slots_N = torch.where(labels_N < 0, len(experts), labels_N)
        totals, counts = by_label.new_zeros(2, len(experts) + 1).index_add(1, slots_N, by_label)[:, :-1]
        self._add(name, totals, counts)
        self._experts = experts

    def _add(self, name: str, totals: Tensor, counts: Tensor) -> None:
        new = torch.stack([totals.float(), counts])
        self._totals[name] = self._totals[name] + new if name in self._totals else new

    def record_usage(self, layer: str, counts_N: Tensor) -> None:
        """Add one layer's choices per expert, (N,), of one micro-batch."""
        self._counts[layer] = self._counts[layer] + counts_N if layer in self._counts else counts_N

    def pop(self, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, float]:
        """Read the figures and start anew.

        Args:
            reduce: sums a tensor over the processes of a distributed run (every process must call).

        Returns:
            The means over all that was recorded in all processes, and `usage_figures` if anything was routed.
        """
        figures = {}
        for name, totals_and_counts in self._totals.items():
            totals, counts = reduce(totals_and_counts).tolist()
            if sum(counts):
                figures[name] = sum(totals) / sum(counts)
            for expert, total, count in zip(self._experts, totals, counts):
                if count:
                    figures[f"{name}/{expert}"] = total / count
        if self._counts:
            sizes = {counts.numel() for counts in self._counts.values()}
            per_size = [
                usage_figures(reduce(torch.stack([c for c in self._counts.values() if c.numel() == n])).cpu())
                for n in sorted(sizes)
            ]
            figures |= {key: sum(f[key] for f in per_size) / len(per_size) for key in per_size[0]}
        self._reset()
        return figures


class AuxiliaryLosses:
    """Follows a model's forward passes on behalf of the adapter layers that share this object.

    Attributes:
        current: the pass that runs, or whose backward runs; None outside training and without gradients.
        statistics: what the layers recorded of those passes.
        loss_scale: the scale where the loss is computed outside the model (no `labels` in the call), which cannot be
            read off: the factor that the loss of one forward pass has in the objective.
    """

    def __init__(self, model: nn.Module) -> None:
        self.current: ForwardPass | None = None
        self.statistics = RouterStatistics()
        self.loss_scale: float | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Stop following the model."""
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):  # RL trainers generate, and score, in training mode
            self.current = None
            return
        batch = dict(zip(inspect.signature(model.forward).parameters, args)) | kwargs
        self.current = ForwardPass(
            token_mask=real_token_mask(
                *(batch.get(k) for k in ("input_ids", "attention_mask", "position_ids", "labels"))
            ),
            share=share_of_accumulated_batch(batch),
            scale=self.loss_scale,
        )

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        forward_pass = self.current
        if forward_pass is None:
            return
        forward_pass.running = False
        if isinstance(output, tuple):  # return_dict=False
            output = dict(zip(("loss", "logits") if kwargs.get("labels") is not None else ("logits",), output))
        for name in ("loss", "logits", "last_hidden_state"):
            tensor = output.get(name)
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._enter_backward, forward_pass, is_loss=name == "loss"))

    def _enter_backward(self, forward_pass: ForwardPass, gradient: Tensor, is_loss: bool) -> None:
        self.current = forward_pass
        if is_loss:
            forward_pass.scale = gradient * forward_pass.share


def share_of_accumulated_batch(batch: dict[str, Any]) -> Tensor | float:
    num_items_in_batch = batch.get("num_items_in_batch")
    if num_items_in_batch is None:
        return 1.0
    labels = batch["shift_labels"] if batch.get("shift_labels") is not None else batch["labels"][..., 1:]
    return (labels != IGNORE_INDEX).sum() / num_items_in_batch
