"""What was measured of the routers since somebody last looked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


class RouterStatistics:
    """The figures of a model's routers, by adapter; nothing is copied to the host before they are read."""

    def __init__(self) -> None:
        self._figures: dict[str, Figures] = {}
        self._usage: dict[tuple[str, str], Tensor] = {}  # by adapter and layer: choices per expert, (N,)

    def of(self, adapter_name: str) -> Figures:
        """Where an adapter's figures are recorded."""
        return self._figures.setdefault(adapter_name, Figures())

    def discard(self, adapter_name: str) -> None:
        """Forget an adapter's figures."""
        self._figures.pop(adapter_name, None)
        self._usage = {key: counts_N for key, counts_N in self._usage.items() if key[0] != adapter_name}

    def pop(self, reduce: Reduce = lambda tensor: tensor) -> dict[str, float]:
        """Read the figures and start anew.

        Args:
            reduce: sums a tensor over the processes of a distributed run (every process must call).

        Returns:
            The means over all that was recorded in all processes, and `usage_figures` if anything was routed; where
            several adapters were in use, each figure with its adapter's name behind: `router_aux_loss/default`.
        """
        by_adapter = {name: figures.read(reduce) for name, figures in self._figures.items()}
        for name, figures in self._figures.items():
            for layer, counts_N in figures.usage.items():
                self._usage[name, layer] = _sum(self._usage.get((name, layer)), counts_N)
        self._figures = {}
        if len(by_adapter) == 1:
            return next(iter(by_adapter.values()))
        return {f"{key}/{name}": value for name, figures in by_adapter.items() for key, value in figures.items()}

    def pop_usage(self, reduce: Reduce = lambda tensor: tensor) -> dict[tuple[str, str], Tensor]:
        """Read how often each expert was chosen in what `pop` has read since the last call, and start anew.

        Args:
            reduce: as in `pop`.

        Returns:
            Choices per expert, (N,) on the CPU, by adapter and layer.
        """
        usage, self._usage = self._usage, {}
        by_size: dict[int, list[tuple[str, str]]] = {}
        for key, counts_N in usage.items():
            by_size.setdefault(counts_N.numel(), []).append(key)
        read: dict[tuple[str, str], Tensor] = {}
        for size in sorted(by_size):
            keys = by_size[size]
            read |= zip(keys, reduce(_stack(usage[key] for key in keys)).cpu())
        return read


class Figures:
    """Sums of one adapter's figures over layers and micro-batches."""

    def __init__(self) -> None:
        self._means: dict[str, dict[str, Tensor]] = {}  # by name and layer: total and count, (2,)
        self._by_expert: dict[str, Tensor] = {}  # by name: totals and counts, (2, N)
        self.usage: dict[str, Tensor] = {}  # by layer: choices per expert, (N,)
        self._experts: Sequence[str] = ()

    def record(self, name: str, layer: str, value: Tensor, count: Tensor | float = 1.0) -> None:
        """Add one value (0-dim), such as one layer's loss of one micro-batch, to the mean of `name`.

        With a count of 0 it is not added, but other processes that have one are not left waiting. A layer that runs
        twice in a forward pass has the mean of both, and no more weight among the layers than another.
        """
        value = value.detach().float()
        # not torch.as_tensor: a number that is copied to an accelerator is waited for
        count = count.to(value) if isinstance(count, Tensor) else value.new_full((), count)
        layers = self._means.setdefault(name, {})
        layers[layer] = layers.get(layer, 0) + torch.stack([value * count, count])

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
        new = by_label.new_zeros(2, len(experts) + 1).index_add(1, slots_N, by_label)[:, :-1]
        self._by_expert[name] = _sum(self._by_expert.get(name), new)
        self._experts = experts

    def record_usage(self, layer: str, counts_N: Tensor) -> None:
        """Add one layer's choices per expert, (N,), of one micro-batch."""
        self.usage[layer] = _sum(self.usage.get(layer), counts_N.detach())

    def read(self, reduce: Reduce) -> dict[str, float]:
        """The means, and `usage_figures` if anything was routed. See RouterStatistics.pop."""
        figures = {}
        for name, layers in self._means.items():
            totals, counts = reduce(_stack(layers.values()).t()).tolist()
            means = [total / count for total, count in zip(totals, counts) if count]
            if means:
                figures[name] = sum(means) / len(means)
        for name, totals_and_counts in self._by_expert.items():
            totals, counts = reduce(totals_and_counts).tolist()
            if sum(counts):
                figures[name] = sum(totals) / sum(counts)
            for expert, total, count in zip(self._experts, totals, counts):
                if count:
                    figures[f"{name}/{expert}"] = total / count
        return figures | self._read_usage(reduce)

    def _read_usage(self, reduce: Reduce) -> dict[str, float]:
        by_size: dict[int, list[Tensor]] = {}
        for counts_N in self.usage.values():
            by_size.setdefault(counts_N.numel(), []).append(counts_N)
        per_size = [usage_figures(reduce(_stack(by_size[size])).cpu()) for size in sorted(by_size)]
        return {key: sum(f[key] for f in per_size) / len(per_size) for key in per_size[0]} if per_size else {}


def usage_figures(counts_LN: Tensor) -> dict[str, float]:
    """Three bounded figures of how the experts were used, averaged over L layers.

    Args:
        counts_LN: choices per expert, (L, N).

    Returns:
        `expert_entropy` (1 = uniform, 0 = one expert; 1 where N is 1), `expert_max_share` (1/N .. 1) and
        `expert_used_fraction` (0 .. 1).
    """
    share_LN = counts_LN / counts_LN.sum(-1, keepdim=True).clamp(min=1)
    return {
        "expert_entropy": usage_entropy(counts_LN).mean().item(),
        "expert_max_share": share_LN.amax(-1).mean().item(),
        "expert_used_fraction": (counts_LN > 0).float().mean().item(),
    }


def usage_entropy(counts_LN: Tensor) -> Tensor:
    """Entropy of how the experts were used, (L,): 1 uniform, 0 one expert; 1 where N is 1."""
    num_experts = counts_LN.shape[-1]
    if num_experts == 1:
        return torch.ones(counts_LN.shape[:-1])
    share_LN = counts_LN / counts_LN.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share_LN).sum(-1) / torch.tensor(float(num_experts)).log()


def _stack(layers: Iterable[Tensor]) -> Tensor:
    """Layers' tensors as one, where the first of them is: `device_map` may have put the layers on several devices."""
    first, *others = layers
    return torch.stack([first, *(tensor.to(first.device) for tensor in others)])


def _sum(old: Tensor | None, new: Tensor) -> Tensor:
    """The sum of counts of which one may have been made before experts were added at the end."""
    if old is None:
        return new
    size = max(old.shape[-1], new.shape[-1])
    return F.pad(old, (0, size - old.shape[-1])) + F.pad(new, (0, size - new.shape[-1]))
