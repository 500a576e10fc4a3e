"""Linear layers in 4 bits (bitsandbytes) on CPUs."""

from __future__ import annotations

from torch import nn

_PACKS = "support_avx512bf16_for_cpu"


def keep_trainable(model: nn.Module) -> None:
    """Keep layers in 4 bits as gradients come through them.

    On a CPU with AVX512-BF16 bitsandbytes packs a layer's weight for inference the first time that it is evaluated,
    and for good: no gradient comes through it afterwards, without a word; narrower layers than its blocks fail.
    """
    for module in model.modules():
        if getattr(module, _PACKS, False):
            setattr(module, _PACKS, False)
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # unpacks it
