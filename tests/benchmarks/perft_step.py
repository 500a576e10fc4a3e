"""Whole training steps of an OLMoE: routed and embedded PERFT beside the frozen base and PEFT's LoRA on the experts.

Each candidate runs forward, loss, backward and, but for the frozen base, AdamW. Inputs require gradients in all of
them, as in Axolotl's adapter runs, so that every backward goes the full depth. The candidates share the base's
parameters. Peak memory is taken first, each candidate in a fresh process: the resident memory on a CPU, the allocated
memory on a GPU.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import resource
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from peft import LoraConfig, get_peft_model
from timing import DTYPES, Spread, argument_parser, describe_run, print_table, ratio, time_rounds
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from axolotl_moe_peft import PerftConfig

BATCH, SEQUENCE = 2, 512
RANK, ALPHA = 16, 32
# The vocabulary is small so that with two layers the head does not outweigh the experts.
BASE = OlmoeConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=16,
    num_experts=64,
    num_experts_per_tok=8,
    use_cache=False,
    pad_token_id=None,
    eos_token_id=None,
)
ADAPTERS = {
    "frozen": None,
    "routed": PerftConfig(
        variant="routed", num_experts=8, num_experts_per_tok=2, rank=RANK, alpha=ALPHA, task_type="CAUSAL_LM"
    ),
    "embedded": PerftConfig(variant="embedded", rank=RANK, alpha=ALPHA, task_type="CAUSAL_LM"),
    "lora": LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    ),
}
TIME_RATIOS = (("routed", "frozen"), ("embedded", "frozen"), ("lora", "frozen"), ("embedded", "lora"))
MEMORY_RATIOS = (("embedded", "lora"), ("routed", "lora"))


def build_base(device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return OlmoeForCausalLM._from_config(BASE, dtype=dtype).requires_grad_(False).to(device).train()


def attach(candidate: str, base: nn.Module) -> nn.Module:
    """A model with the candidate's adapter and the base's own parameters, not copies of them."""
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    model.enable_input_require_grads()
    return model if ADAPTERS[candidate] is None else get_peft_model(model, ADAPTERS[candidate])


def build_step(candidate: str, base: nn.Module) -> Callable[[], None]:
    """One training step of the candidate on a fixed random batch."""
    model = attach(candidate, base)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True) if trainable else None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(BASE.vocab_size, (BATCH, SEQUENCE), generator=generator).to(model.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def peak_memory(candidate: str, device: str, dtype: torch.dtype, threads: int) -> float:
    """Peak MiB over two steps, the optimiser's state included; for a process that has done nothing else."""
    torch.set_num_threads(threads)
    step = build_step(candidate, build_base(device, dtype))
    before = _peak_bytes(device)
    step()
    step()
    peak = _peak_bytes(device)
    if peak == before:
        raise RuntimeError(f"{candidate}: building the model took more memory than its steps, which hides their peak")
    return peak / 2**20


def peak_memories(device: str, dtype: torch.dtype, threads: int, repeats: int) -> dict[str, list[float]]:
    """`peak_memory` of every candidate, `repeats` times, one process each.

    To be called while this process is still small: a child's peak starts from its parent's size.
    """
    # glibc then returns freed tensors at once, so that a peak is what was alive and not what was kept for reuse
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**19))
    peaks: dict[str, list[float]] = {name: [] for name in ADAPTERS}
    for _ in range(repeats):
        for name in ADAPTERS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                peaks[name].append(pool.submit(peak_memory, name, device, dtype, threads).result())
    return peaks


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def main() -> None:
    parser = argument_parser(__doc__, repeats=10)
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the measured ones")
    parser.add_argument("--memory-repeats", type=int, default=3, help="processes per candidate; 0 for no memory")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    memory = peak_memories(args.device, dtype, args.threads, args.memory_repeats)
    torch.set_num_threads(args.threads)
    base = build_base(args.device, dtype)
    steps = {name: build_step(name, base) for name in ADAPTERS}
    times = time_rounds(steps, args.device, args.repeats, args.warmup)

    rows = [[f"step, {name}, ms", *Spread.of(times[name]).cells()] for name in ADAPTERS]
    rows += [[f"step, {a} / {b}", *ratio(times, a, b).cells()] for a, b in TIME_RATIOS]
    if args.memory_repeats:
        frozen = statistics.median(memory["frozen"])
        added = {name: [peak - frozen for peak in memory[name]] for name in ADAPTERS if name != "frozen"}
        rows.append(["peak memory, frozen, MiB", *Spread.of(memory["frozen"]).cells()])
        rows += [[f"peak memory added, {name}, MiB", *Spread.of(figures).cells()] for name, figures in added.items()]
        rows += [[f"peak memory added, {a} / {b}", *ratio(added, a, b).cells()] for a, b in MEMORY_RATIOS]
    print(describe_run(args))
    print_table(("measured", "median", "min", "max"), rows)


if __name__ == "__main__":
    main()
