"""The routed adapters alone, forward and backward: a plain loop over the experts beside this package's products.

Both get the same tokens, routing and adapter weights, and give gradients for the tokens, the adapters and the routing
weights. Their results are compared before anything is timed. On a GPU the time that the memory needs for what has to
be read and written at least is put beside ours: forward the tokens and their sum, backward the gradient and the tokens
again and the tokens' gradient, and three times the adapters; at the speed of a large copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft.layer import PerftLayer
from axolotl_moe_peft.shared.routing import top_k_routing
from tests.benchmarks.timing import DTYPES, Spread, argument_parser, ratio, report, time_rounds

HIDDEN, RANK, ALPHA, TOP_K = 2048, 16, 32, 2
NUM_EXPERTS = (4, 8, 16, 64, 128)
COPIED = 2**30  # bytes


class LoopedAdapters(nn.Module):
    """Adapters as published MoE code runs its experts: one module each, over the tokens that chose it."""

    def __init__(self, down_NRD: Tensor, up_NDR: Tensor) -> None:
        super().__init__()
        self.down = nn.ModuleList([_linear(weight) for weight in down_NRD])
        self.up = nn.ModuleList([_linear(weight) for weight in up_NDR])

    def forward(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        mask_NKT = F.one_hot(indices_TK, num_classes=len(self.down)).permute(2, 1, 0)
        for expert, (down, up) in enumerate(zip(self.down, self.up)):
            choice, token = torch.where(mask_NKT[expert])
            delta = up(down(x_TD[token])) * (ALPHA / RANK)
            out_TD.index_add_(0, token, delta * weights_TK[token, choice, None])
        return out_TD


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear


def perft_layer(num_experts: int, device: str, dtype: torch.dtype) -> PerftLayer:
    """The PERFT layer of a one-layer OLMoE of this width, with adapters that matter, all in one dtype."""
    base = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=8,
            hidden_size=HIDDEN,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_experts=2,
            num_experts_per_tok=1,
            pad_token_id=None,
            eos_token_id=None,
        )
    )
    config = PerftConfig(
        variant="routed",
        num_experts=num_experts,
        num_experts_per_tok=TOP_K,
        rank=RANK,
        alpha=ALPHA,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).to(device=device, dtype=dtype).train()
    layer = next(module for module in model.modules() if isinstance(module, PerftLayer))
    nn.init.normal_(layer.perft_up["default"], std=HIDDEN**-0.5)
    return layer


def build_pair(
    num_experts: int, tokens: int, device: str, dtype: torch.dtype
) -> tuple[Callable[[], list[Tensor]], ...]:
    """Forward and backward of the loop and of ours on the same random data.

    Returns:
        Two functions; each returns the output and the gradients of tokens, routing weights, down- and up-projections.
    """
    torch.manual_seed(0)
    layer = perft_layer(num_experts, device, dtype)
    down, up = layer.perft_down["default"], layer.perft_up["default"]
    loop = LoopedAdapters(down, up)
    loop_down, loop_up = ([m.weight for m in modules] for modules in (loop.down, loop.up))
    x_TD, grad_TD = (torch.randn(tokens, HIDDEN).to(device, dtype) for _ in range(2))
    weights_TK, indices_TK = top_k_routing(torch.randn(tokens, num_experts).to(device), TOP_K, norm_topk_prob=False)
    x_TD.requires_grad_()
    weights_TK = weights_TK.to(dtype).requires_grad_()

    def run_loop() -> list[Tensor]:
        out = loop(x_TD, weights_TK, indices_TK)
        grad_x, grad_weights, *grads = torch.autograd.grad(out, [x_TD, weights_TK, *loop_down, *loop_up], grad_TD)
        return [out, grad_x, grad_weights, *grads]

    def run_ours() -> list[Tensor]:
        out = layer.adapter("default").units.routed(x_TD, weights_TK, indices_TK)
        return [out, *torch.autograd.grad(out, [x_TD, weights_TK, down, up], grad_TD)]

    return run_loop, run_ours


def check_agreement(run_loop: Callable[[], list[Tensor]], run_ours: Callable[[], list[Tensor]], num: int) -> None:
    """Raise unless both compute the same."""
    out, grad_x, grad_weights, *grads = run_loop()
    expected = [out, grad_x, grad_weights, torch.stack(grads[:num]), torch.stack(grads[num:])]
    for ours, theirs in zip(run_ours(), expected):
        # sums in another order: a few roundings, relative to the largest entry
        tolerance = 1e-5 if ours.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def least_bytes(num_experts: int, tokens: int, dtype: torch.dtype) -> int:
    """What forward and backward have to read and write at least."""
    entries = 5 * tokens * HIDDEN + 3 * 2 * num_experts * RANK * HIDDEN
    return entries * dtype.itemsize


def copy_speed(device: str) -> float:
    """Bytes read and written per millisecond by a large copy."""
    source = torch.randint(256, (COPIED,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_rounds({"copy": lambda: target.copy_(source)}, device, repeats=10, warmup=3)
    return 2 * COPIED / Spread.of(times["copy"]).median


def main() -> None:
    parser = argument_parser(__doc__, repeats=30)
    parser.add_argument("--warmup", type=int, default=5, help="rounds before the measured ones")
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    candidates = {}
    for num in NUM_EXPERTS:
        run_loop, run_ours = build_pair(num, args.tokens, args.device, dtype)
        check_agreement(run_loop, run_ours, num)
        candidates |= {f"loop, N={num}": run_loop, f"ours, N={num}": run_ours}
    times = time_rounds(candidates, args.device, args.repeats, args.warmup)

    rows = [[f"{name}, ms", *Spread.of(times[name]).cells()] for name in candidates]
    rows += [[f"loop / ours, N={n}", *ratio(times, f"loop, N={n}", f"ours, N={n}").cells()] for n in NUM_EXPERTS]
    first, last = NUM_EXPERTS[0], NUM_EXPERTS[-1]
    label = f"ours, N={last} / ours, N={first}"
    rows.append([label, *ratio(times, f"ours, N={last}", f"ours, N={first}").cells()])
    if args.device == "cuda":
        speed = copy_speed(args.device)
        rows.append(["copy, GB/s read and written", f"{speed / 1e6:.0f}", "", ""])
        for n in NUM_EXPERTS:
            floor = least_bytes(n, args.tokens, dtype) / speed
            shares = [floor / elapsed for elapsed in times[f"ours, N={n}"]]
            rows.append([f"memory's least time / ours, N={n}", *Spread.of(shares).cells()])
    report(args, rows)


if __name__ == "__main__":
    main()
