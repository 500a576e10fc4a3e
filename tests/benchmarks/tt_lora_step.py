"""Whole training steps of a Llama: TT-LoRA of rank 5 beside PEFT's LoRA of rank 16 on q_proj and v_proj, and the base.

The layers are Llama-3.2-1B's, two of them or all sixteen, and the tensor trains have the authors' shapes for it. Each
candidate runs forward, loss, backward and, but for the frozen base, AdamW. Inputs require gradients in all of them, as
in Axolotl's adapter runs, so that every backward goes the full depth. The candidates share the base's parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_moe_peft import TTLoraConfig
from tests.benchmarks.timing import DTYPES, Spread, argument_parser, ratio, report, time_rounds

TARGETS = ["q_proj", "v_proj"]
FACTORS = {
    "q_proj": {"in": [16, 8, 4, 4], "out": [16, 8, 4, 4]},
    "v_proj": {"in": [16, 16, 4, 2], "out": [16, 16, 2]},
}


def base_config(vocab_size: int, num_layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        use_cache=False,
    )


# The vocabulary is small so that with two layers the head does not outweigh them.
SIZES = {"two-layers": base_config(8192, 2), "llama-3.2-1b": base_config(128256, 16)}
ADAPTERS = {
    "frozen": None,
    "tt_lora": TTLoraConfig(rank=5, alpha=16, target_modules=TARGETS, factors=FACTORS, task_type="CAUSAL_LM"),
    "lora": LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"),
}
RATIOS = (("tt_lora", "lora"), ("tt_lora", "frozen"), ("lora", "frozen"))


def build_base(config: LlamaConfig, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.requires_grad_(False).train()


def build_step(candidate: str, base: nn.Module, batch: int, sequence: int) -> Callable[[], None]:
    """One training step of the candidate on a fixed random batch."""
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    model.enable_input_require_grads()
    if ADAPTERS[candidate] is not None:
        model = get_peft_model(model, ADAPTERS[candidate])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True) if trainable else None
    ids = torch.randint(model.config.vocab_size, (batch, sequence), generator=torch.Generator().manual_seed(1))
    ids = ids.to(model.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def main() -> None:
    parser = argument_parser(__doc__, repeats=12, sizes=list(SIZES))
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the measured ones")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = build_base(SIZES[args.size], args.device, DTYPES[args.dtype])
    steps = {name: build_step(name, base, args.batch, args.sequence) for name in ADAPTERS}
    times = time_rounds(steps, args.device, args.repeats, args.warmup)

    rows = [[f"step, {name}, ms", *Spread.of(times[name]).cells()] for name in ADAPTERS]
    rows += [[f"step, {a} / {b}", *ratio(times, a, b).cells()] for a, b in RATIOS]
    report(args, rows)


if __name__ == "__main__":
    main()
