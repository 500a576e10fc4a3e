"""TT-LoRA MoE beside its base model: router steps, forward passes through the experts, and decoding.

The base has the sizes of SmolLM2-135M or Llama-3.2-1B (random weights); the experts are TT-LoRA of rank 5 on q_proj
and v_proj. Decoding is one sequence with a cache; its other side is the base with one expert merged.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_moe_peft import TTLoraConfig, TTLoraMoeConfig
from tests.benchmarks.timing import DTYPES, Spread, argument_parser, ratio, report, time_rounds

BATCH, PROMPT, NEW_TOKENS = 8, 64, 16
FEW, SOME, MANY = 2, 17, 64
_COMMON = {"tie_word_embeddings": True, "pad_token_id": None, "eos_token_id": None}
SIZES = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        **_COMMON,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        **_COMMON,
    ),
    "tiny": LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **_COMMON,
    ),
}
RATIOS = (
    ("training step, 17 experts", "training step, 2 experts"),
    ("training step, 64 experts", "training step, 2 experts"),
    ("forward, 17 experts", "forward, 2 experts"),
    ("forward, 64 experts", "forward, 2 experts"),
    ("training step, 2 experts", "forward, base"),
    ("decoding, 64 experts", "decoding, merged expert"),
)


def build_base(config: LlamaConfig, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def attach(base: nn.Module, folder: Path, num_experts: int) -> PeftModel:
    """A pool beside the base's own parameters, not copies of them."""
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    entries = [{"name": f"e{e}", "path": str(folder / f"e{e % FEW}")} for e in range(num_experts)]
    torch.manual_seed(1)
    return get_peft_model(model, TTLoraMoeConfig(experts=entries, task_type="CAUSAL_LM"))


def router_step(model: PeftModel, ids: torch.Tensor) -> Callable[[], None]:
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100
    experts = torch.arange(len(ids), device=ids.device) % FEW

    def step() -> None:
        model.train()
        model(input_ids=ids, labels=labels, expert_labels=experts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def call() -> None:
        model.eval()(input_ids=ids, use_cache=False)

    return call


@torch.no_grad()
def decoding(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    prompt = ids[:1, :PROMPT]
    cache = model.eval()(input_ids=prompt, use_cache=True).past_key_values

    @torch.no_grad()
    def call() -> None:
        model.eval()
        for _ in range(NEW_TOKENS):
            model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-NEW_TOKENS)

    return call


def main() -> None:
    parser = argument_parser(__doc__, repeats=15, sizes=list(SIZES))
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the measured ones")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of each of the 8 rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = build_base(SIZES[args.size], args.device, DTYPES[args.dtype])
    ids = torch.randint(base.config.vocab_size, (BATCH, args.sequence), generator=torch.Generator().manual_seed(2))
    ids = ids.to(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for e in range(FEW):
            torch.manual_seed(e)
            config = TTLoraConfig(task_type="CAUSAL_LM")
            expert = get_peft_model(copy.deepcopy(base, memo={id(p): p for p in base.parameters()}), config)
            expert.save_pretrained(folder / f"e{e}")
        pools = {num_experts: attach(base, folder, num_experts) for num_experts in (FEW, SOME, MANY)}
        merged = PeftModel.from_pretrained(copy.deepcopy(base), folder / "e0").merge_and_unload()
    candidates = {"forward, base": forward(base, ids), "decoding, merged expert": decoding(merged, ids)}
    for num_experts, model in pools.items():
        candidates[f"training step, {num_experts} experts"] = router_step(model, ids)
        candidates[f"forward, {num_experts} experts"] = forward(model, ids)
        candidates[f"decoding, {num_experts} experts"] = decoding(model, ids)
    times = time_rounds(candidates, args.device, args.repeats, args.warmup)
    rows = [[f"{name}, ms", *Spread.of(figures).cells()] for name, figures in times.items()]
    rows += [[f"{a} / {b}", *ratio(times, a, b).cells()] for a, b in RATIOS]
    report(args, rows)


if __name__ == "__main__":
    main()
