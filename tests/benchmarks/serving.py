"""Tokens per second of a PERFT adapter served by vLLM, of its base alone, and of PEFT one request at a time.

python -m tests.benchmarks.serving BASE ADAPTER [--requests 16] [--new-tokens 16] [--repeats 5]

Two engines in one process take turns, both in vLLM's Transformers backend; each round has prompts of its own. On a CPU
the process's own time counts, so that other programs do not: give it one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]


def prompts_of(arguments: argparse.Namespace, seed: int) -> Prompts:
    """Random token ids, 16 to 128 a prompt; the lengths are the same in every round."""
    lengths, draw = random.Random(0), random.Random(seed)  # nosec B311
    return [[draw.randint(100, 10000) for _ in range(lengths.randint(16, 128))] for _ in range(arguments.requests)]


def generate_with_peft(arguments: argparse.Namespace) -> Callable[[Prompts], None]:
    """Answers prompts one by one."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import axolotl_moe_peft  # noqa: F401  registers the methods

    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": arguments.new_tokens}

    def generate(prompts: Prompts) -> None:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy)

    return generate


def generate_with_vllm(arguments: argparse.Namespace, **options: Any) -> Callable[[Prompts], None]:
    """Answers all prompts at once."""
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": 1024, "skip_tokenizer_init": True, "enforce_eager": True}
    llm = LLM(arguments.base, dtype="float32", **sizes, **options)
    greedy = SamplingParams(temperature=0, max_tokens=arguments.new_tokens, ignore_eos=True, detokenize=False)

    def generate(prompts: Prompts) -> None:
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)

    return generate


def seconds() -> float:
    import torch

    return time.perf_counter() if torch.accelerator.is_available() else time.process_time()


def tokens_per_second(generate: Callable[[Prompts], None], prompts: Prompts, arguments: argparse.Namespace) -> float:
    start = seconds()
    generate(prompts)
    return len(prompts) * arguments.new_tokens / (seconds() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

    # first: an engine makes transformers' classes those of vLLM
    one_by_one = generate_with_peft(arguments)
    alone = tokens_per_second(one_by_one, prompts_of(arguments, 0)[:4], arguments)
    del one_by_one

    overrides = {"architectures": ["PerftForCausalLM"], "perft_adapter": os.path.abspath(arguments.adapter)}
    ways = {
        "base": generate_with_vllm(arguments, model_impl="transformers"),
        "adapter": generate_with_vllm(arguments, hf_overrides=overrides),
    }
    rounds = []
    for number in range(arguments.repeats + 1):
        prompts = prompts_of(arguments, number)
        rounds.append({way: tokens_per_second(generate, prompts, arguments) for way, generate in ways.items()})
        print(", ".join(f"{way} {figure:.1f} tokens/s" for way, figure in rounds[-1].items()), flush=True)
    ratios = [figures["adapter"] / figures["base"] for figures in rounds[1:]]  # the first warms up
    served = statistics.median(figures["adapter"] for figures in rounds[1:])
    print(f"with / without the adapter: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"`generate` one by one {alone:.1f} tokens/s, of which the adapter served is {served / alone:.1f} times")


if __name__ == "__main__":
    main()
