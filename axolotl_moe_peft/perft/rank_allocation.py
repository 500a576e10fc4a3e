"""Ranks that move from the least to the most important experts in training.

It is what EPnG (arXiv 2607.01789) and DR-LoRA (arXiv 2601.04823) have in common; README.md says what is chosen here. A
stack has `max_rank` slots for each of the N experts, of which some are active. What is not active is zero in both
projections, and so are then its gradients: the zeros are the mask, in training, in every file and on every device.
Shape suffixes: N experts with a unit, R slots of each, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from .layer import PerftLayer

_SEED = 0x5107  # of new directions; not the run's, whose random numbers stay where they are


def active_slots(down_NRD: Tensor) -> Tensor:
    """Which slots are active: bool (N, R)."""
    return (down_NRD != 0).any(-1)


def new_ranks(importance: list[float], ranks: list[int], max_rank: int, prune: float, grow: float) -> list[int]:
    """The experts' ranks after one move; their sum stays.

    The share `prune` of the experts, at least one, of those that have slots the least important, give all theirs to
    the share `grow` that is most important: one after the other from the most important on, up to `max_rank` each.
    What has no room there stays, with the more important of the givers.

    Args:
        importance: of each of N experts; of equal ones the first counts as the less important.
        ranks: how many slots of each are active.
    """
    order = sorted(range(len(ranks)), key=lambda expert: (importance[expert], expert))
    takers = order[::-1][: max(1, int(grow * len(ranks)))]
    givers = [expert for expert in order if ranks[expert] and expert not in takers]
    givers = givers[: max(1, int(prune * len(ranks)))]
    ranks = list(ranks)
    for giver in givers:
        takers = [taker for taker in takers if ranks[taker] < max_rank and importance[taker] > importance[giver]]
        while ranks[giver] and takers:
            for taker in takers[: ranks[giver]]:
                ranks[giver], ranks[taker] = ranks[giver] - 1, ranks[taker] + 1
            takers = [taker for taker in takers if ranks[taker] < max_rank]
    return ranks


class RankAllocation:
    """Follows how important the experts of an adapter are, and moves their slots.

    Importance is a sum over optimiser steps in which what is older counts less, by `decay` a step: with score `gate`
    of the weights with which the base router lets an expert act, over real tokens; with `saliency` of those, times the
    mean over the expert's active slots of a sum of |gradient * weight| of the slot's weights.

    Args:
        layers: the adapted blocks.
        adapter_name: whose slots.
    """

    def __init__(self, layers: list[PerftLayer], adapter_name: str) -> None:
        self._layers = {layer.block.name: layer for layer in layers}
        self.adapter_name = adapter_name
        self._config = next(iter(self._layers.values())).perft_config[adapter_name]
        self._use: dict[str, Tensor] = {}  # (N,), by block
        self._sensitivity: dict[str, Tensor] = {}  # (N, R), by block; `saliency` only

    def note_gradients(self) -> None:
        """Read the gradients of an optimiser step, which are those of all processes, before it is made."""
        if self._config.rank_allocation["score"] != "saliency":
            return
        decay = self._config.rank_allocation["decay"]
        for block, layer in self._layers.items():
            down, up = layer.perft_down[self.adapter_name], layer.perft_up[self.adapter_name]
            if down.grad is not None:
                now_NR = _whole((down.grad * down.detach()).abs().sum(-1) + (up.grad * up.detach()).abs().sum(1))
                self._sensitivity[block] = decay * self._sensitivity.get(block, 0) + now_NR.float()

    def step(
        self, number: int, optimizer: Optimizer, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> bool:
        """Take in an optimiser step that was made, and move slots if it is time. Every process must call.

        Args:
            number: of optimiser steps made.
            optimizer: holds the adapter's parameters; its states of slots that move start anew.
            reduce: sums a tensor over the processes.

        Returns:
            Whether slots have moved.

        Raises:
            RuntimeError: the optimiser's states are not of single weights.
        """
        plan = self._config.rank_allocation
        self._check(optimizer)
        used = [layer.take_use(self.adapter_name) for layer in self._layers.values()]
        flat = reduce(torch.cat(used))
        for block, use_N in zip(self._layers, flat.split([len(use_N) for use_N in used])):
            self._use[block] = plan["decay"] * self._use.get(block, 0) + use_N
        past_warmup, until = number - plan["warmup_steps"], plan["until"]
        if past_warmup <= 0 or past_warmup % plan["every_steps"] or (until is not None and number > until):
            return False
        moved = [self._move(block, number, index, optimizer) for index, block in enumerate(self._layers)]
        return any(moved)

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """What is known of importance, as lists, by kind and block."""
        kinds = {"use": self._use, "sensitivity": self._sensitivity}
        return {kind: {block: tensor.tolist() for block, tensor in known.items()} for kind, known in kinds.items()}

    @figures.setter
    def figures(self, figures: Mapping[str, Mapping[str, Any]]) -> None:
        for kind, known in (("use", self._use), ("sensitivity", self._sensitivity)):
            for block, values in figures[kind].items():
                device = self._layers[block].perft_down[self.adapter_name].device
                known[block] = torch.tensor(values, dtype=torch.float32, device=device)

    def importance(self, block: str) -> Tensor:
        """How important each expert of a block is: (N,)."""
        use_N = self._use[block]
        if self._config.rank_allocation["score"] == "gate":
            return use_N
        active_NR = active_slots(_whole(self._layers[block].perft_down[self.adapter_name].detach()))
        sums_N = (self._sensitivity[block] * active_NR).sum(-1)
        return use_N * sums_N / active_NR.sum(-1).clamp(min=1)

    @torch.no_grad()
    def _move(self, block: str, number: int, index: int, optimizer: Optimizer) -> bool:
        plan, layer = self._config.rank_allocation, self._layers[block]
        down, up = layer.perft_down[self.adapter_name], layer.perft_up[self.adapter_name]
        down_NRD, up_NDR = _whole(down).cpu(), _whole(up).cpu()
        before_NR = active_slots(down_NRD)
        ranks, importance = before_NR.sum(-1).tolist(), self.importance(block).tolist()
        wanted = new_ranks(importance, ranks, plan["max_rank"], plan["prune"], plan["grow"])
        if wanted == ranks:
            return False
        # the size of what a slot adds
        size_NR = down_NRD.norm(dim=-1) * up_NDR.norm(dim=1)
        moved_NR = torch.zeros_like(before_NR)
        generator = torch.Generator().manual_seed(_SEED + 1_000_003 * number + index)
        for expert, (rank, rank_wanted) in enumerate(zip(ranks, wanted)):
            active_R = before_NR[expert]
            if rank_wanted < rank:
                smallest = size_NR[expert].masked_fill(~active_R, torch.inf).argsort(stable=True)
                moved_NR[expert, smallest[: rank - rank_wanted]] = True
                down_NRD[expert, moved_NR[expert]] = 0
            elif rank_wanted > rank:
                slots = (~active_R).nonzero().flatten()[: rank_wanted - rank]
                moved_NR[expert, slots] = True
                down_NRD[expert, slots] = _orthogonal_to(down_NRD[expert, active_R], len(slots), generator)
        up_NDR.masked_fill_(moved_NR.unsqueeze(1), 0)
        for parameter, new, where in ((down, down_NRD, moved_NR.unsqueeze(-1)), (up, up_NDR, moved_NR.unsqueeze(1))):
            _write(parameter, new)
            for state in _states(optimizer, parameter).values():
                _write(state, _whole(state).cpu().masked_fill(where, 0))
        if block in self._sensitivity:
            self._sensitivity[block].masked_fill_(moved_NR.to(self._sensitivity[block].device), 0)
        return True

    def _check(self, optimizer: Optimizer) -> None:
        for layer in self._layers.values():
            for parameter in (layer.perft_down[self.adapter_name], layer.perft_up[self.adapter_name]):
                for name, state in _states(optimizer, parameter).items():
                    if state.shape != parameter.shape:
                        raise RuntimeError(
                            f"perft.rank_allocation: the optimiser's state {name} has the shape {tuple(state.shape)} "
                            f"for a parameter of {tuple(parameter.shape)}, so that those of a slot that moves cannot "
                            "start anew. Use an optimiser like adamw_torch, which keeps states of single weights."
                        )


class RankAllocationCallback(TrainerCallback, ExportableState):
    """Moves slots while a Trainer trains; what is known of importance goes into its checkpoints.

    Args:
        allocation: what it drives.
        reduce: sums a tensor over the trainer's processes.
        state: of the trainer, which may go on from a checkpoint.
    """

    def __init__(self, allocation: RankAllocation, reduce: Callable[[Tensor], Tensor], state: TrainerState) -> None:
        self.allocation, self._reduce = allocation, reduce
        self._go_on_from(state)

    def _go_on_from(self, state: TrainerState) -> None:
        if saved := state.stateful_callbacks.get(type(self).__name__):
            self.allocation.figures = saved["attributes"]["figures"]

    def state(self) -> dict[str, Any]:
        """For the checkpoint's trainer_state.json."""
        return {"args": {}, "attributes": {"figures": self.allocation.figures}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._go_on_from(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.allocation.note_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.allocation.step(state.global_step, kwargs["optimizer"], self._reduce)


def _orthogonal_to(rows_RD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """New directions as an adapter starts with, orthogonal to these and to each other: (count, D)."""
    width = rows_RD.shape[-1]
    new = (torch.rand(count, width, generator=generator) * 2 - 1) / width**0.5
    basis_DR = torch.linalg.qr(torch.cat([rows_RD.float(), new]).T)[0]
    directions = basis_DR.T[len(rows_RD) :]
    return directions * new.norm(dim=-1, keepdim=True)


def _states(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim()}


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 divides among the processes, from all of them; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write(tensor: Tensor, new: Tensor) -> None:
    if isinstance(tensor, DTensor):
        new = distribute_tensor(new.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)
    tensor.copy_(new)
