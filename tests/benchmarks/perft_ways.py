"""The ways to compute routed adapters alone, forward and backward: those that `products.slots_for` chooses from.

All experts with a gate, blocks, and on a GPU grouped products, on a CPU chunks of sorted slots. They are compared with
each other before anything is timed; the dtypes take turns in one run. On a GPU the peak of the memory that a way takes
beside its operands is put beside the times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import units
from axolotl_moe_peft.perft.dispatch import BlockedSlots, GroupedSlots, HostSlots, Slots
from tests.benchmarks.timing import DTYPES, Spread, argument_parser, ratio, report, time_rounds

HIDDEN, RANK, DROPOUT = 2048, 16, 0.05
# N and K: few and many of a router of the adapter's own, and one in each expert of an OLMoE
SIZES = ((8, 2), (64, 2), (128, 2), (64, 8))


def ways(device: str) -> dict[str, type[Slots] | None]:
    """By name."""
    on_device = {"chunks": HostSlots} if device == "cpu" else {"grouped": GroupedSlots}
    return {"gated": None, "blocks": BlockedSlots, **on_device}


def build(num_experts: int, num_active: int, tokens: int, device: str, dtype: torch.dtype, dropout: float) -> Callable:
    """Forward and backward by a way, on the same random data."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x_TD, grad_TD = (random(tokens, HIDDEN, dtype=dtype) for _ in range(2))
    down, up = random(num_experts, RANK, HIDDEN) * HIDDEN**-0.5, random(num_experts, HIDDEN, RANK)
    weights_TK, indices_TK = random(tokens, num_experts).softmax(-1).topk(num_active)
    operands = [tensor.requires_grad_() for tensor in (x_TD, weights_TK.detach(), down, up)]
    config = PerftConfig(num_experts=num_experts, num_experts_per_tok=num_active, rank=RANK, dropout=dropout)

    def run(kind: type[Slots] | None) -> list[Tensor]:
        chosen, units.slots_for = units.slots_for, lambda *_: kind
        try:
            out = units.Units(config, down, up, training=True).routed(x_TD, operands[1], indices_TK)
        finally:
            units.slots_for = chosen
        return [out, *torch.autograd.grad(out, operands, grad_TD)]

    return run


def check_agreement(results: dict[str, list[Tensor]], dtype: torch.dtype) -> None:
    """Raise unless all ways compute the same."""
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    first, *others = results.values()
    for other in others:
        for ours, theirs in zip(other, first):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def peak(call: Callable[[], object]) -> float:
    """MiB on a GPU beside what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argument_parser(__doc__, repeats=20)
    parser.add_argument("--warmup", type=int, default=3, help="rounds before the measured ones")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="instead of the one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    candidates, rows = {}, []
    for dtype in args.dtypes or [args.dtype]:
        for num_experts, num_active in SIZES:
            for dropout in (0.0, DROPOUT):
                run = build(num_experts, num_active, args.tokens, args.device, DTYPES[dtype], dropout)
                kinds = ways(args.device)
                if dropout:
                    del kinds["gated"]
                label = f"{dtype}, N={num_experts}, K={num_active}{', dropout' if dropout else ''}"
                if not dropout:
                    check_agreement({way: run(kind) for way, kind in kinds.items()}, DTYPES[dtype])
                for way, kind in kinds.items():
                    call = candidates[f"{label}: {way}"] = lambda run=run, kind=kind: run(kind)
                    if args.device == "cuda":
                        call()
                        rows.append([f"{label}: {way}, peak MiB", f"{peak(call):.0f}", "", ""])
    times = time_rounds(candidates, args.device, args.repeats, args.warmup)
    rows += [[f"{name}, ms", *Spread.of(figures).cells()] for name, figures in times.items()]
    for name in times:
        label, way = name.split(": ")
        if way != "blocks":
            rows.append([f"{name} / blocks", *ratio(times, name, f"{label}: blocks").cells()])
    report(args, rows)


if __name__ == "__main__":
    main()
