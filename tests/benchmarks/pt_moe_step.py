"""PT-MoE on a Llama of SmolLM2's width or Llama-3.2-1B's: steps beside PEFT's prompt tuning, packing, and decoding.

- step: forward, loss, backward and AdamW on one padded batch, with the same number of virtual tokens.
- packing: one pass over rows of GSM8K's lengths, padded to the longest of each batch or packed, a prompt each; real
  tokens per second, and LoRA beside it, which has no prompts: what packing itself gains here. The time is that of
  forward and backward. The loss and the gradients of each way of attention are compared with those of the rows one by
  one. A way that this machine cannot run is a row that says why.
- decoding: a token with everything before it in the cache, beside the bare base.

The candidates share the base's parameters. No tokenizer is needed: words, digits and punctuation marks are counted,
which for this data is what a tokenizer that splits numbers into digits makes of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from axolotl_moe_peft import PTMoeConfig
from tests.benchmarks.timing import DTYPES, Spread, argument_parser, failure, ratio, report, time_rounds

DATA = Path(__file__).parents[2] / "example_yamls/quickstart/gsm8k_train.jsonl"
VIRTUAL_TOKENS = 40
INPUT, DECODED = 160, 16
MICRO_BATCH_SIZES = (4, 8)


def base_config(
    vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=False,
    )


SIZES = {
    # The vocabulary is small so that with fewer layers the head does not outweigh the rest.
    "four-layers": base_config(8192, 576, 1536, 4, 9, 3),
    "llama-3.2-1b": base_config(128256, 2048, 8192, 16, 32, 8),
    "tiny": base_config(128, 64, 128, 2, 4, 2),
}
PT_MOE = PTMoeConfig(num_virtual_tokens=VIRTUAL_TOKENS, init_text=None, task_type="CAUSAL_LM")
PT_MOE_WITHOUT_NOISE = PTMoeConfig(num_virtual_tokens=VIRTUAL_TOKENS, router_noise_std=0.0, task_type="CAUSAL_LM")
PROMPT_TUNING = PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type="CAUSAL_LM")
LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


def build_base(config: LlamaConfig, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def attach(config: PeftConfig | None, base: nn.Module) -> nn.Module:
    """A model with an adapter and the base's own parameters, not copies of them."""
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    return model if config is None else get_peft_model(model, config)


def gsm8k_lengths(count: int) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of the first rows."""
    lengths = []
    for line in DATA.read_text().splitlines()[:count]:
        prompt, answer = (m["content"] for m in json.loads(line)["messages"])
        lengths.append(tuple(len(re.findall(r"\d|[^\W\d]+|[^\w\s]", text)) for text in (prompt, answer)))
    return lengths


def random_rows(lengths: list[tuple[int, int]], vocab_size: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of rows of these lengths."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prompt, answer in lengths:
        ids = torch.randint(1, vocab_size, (prompt + answer,), generator=generator).to(device)
        rows.append((ids, torch.cat([torch.full_like(ids[:prompt], -100), ids[prompt:]])))
    return rows


def padded_batches(rows: list[tuple[Tensor, Tensor]], size: int) -> list[dict[str, Tensor]]:
    batches = []
    for start in range(0, len(rows), size):
        ids, labels = zip(*rows[start : start + size])
        ids = pad_sequence(ids, batch_first=True)
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()})
    return batches


def packed_batches(rows: list[tuple[Tensor, Tensor]], sequence_len: int) -> list[dict[str, Tensor]]:
    """One packed row each, the longest rows first into the first that has room; filled up as Axolotl does."""
    bins: list[list[tuple[Tensor, Tensor]]] = []
    for row in sorted(rows, key=lambda row: len(row[0]), reverse=True):
        room = [b for b in bins if sum(len(ids) for ids, _ in b) + len(row[0]) <= sequence_len]
        (room[0] if room else bins.append([]) or bins[-1]).append(row)
    batches = []
    for packed in bins:
        fill = sequence_len - sum(len(ids) for ids, _ in packed)
        empty = packed[0][0].new_zeros(fill)
        parts = [*packed, (empty, torch.full_like(empty, -100))]
        positions = [torch.arange(len(ids), device=ids.device) for ids, _ in parts]
        columns = (torch.cat(column)[None] for column in (*zip(*parts), positions))
        batches.append(dict(zip(("input_ids", "labels", "position_ids"), columns)))
    return batches


def build_step(config: PeftConfig, base: nn.Module, batch: dict[str, Tensor]) -> Callable:
    """One training step on the batch."""
    model = attach(config, base).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_pass(
    config: PeftConfig, base: nn.Module, batches: list[dict[str, Tensor]], attention: str = "sdpa"
) -> Callable:
    """Forward and backward of all batches."""
    model = attach(config, base).train()
    model.set_attn_implementation(attention)

    def run() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    return run


def loss_and_gradients(
    base: nn.Module, batches: list[dict[str, Tensor]], attention: str
) -> tuple[float, list[Tensor]]:
    """Of all labels' summed cross entropy."""
    model = attach(PT_MOE_WITHOUT_NOISE, base).train()
    model.set_attn_implementation(attention)
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss * (batch["labels"][:, 1:] != -100).sum()
        loss.backward()
        total += loss.item()
    return total, [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def compare_packed(
    base: nn.Module, rows: list[tuple[Tensor, Tensor]], sequence_len: int, attention: str
) -> list[list[str]]:
    """How far packed rows are from the rows one by one: relative differences."""
    loss, gradients = loss_and_gradients(base, padded_batches(rows, 1), "sdpa")
    packed_loss, packed_gradients = loss_and_gradients(base, packed_batches(rows, sequence_len), attention)
    worst = max(
        ((ours - theirs).norm() / theirs.norm()).item()
        for ours, theirs in zip(packed_gradients, gradients, strict=True)
        if theirs.any()
    )
    figures = {"loss, packed / one by one - 1": packed_loss / loss - 1, "gradients, packed, worst difference": worst}
    return [[f"{name}, {attention}", f"{figure:.1e}", "", ""] for name, figure in figures.items()]


def build_decoding(config: PTMoeConfig | None, base: nn.Module) -> Callable:
    """DECODED tokens after an input of INPUT, a call each, as generate makes them."""
    model = attach(config, base).eval()
    model = model if config is None else model.get_base_model()  # as generate calls it
    ids = torch.randint(1, base.config.vocab_size, (1, INPUT + DECODED)).to(base.device)
    mask, cache = torch.ones_like(ids), DynamicCache(config=base.config)

    @torch.no_grad()
    def decode() -> None:
        for i in range(DECODED):
            past = INPUT + i
            model(
                input_ids=ids[:, past : past + 1],
                attention_mask=mask[:, : past + 1],
                position_ids=torch.full_like(ids[:, :1], past),
                past_key_values=cache,
                use_cache=True,
            )
        cache.crop(-DECODED)

    with torch.no_grad():
        model(input_ids=ids[:, :INPUT], attention_mask=mask[:, :INPUT], past_key_values=cache, use_cache=True)
    return decode


def measure(args: argparse.Namespace) -> list[list[str]]:
    base = build_base(SIZES[args.size], args.device, DTYPES[args.dtype])
    lengths = gsm8k_lengths(args.rows)
    rows = random_rows(lengths, base.config.vocab_size, args.device)
    packed = packed_batches(rows, args.sequence_len)
    passes = {f"padded, {size} a batch": padded_batches(rows, size) for size in MICRO_BATCH_SIZES}
    candidates = {
        "step, pt_moe": build_step(PT_MOE, base, padded_batches(rows, 8)[0]),
        "step, prompt tuning": build_step(PROMPT_TUNING, base, padded_batches(rows, 8)[0]),
        "decoding, pt_moe": build_decoding(PT_MOE, base),
        "decoding, base": build_decoding(None, base),
        **{name: build_pass(PT_MOE, base, batches) for name, batches in passes.items()},
        **{f"lora, {name}": build_pass(LORA, base, batches) for name, batches in passes.items()},
    }
    table = []
    for attention in args.attention:
        try:
            table += compare_packed(base, rows, args.sequence_len, attention)
        except Exception as error:  # kernels fail in many ways, and each says something about this machine
            table.append(failure(f"packed, {attention}", error))
        else:
            name = f"packed, {attention}"
            passes[name], candidates[name] = packed, build_pass(PT_MOE, base, packed, attention)
            candidates[f"lora, {name}"] = build_pass(LORA, base, packed, attention)
    times = time_rounds(candidates, args.device, args.repeats, args.warmup)
    real = sum(map(sum, lengths))
    table += [[f"{name}, ms", *Spread.of(figures).cells()] for name, figures in times.items()]
    for name, batches in passes.items():
        positions = sum(batch["input_ids"].numel() for batch in batches)
        table.append([f"real tokens / s, {name}", *Spread.of([real / ms * 1e3 for ms in times[name]]).cells()])
        table.append([f"share of real tokens, {name}", f"{real / positions:.3g}", "", ""])
    ratios = {
        "step, pt_moe / prompt tuning": ratio(times, "step, pt_moe", "step, prompt tuning"),
        "decoding, pt_moe / base": ratio(times, "decoding, pt_moe", "decoding, base"),
    }
    for fast in passes:
        for slow in passes:
            if fast.startswith("packed") and slow.startswith("padded"):
                ratios[f"real tokens / s, {fast} / {slow}"] = ratio(times, slow, fast)
                ratios[f"the same, lora, {fast} / {slow}"] = ratio(times, f"lora, {slow}", f"lora, {fast}")
    return table + [[name, *spread.cells()] for name, spread in ratios.items()]


def main() -> None:
    parser = argument_parser(__doc__, repeats=10, sizes=list(SIZES))
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the measured ones")
    parser.add_argument("--rows", type=int, default=32, help="of GSM8K")
    parser.add_argument("--sequence-len", type=int, default=512, help="of the packed rows")
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="of the packed rows: names of transformers'")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report(args, measure(args))


if __name__ == "__main__":
    main()
