"""Each method's way into vLLM's server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from ..perft import PerftConfig
from ..perft.selection import find_moe_blocks
from ..pt_moe import PTMoeConfig
from ..tt_lora import TTLoraConfig
from ..tt_lora.export import export_to_lora
from ..tt_lora_moe import TTLoraMoeConfig
from ..tt_lora_moe.export import export_experts
from .served import Served
from .vllm_front import ExpertOfThePrompt, SoftPrompts
from .vllm_server import serve

# of LoRAs, as vLLM's kernels have them
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def serve_by_vllm(served: Served, options: list[str]) -> None:
    """Serve an adapter by `vllm serve` with these options of its own.

    Raises:
        ValueError: the adapter cannot be served by vLLM, or not with these options.
    """
    by_method: dict[type, Callable[[Served, list[str]], None]] = {
        PerftConfig: _perft_by_vllm,
        TTLoraConfig: _tt_lora_by_vllm,
        TTLoraMoeConfig: _tt_lora_moe_by_vllm,
        PTMoeConfig: _pt_moe_by_vllm,
    }
    revision = ["--revision", served.config.revision] if served.config.revision else []
    common = [served.base, "--tokenizer", served.tokenizer, "--port", str(served.port), *revision, *options]
    by_method[type(served.config)](served, common)


def _perft_by_vllm(served: Served, common: list[str]) -> None:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(served.base, revision=served.config.revision)
        )
    architecture = "PerftForCausalLM" if find_moe_blocks(model) else "PerftDenseForCausalLM"
    overrides = {"architectures": [architecture], "perft_adapter": str(served.folder)}
    serve([*common, "--served-model-name", served.name, "--hf-overrides", json.dumps(overrides)])


def _tt_lora_by_vllm(served: Served, common: list[str]) -> None:
    _check_plain_lora(served.config)
    folder = served.scratch / "lora"
    export_to_lora(served.folder, folder)
    serve([*common, *_loras({served.name: folder}, served.config.rank)])


def _tt_lora_moe_by_vllm(served: Served, common: list[str]) -> None:
    folders = export_experts(served.folder, served.scratch, served.base)
    # the pool's own name stands for whichever expert is chosen; a LoRA of that name lets requests for it in
    loras = {served.name: next(iter(folders.values()))}
    loras |= {f"{served.name}/{expert}": folder for expert, folder in folders.items()}
    rank = max(expert["rank"] for expert in served.config.experts)
    serve([*common, *_loras(loras, rank)], lambda engine: ExpertOfThePrompt(str(served.folder), served.name, engine))


def _pt_moe_by_vllm(served: Served, common: list[str]) -> None:
    # transformers' modules, which take embeddings as training gave them; some models of vLLM's scale them once more
    options = ["--served-model-name", served.name, "--enable-prompt-embeds", "--model-impl", "transformers"]
    serve([*common, *options], lambda engine: SoftPrompts(str(served.folder), engine))


def _loras(folders: dict[str, Path], rank: int) -> list[str]:
    fitting = next((most for most in _LORA_RANKS if most >= rank), None)
    if fitting is None:
        raise ValueError(f"vLLM takes LoRAs up to rank {_LORA_RANKS[-1]}, this one has {rank}. Merge it instead.")
    modules = [f"{name}={folder}" for name, folder in folders.items()]
    return [
        "--enable-lora",
        "--max-lora-rank",
        str(fitting),
        "--max-loras",
        str(len(folders)),
        "--lora-modules",
        *modules,
    ]


def _check_plain_lora(config: TTLoraConfig) -> None:
    beside = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name)]
    if beside:
        raise ValueError(
            f"vLLM's LoRAs have no {', '.join(beside)}, which this adapter was trained with. Merge it (`axolotl "
            "merge-lora`) and serve the merged model, or use --engine transformers."
        )
