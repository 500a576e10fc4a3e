"""Training steps with other implementations of the base's experts: eager, transformers' products, Liger, ScatterMoE.

The base has the widths of OLMoE-1B-7B and Qwen3-MoE's code, whose experts Liger replaces. All implementations hold the
same weights and see the same batch, so that their losses are compared before anything is timed. One that this machine
cannot run is a row that says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe

from axolotl_moe_peft import PerftConfig
from tests.benchmarks.timing import DTYPES, Spread, argument_parser, failure, ratio, report, time_rounds

IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm", "liger", "scattermoe")
REFERENCE = "grouped_mm"
RANK, ALPHA = 16, 32
ADAPTERS = {
    "frozen": None,
    "routed": PerftConfig(
        variant="routed", num_experts=8, num_experts_per_tok=2, rank=RANK, alpha=ALPHA, task_type="CAUSAL_LM"
    ),
    "embedded": PerftConfig(variant="embedded", rank=RANK, alpha=ALPHA, task_type="CAUSAL_LM"),
}


@dataclass(frozen=True)
class Size:
    """A Qwen3-MoE and the tokens of its one row."""

    sequence: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_experts: int
    num_experts_per_tok: int

    @property
    def config(self) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            moe_intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=self.hidden_size // 16,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            norm_topk_prob=True,
            use_cache=False,
            pad_token_id=None,
            eos_token_id=None,
        )


SIZES = {
    "two-layers": Size(1024, 8192, 1024, 512, 2, 64, 8),
    "olmoe-1b-7b": Size(4096, 50304, 2048, 1024, 4, 64, 8),
    "tiny": Size(16, 128, 64, 32, 1, 8, 2),
}


def build_base(implementation: str, size: Size, device: str, dtype: torch.dtype) -> nn.Module:
    """The base with these experts; the same weights for all."""
    own_class = modeling_qwen3_moe.Qwen3MoeExperts
    if implementation == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

        apply_liger_kernel_to_qwen3_moe(rope=False, rms_norm=False, fused_linear_cross_entropy=False, swiglu=True)
    elif implementation == "scattermoe":
        from axolotl.integrations.kernels.libs.scattermoe_lora.experts import register_scattermoe_experts

        register_scattermoe_experts()
    name = "eager" if implementation == "liger" else implementation  # Liger's class has one way
    with torch.device(device):
        base = Qwen3MoeForCausalLM._from_config(size.config, dtype=dtype, experts_implementation=name)
    modeling_qwen3_moe.Qwen3MoeExperts = own_class
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
    return base.requires_grad_(False).train()


def build_step(adapter: str, base: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of the adapter on the batch; it returns the loss."""
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    model.enable_input_require_grads()
    if ADAPTERS[adapter] is not None:
        torch.manual_seed(1)
        model = get_peft_model(model, ADAPTERS[adapter])
        generator = torch.Generator(ids.device).manual_seed(2)
        for name, parameter in model.named_parameters():
            if "perft_up" in name:  # adapters that matter
                nn.init.normal_(parameter, std=0.02, generator=generator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for parameter in trained:
            parameter.grad = None
        return loss.detach()

    return step


def main() -> None:
    parser = argument_parser(__doc__, repeats=10, sizes=list(SIZES))
    parser.add_argument("--warmup", type=int, default=3, help="rounds before the measured ones")
    parser.add_argument("--experts", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = SIZES[args.size]
    ids = torch.randint(size.vocab_size, (1, size.sequence), generator=torch.Generator().manual_seed(1))
    ids = ids.to(args.device)
    steps: dict[str, Callable[[], Tensor]] = {}
    losses: dict[str, float] = {}
    rows = []
    for implementation in args.experts:
        try:
            base = build_base(implementation, size, args.device, DTYPES[args.dtype])
            built = {f"{implementation}, {adapter}": build_step(adapter, base, ids) for adapter in ADAPTERS}
            losses |= {name: step().item() for name, step in built.items()}
        except Exception as error:  # kernels fail in many ways, and each says something about this machine
            rows.append(failure(implementation, error))
            continue
        steps |= built
    times = time_rounds(steps, args.device, args.repeats, args.warmup)
    rows += [[f"{name}, ms", *Spread.of(figures).cells()] for name, figures in times.items()]
    for implementation in dict.fromkeys(name.split(", ")[0] for name in steps):
        for adapter in ADAPTERS:
            name, reference = f"{implementation}, {adapter}", losses.get(f"{REFERENCE}, {adapter}")
            if adapter != "frozen":
                rows.append([f"{name} / frozen", *ratio(times, name, f"{implementation}, frozen").cells()])
            if reference is not None and implementation != REFERENCE:
                rows.append([f"{name}: loss / {REFERENCE}'s - 1", f"{losses[name] / reference - 1:.1e}", "", ""])
    report(args, rows)


if __name__ == "__main__":
    main()
