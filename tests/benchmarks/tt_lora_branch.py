"""TT-LoRA's added path alone, forward and backward: a chain of einsums over the cores beside this package's products.

Both get the same activations and cores, and give gradients for all of them. Their results are compared before anything
is timed. PEFT's LoRA of rank 16 is shown for comparison.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.tt_lora import TTLoraLinear
from axolotl_moe_peft.tt_lora.factors import Factors
from tests.benchmarks.timing import DTYPES, Spread, argument_parser, ratio, report, time_rounds

WIDTH = 2048
RANK, ALPHA, LORA_RANK = 5, 16, 16
FACTORS = {
    "the authors' 16,8,4,4": Factors((16, 8, 4, 4), (16, 8, 4, 4)),
    "small one first 2,4,4,4,16": Factors((2, 4, 4, 4, 16), (2, 4, 4, 4, 16)),
}


def chain(x: Tensor, cores_in: list[Tensor], cores_out: list[Tensor]) -> Tensor:
    """alpha * x through one core after the other, in the layout that needs no copies. x: (B, S, inputs)."""
    state = x.view(
        -1, *(core.shape[1] for core in reversed(cores_in)), 1
    )  # the fastest digit, then the rank, are last
    for core in cores_in:
        state = torch.einsum("...ip,piq->...q", state, core)
    for core in cores_out:
        state = torch.einsum("...p,pjq->...jq", state, core)
    return ALPHA * state.reshape(*x.shape[:-1], -1)


def build_pair(
    factors: Factors, tokens: tuple[int, int], device: str, dtype: torch.dtype
) -> tuple[Callable[[], list[Tensor]], ...]:
    """Forward and backward of the chain and of ours on the same random data.

    Returns:
        Two functions; each returns the output and the gradients of the activations and the cores.
    """
    torch.manual_seed(0)
    layer = TTLoraLinear(nn.Linear(WIDTH, WIDTH, bias=False, device=device)).train()
    layer.update_layer("default", TTLoraConfig(rank=RANK, alpha=ALPHA), factors)
    cores_in, cores_out = layer.cores("default")
    x, grad = (torch.randn(*tokens, WIDTH).to(device, dtype) for _ in range(2))
    x.requires_grad_()
    leaves = [x, *cores_in, *cores_out]

    def run_chain() -> list[Tensor]:
        out = chain(x, *([core.to(dtype) for core in cores] for cores in (cores_in, cores_out)))
        return [out, *torch.autograd.grad(out, leaves, grad)]

    def run_ours() -> list[Tensor]:
        out = layer._delta("default", x)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    return run_chain, run_ours


def build_lora(tokens: tuple[int, int], device: str, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """Forward and backward of the two products of a LoRA."""
    x, grad = (torch.randn(*tokens, WIDTH).to(device, dtype) for _ in range(2))
    down, up = (torch.randn(shape).to(device, dtype) for shape in ((LORA_RANK, WIDTH), (WIDTH, LORA_RANK)))
    leaves = [tensor.requires_grad_() for tensor in (x, down, up)]

    def run() -> list[Tensor]:
        out = nn.functional.linear(nn.functional.linear(x, down), up) * ALPHA
        return [out, *torch.autograd.grad(out, leaves, grad)]

    return run


def check_agreement(
    run_chain: Callable[[], list[Tensor]], run_ours: Callable[[], list[Tensor]], dtype: torch.dtype
) -> None:
    """Raise unless both compute the same."""
    for ours, theirs in zip(run_ours(), run_chain(), strict=True):
        # sums in another order, and eight or ten roundings of the chain: relative to the largest entry
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def main() -> None:
    parser = argument_parser(__doc__, repeats=30)
    parser.add_argument("--warmup", type=int, default=5, help="rounds before the measured ones")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, tokens = DTYPES[args.dtype], (args.batch, args.sequence)
    lora = f"LoRA, rank {LORA_RANK}"
    candidates = {}
    for name, factors in FACTORS.items():
        run_chain, run_ours = build_pair(factors, tokens, args.device, dtype)
        check_agreement(run_chain, run_ours, dtype)
        candidates |= {f"chain, {name}": run_chain, f"ours, {name}": run_ours}
    candidates[lora] = build_lora(tokens, args.device, dtype)
    times = time_rounds(candidates, args.device, args.repeats, args.warmup)

    rows = [[f"{name}, ms", *Spread.of(times[name]).cells()] for name in candidates]
    rows += [[f"chain / ours, {name}", *ratio(times, f"chain, {name}", f"ours, {name}").cells()] for name in FACTORS]
    rows += [[f"ours, {name} / {lora}", *ratio(times, f"ours, {name}", lora).cells()] for name in FACTORS]
    report(args, rows)


if __name__ == "__main__":
    main()
