"""Bytes that adapters keep for backward, for each token and layer, beyond what the frozen base keeps.

Models with layers of real width and a tiny vocabulary run forward in bf16; what autograd saves is counted, each
storage once and without parameters, at two lengths, of which the difference tells what a token costs. Nothing is
timed, and the figures are the same on every machine. Beside ours are PEFT's LoRA of the same rank on the same modules,
the input that an adapter's gradient cannot be computed without, and what its bottlenecks add to that: rank for each
expert that a token goes through, and the router's scores.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig
from tests.benchmarks.timing import print_table

WIDTH, LAYERS, EXPERTS, ACTIVE = 2048, 2, 8, 2
LENGTHS = (64, 128)
RANK, ALPHA, DROPOUT = 16, 32, 0.05
BF16, FLOAT32 = 2, 4  # bytes


@dataclass(frozen=True)
class Row:
    """One adapter.

    Attributes:
        base: moe or dense.
        config: of the adapter.
        inputs: how many inputs of the base's width its gradient cannot be computed without.
        bottlenecks: bytes a token of what is as wide as a rank or a router.
    """

    base: str
    config: PeftConfig
    inputs: int = 1
    bottlenecks: int = 0

    @property
    def bound(self) -> float:
        """The most that it may keep a token and layer."""
        return 1.1 * (self.inputs * WIDTH * BF16 + self.bottlenecks)


def _perft(bottlenecks: int, **fields: object) -> Row:
    # LoRA's bottleneck is kept on its way in and, weighted, on its way out
    return Row("moe", PerftConfig(rank=RANK, alpha=ALPHA, task_type="CAUSAL_LM", **fields), 1, bottlenecks)


def _rows(dropout: float) -> dict[str, Row]:
    routed = {"variant": "routed", "num_experts": 8, "num_experts_per_tok": 2, "dropout": dropout}
    tt_lora = TTLoraConfig(rank=5, target_modules=["q_proj", "v_proj"], dropout=dropout, task_type="CAUSAL_LM")
    lora = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
    rows = {
        "perft routed": _perft(8 * RANK * BF16 + 8 * FLOAT32, **routed),
        "perft routed, 64 experts": _perft(2 * 2 * RANK * BF16 + 2 * 64 * FLOAT32, **routed | {"num_experts": 64}),
        "perft embedded": _perft(2 * ACTIVE * RANK * BF16, variant="embedded", dropout=dropout),
        "perft dense": _perft(4 * RANK * BF16, variant="dense", num_experts=4, dropout=dropout),
        "perft single": _perft(RANK * BF16, variant="single", dropout=dropout),
        "tt_lora on q, v": Row("dense", tt_lora, 1, 2 * RANK * BF16),
        "PEFT's LoRA on q, v": Row("dense", LoraConfig(target_modules=["q_proj", "v_proj"], **lora), 1),
    }
    if not dropout:  # which it has not, nor PEFT's LoRA on parameters
        rows["pt_moe"] = Row("dense", PTMoeConfig(num_virtual_tokens=40, task_type="CAUSAL_LM"), 0, 8 * FLOAT32)
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        lora |= {"target_parameters": experts, "target_modules": [], "lora_dropout": 0.0}
        rows["PEFT's LoRA on the experts"] = Row("moe", LoraConfig(**lora), 1)
    return rows


ROWS = {
    name if not dropout else f"{name}, dropout": row
    for dropout in (0.0, DROPOUT)
    for name, row in _rows(dropout).items()
}


def build_base(kind: str) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "use_cache": False, "pad_token_id": None}
    torch.manual_seed(0)
    if kind == "dense":
        config = LlamaConfig(**sizes, **heads)
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE, "eos_token_id": None}
    config = OlmoeConfig(**sizes, **heads, **experts)
    return OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16).requires_grad_(False)


def attach(base: nn.Module, config: PeftConfig | None) -> nn.Module:
    """The base in training, with an adapter if there is one; only that is trained, and gradients reach every layer."""
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    model.enable_input_require_grads()
    return (model if config is None else get_peft_model(model, config)).train()


def kept_bytes(call: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps of a call, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = call()  # alive until all is counted, so that no address is used twice
    del loss
    return sum(kept.values())


def kept_per_token_and_layer(model: nn.Module) -> float:
    """Bytes that one more token makes each layer keep."""
    totals = []
    for length in LENGTHS:
        ids = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(length))
        labels = ids.clone()
        labels[:, :8] = -100  # a prompt, for routers that read one
        totals.append(kept_bytes(lambda ids=ids, labels=labels: model(input_ids=ids, labels=labels).loss, model))
    return (totals[1] - totals[0]) / (LENGTHS[1] - LENGTHS[0]) / LAYERS


def measure(rows: dict[str, Row] = ROWS) -> dict[str, float]:
    """What each adapter adds to the bytes that its base keeps, for a token and layer."""
    bases = {kind: build_base(kind) for kind in ("moe", "dense")}
    frozen = {kind: kept_per_token_and_layer(attach(base, None)) for kind, base in bases.items()}
    return {
        name: kept_per_token_and_layer(attach(bases[row.base], row.config)) - frozen[row.base]
        for name, row in rows.items()
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"width {WIDTH}, rank {RANK} (tt_lora 5), bf16, dropout {DROPOUT} where it says so; bytes a token and layer")
    table = []
    for name, kept in measure().items():
        row = ROWS[name]
        cells = ["", ""] if "PEFT" in name else [f"{row.inputs * WIDTH * BF16}", f"{row.bottlenecks}"]
        table.append([name, f"{kept:.0f}", *cells])
    print_table(["kept for backward", "added", "input", "bottlenecks"], table)


if __name__ == "__main__":
    main()
