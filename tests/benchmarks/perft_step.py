"""Whole training steps of an OLMoE: routed and embedded PERFT beside the frozen base and PEFT's LoRA on the experts.

Each candidate runs forward, loss, backward and, but for the frozen base, AdamW. Inputs require gradients in all of
them, as in Axolotl's adapter runs, so that every backward goes the full depth. The candidates share the base's
parameters. Peak memory is taken first: the resident memory of a fresh process on a CPU, the allocated memory on a GPU.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import resource
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from axolotl_moe_peft import PerftConfig
from tests.benchmarks.timing import DTYPES, Spread, argument_parser, ratio, report, time_rounds

RANK, ALPHA = 16, 32


@dataclass(frozen=True)
class Size:
    """An OLMoE and its batch, rows times tokens."""

    batch: int
    sequence: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_experts: int = 64
    num_experts_per_tok: int = 8

    @property
    def config(self) -> OlmoeConfig:
        return OlmoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            use_cache=False,
            pad_token_id=None,
            eos_token_id=None,
        )


SIZES = {
    # The vocabulary is small so that with two layers the head does not outweigh the experts.
    "two-layers": Size(2, 512, 8192, 1024, 512, 2),
    "olmoe-1b-7b": Size(1, 4096, 50304, 2048, 1024, 16),
    "tiny": Size(2, 16, 128, 64, 32, 1, num_experts=8, num_experts_per_tok=2),
}
ADAPTERS = {
    "frozen": None,
    "routed": PerftConfig(
        variant="routed", num_experts=8, num_experts_per_tok=2, rank=RANK, alpha=ALPHA, task_type="CAUSAL_LM"
    ),
    "routed, dropout": PerftConfig(
        variant="routed",
        num_experts=8,
        num_experts_per_tok=2,
        rank=RANK,
        alpha=ALPHA,
        dropout=0.05,
        task_type="CAUSAL_LM",
    ),
    "embedded": PerftConfig(variant="embedded", rank=RANK, alpha=ALPHA, task_type="CAUSAL_LM"),
    "lora": LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    ),
    "lora q, v": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}
TIME_RATIOS = (
    ("routed", "frozen"),
    ("routed, dropout", "frozen"),
    ("embedded", "frozen"),
    ("lora", "frozen"),
    ("lora q, v", "frozen"),
    ("embedded", "lora"),
    ("routed", "lora q, v"),
)
MEMORY_RATIOS = (("embedded", "lora"), ("routed", "lora"))


def build_base(size: Size, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = OlmoeForCausalLM._from_config(size.config, dtype=dtype)
    return model.requires_grad_(False).train()


def attach(candidate: str, base: nn.Module) -> nn.Module:
    """A model with the candidate's adapter and the base's own parameters, not copies of them."""
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    model.enable_input_require_grads()
    return model if ADAPTERS[candidate] is None else get_peft_model(model, ADAPTERS[candidate])


def build_step(candidate: str, base: nn.Module, size: Size) -> Callable[[], torch.Tensor]:
    """One training step of the candidate on a fixed random batch; it returns the loss."""
    model = attach(candidate, base)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True) if trainable else None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocab_size, (size.batch, size.sequence), generator=generator).to(model.device)

    def step() -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def allocated_peak(candidate: str, base: nn.Module, size: Size) -> float:
    """Peak MiB on a GPU over two steps, the base model and the optimiser's state included."""
    step = build_step(candidate, base, size)
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    peak = torch.cuda.max_memory_allocated() / 2**20
    del step
    gc.collect()
    return peak


def resident_peak(candidate: str, size: Size, dtype: torch.dtype, threads: int) -> float:
    """Peak MiB on a CPU over two steps, the optimiser's state included; for a process that has done nothing else."""
    torch.set_num_threads(threads)
    step = build_step(candidate, build_base(size, "cpu", dtype), size)
    before = _resident_bytes()
    step()
    step()
    peak = _resident_bytes()
    if peak == before:
        raise RuntimeError(f"{candidate}: building the model took more memory than its steps, which hides their peak")
    return peak / 2**20


def resident_peaks(size: Size, dtype: torch.dtype, threads: int, repeats: int) -> dict[str, list[float]]:
    """`resident_peak` of every candidate, `repeats` times, one process each.

    To be called while this process is still small: a child's peak starts from its parent's size.
    """
    # glibc then returns freed tensors at once, so that a peak is what was alive and not what was kept for reuse
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**19))
    peaks: dict[str, list[float]] = {name: [] for name in ADAPTERS}
    for _ in range(repeats):
        for name in ADAPTERS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                peaks[name].append(pool.submit(resident_peak, name, size, dtype, threads).result())
    return peaks


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def main() -> None:
    parser = argument_parser(__doc__, repeats=10, sizes=list(SIZES))
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the measured ones")
    parser.add_argument("--memory-repeats", type=int, default=3, help="times per candidate; 0 for no memory")
    args = parser.parse_args()
    dtype, size = DTYPES[args.dtype], SIZES[args.size]
    memory: dict[str, list[float]] = {}
    if args.device == "cpu":
        memory = resident_peaks(size, dtype, args.threads, args.memory_repeats)
    torch.set_num_threads(args.threads)
    base = build_base(size, args.device, dtype)
    if args.device == "cuda":
        memory = {n: [allocated_peak(n, base, size) for _ in range(args.memory_repeats)] for n in ADAPTERS}
    steps = {name: build_step(name, base, size) for name in ADAPTERS}
    times = time_rounds(steps, args.device, args.repeats, args.warmup)

    rows = [[f"step, {name}, ms", *Spread.of(times[name]).cells()] for name in ADAPTERS]
    rows += [[f"step, {a} / {b}", *ratio(times, a, b).cells()] for a, b in TIME_RATIOS]
    if args.memory_repeats:
        frozen = statistics.median(memory["frozen"])
        added = {name: [peak - frozen for peak in memory[name]] for name in ADAPTERS if name != "frozen"}
        rows.append(["peak memory, frozen, MiB", *Spread.of(memory["frozen"]).cells()])
        rows += [[f"peak memory added, {name}, MiB", *Spread.of(figures).cells()] for name, figures in added.items()]
        rows += [[f"peak memory added, {a} / {b}", *ratio(added, a, b).cells()] for a, b in MEMORY_RATIOS]
    report(args, rows)


if __name__ == "__main__":
    main()
