"""Training steps of a dense Llama: routed PERFT beside its MLPs, and Axolotl's MixLoRA inside them.

Both have 8 experts of rank 16, of which a token takes 2, and a balance loss with the coefficient 0.01. Each step runs
forward, loss, backward and, but for the frozen base, AdamW. Peak memory is the resident memory of a fresh process on a
CPU, the allocated memory on a GPU. Needs axolotl 0.20 or later. With `--base` (a folder of such a model with its
tokenizer) the base is that one, the texts are those of the quick start, and losses after equal steps are compared.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from axolotl.integrations.mixlora.loss import collect_mixlora_aux_loss
from axolotl.integrations.mixlora.patching import patch_model_with_mixlora
from axolotl.utils.dict import DictDefault
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from axolotl_moe_peft import PerftConfig
from tests.benchmarks.perft_step import _resident_bytes
from tests.benchmarks.timing import DTYPES, Spread, argument_parser, ratio, report, time_rounds

NUM_EXPERTS, TOP_K, RANK, ALPHA, BALANCE = 8, 2, 16, 32, 0.01
CANDIDATES = ("frozen", "perft", "mixlora")
ROWS = Path(__file__).parents[2] / "example_yamls" / "quickstart" / "gsm8k_train.jsonl"
SIZES = {
    # HuggingFaceTB/SmolLM2-135M
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "tiny": {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
}


def build_base(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(args.device):
        if args.base:
            model = AutoModelForCausalLM.from_pretrained(args.base, dtype=DTYPES[args.dtype])
        else:
            config = LlamaConfig(**{"num_attention_heads": 4, **SIZES[args.size]}, use_cache=False)
            model = LlamaForCausalLM._from_config(config, dtype=DTYPES[args.dtype])
    return model.requires_grad_(False).train()


def attach(candidate: str, base: nn.Module) -> nn.Module:
    """A model with the candidate's adapter and the base's own parameters, not copies of them."""
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    model.enable_input_require_grads()
    torch.manual_seed(1)
    if candidate == "perft":
        config = PerftConfig(
            target_modules="mlp",
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=TOP_K,
            rank=RANK,
            alpha=ALPHA,
            router_aux_loss_coef=BALANCE,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)
    if candidate == "mixlora":
        keys = {"mixlora_num_experts": NUM_EXPERTS, "mixlora_top_k": TOP_K, "lora_r": RANK, "lora_alpha": ALPHA}
        patch_model_with_mixlora(model, DictDefault(keys))
    return model


def batches(args: argparse.Namespace, model: nn.Module) -> Iterator[Tensor]:
    """Batches without end; the same for every candidate."""
    generator = torch.Generator().manual_seed(2)
    if args.base:
        texts = [json.loads(line) for line in ROWS.read_text().splitlines()]
        tokenizer = AutoTokenizer.from_pretrained(args.base)
        ids = torch.tensor([i for text in texts for i in tokenizer(json.dumps(text))["input_ids"]])
    else:
        ids = torch.randint(model.config.vocab_size, (2**16,), generator=generator)
    while True:
        starts = torch.randint(len(ids) - args.sequence, (args.batch,), generator=generator)
        yield torch.stack([ids[start : start + args.sequence] for start in starts]).to(model.device)


def build_step(candidate: str, base: nn.Module, args: argparse.Namespace) -> Callable[[], Tensor]:
    """One training step of the candidate; it returns the main loss."""
    model = attach(candidate, base)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, fused=True) if trainable else None
    data = batches(args, base)

    def step() -> Tensor:
        ids = next(data)
        loss = model(input_ids=ids, labels=ids).loss
        balance = collect_mixlora_aux_loss(model, BALANCE) if candidate == "mixlora" else 0.0  # ours is in the layers
        (loss + balance).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def peak(candidate: str, args: argparse.Namespace) -> float:
    """Peak MiB over two steps; on a CPU for a process that has done nothing else."""
    torch.set_num_threads(args.threads)
    step = build_step(candidate, build_base(args), args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    found = torch.cuda.max_memory_allocated() if args.device == "cuda" else _resident_bytes()
    del step
    gc.collect()
    return found / 2**20


def peaks(args: argparse.Namespace) -> dict[str, float]:
    """The median of `peak` for every candidate, one process each."""
    # glibc then returns freed tensors at once, so that a peak is what was alive and not what was kept for reuse
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**19))
    found = {}
    for name in CANDIDATES:
        figures = []
        for _ in range(args.memory_repeats):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                figures.append(pool.submit(peak, name, args).result())
        found[name] = statistics.median(figures)
    return found


def main() -> None:
    parser = argument_parser(__doc__, repeats=5, sizes=list(SIZES))
    parser.add_argument("--base", type=Path, help="a folder with a model and its tokenizer, instead of random weights")
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--loss-steps", type=int, default=40, help="steps after which losses are compared")
    parser.add_argument("--memory-repeats", type=int, default=3, help="times per candidate; 0 for no memory")
    args = parser.parse_args()
    memory = peaks(args) if args.memory_repeats else {}
    torch.set_num_threads(args.threads)
    base = build_base(args)
    times = time_rounds({n: build_step(n, base, args) for n in CANDIDATES}, args.device, args.repeats, warmup=1)
    rows = [[f"step, {name}, ms", *Spread.of(times[name]).cells()] for name in CANDIDATES]
    pairs = (("perft", "frozen"), ("mixlora", "frozen"), ("perft", "mixlora"))
    rows += [[f"step, {a} / {b}", *ratio(times, a, b).cells()] for a, b in pairs]
    added = {name: memory[name] - memory["frozen"] for name in memory if name != "frozen"}
    rows += [[f"peak memory added, {name}, MiB", *Spread.of([size]).cells()] for name, size in added.items()]
    if added:
        rows.append(["peak memory added, perft / mixlora", *Spread.of([added["perft"] / added["mixlora"]]).cells()])
    for name in ("perft", "mixlora"):
        trainable = sum(p.numel() for p in attach(name, base).parameters() if p.requires_grad)
        rows.append([f"trainable parameters, {name}: {trainable:,}", "", "", ""])
        if args.base and args.loss_steps:
            step = build_step(name, base, args)
            losses = [float(step()) for _ in range(args.loss_steps)]
            last = losses[-max(1, args.loss_steps // 4) :]
            text = f"loss, {name}, the last {len(last)} of {len(losses)} steps (first step {losses[0]:.4f})"
            rows.append([text, *Spread.of(last).cells()])
    report(args, rows)


if __name__ == "__main__":
    main()
