"""The memory of a training step without making one: the model runs on tensors that have shapes and no data.

What lives at once is counted as it is allocated and freed, so that whatever a model's code, autograd and gradient
checkpointing keep or recompute is in it. Shape suffixes: B rows, S positions, D model width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface

# The attention of a model whose step is counted, by its name in transformers: as a kernel that keeps no scores.
ATTENTION = "attention_without_scores"
# A step of a model: from token ids (B, S) to the loss that it learns from, or None where there is no backward pass.
Step = Callable[[nn.Module, Tensor], Tensor | None]


def loss_of_logits(model: nn.Module, ids_BS: Tensor) -> Tensor:
    """A language model's step with logits for every token."""
    return model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss


def loss_of_hidden_states(model: nn.Module, ids_BS: Tensor) -> Tensor:
    """The same with a fused loss, whose chunks of logits take about as much as the hidden states in float32."""
    loss = model.get_decoder()(input_ids=ids_BS, use_cache=False).last_hidden_state.float().square().mean()
    auxiliary = getattr(getattr(model, "base_model", None), "auxiliary", None)
    if auxiliary is not None:
        auxiliary.follow(loss)
    return loss


def loss_of_embeddings(model: nn.Module, ids_BS: Tensor) -> Tensor:
    """The same where gradients reach the embeddings: those of a soft prompt."""
    embeds_BSD = model.get_input_embeddings()(ids_BS).requires_grad_()
    return model(inputs_embeds=embeds_BSD, labels=ids_BS, use_cache=False).loss


@torch.no_grad()
def hidden_states_only(model: nn.Module, ids_BS: Tensor) -> None:
    """The same where nothing learns through the base."""
    model.get_decoder()(input_ids=ids_BS, use_cache=False)


def peak_bytes(model: nn.Module, step: Step, batch_size: int, sequence_len: int) -> int:
    """Bytes that live at most at once in a forward and backward pass, gradients among them.

    Parameters and buffers, which are there before, are not counted.

    Args:
        model: on the meta device; its attention is `ATTENTION`, or eager if that is what trains.
        step: what the step computes.
        batch_size, sequence_len: B and S.

    Raises:
        RuntimeError: the model's code asks for values, as a loop over the experts that tokens chose does.
    """
    ids_BS = torch.zeros(batch_size, sequence_len, dtype=torch.long, device="meta")
    with _Peak([*model.parameters(), *model.buffers(), ids_BS]) as memory:
        loss = step(model, ids_BS)
        if loss is not None:
            loss.backward()
    return memory.peak


class _Peak(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.peak = self.current = 0
        self._sizes = {_key(tensor): 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:  # torch checks on meta that it is bfloat16, CPUs take others
            out = _grouped_mm(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[key] = storage.nbytes()
                self.current += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.current)
        return out

    def _free(self, key: int) -> None:
        self.current -= self._sizes.pop(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, *_: Any) -> Tensor:
    """(S, I) by (N, I, O) is (S, O); (I, S) by (S, O) is (N, I, O)."""
    groups = () if b.dim() == 3 else (len(offs),)
    return a.new_empty(*groups, a.shape[0], b.shape[-1])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value), None


AttentionInterface.register(ATTENTION, _attention)
