"""Gradients with and without gradient checkpointing, reentrant and not: relative differences, nothing is timed.

A small OLMoE with each adapter that has a router, router losses on, noise off. `none, again` is the run without
checkpointing repeated: what the order of sums alone changes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig, TTLoraMoeConfig
from tests.benchmarks.timing import DTYPES, argument_parser, report

SIZES = {"small": (1024, 512, 4, 64, 8, 512), "tiny": (64, 32, 2, 8, 2, 16)}
MODES: dict[str, bool | None] = {"none": None, "none, again": None, "non-reentrant": False, "reentrant": True}
TASK = {"task_type": "CAUSAL_LM"}


def build_base(size: str, device: str, dtype: torch.dtype) -> nn.Module:
    hidden_size, intermediate_size, num_layers, num_experts, num_experts_per_tok, _ = SIZES[size]
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = OlmoeForCausalLM._from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def save_experts(base: nn.Module, folder: Path) -> list[dict[str, str]]:
    """Two TT-LoRA experts of the base."""
    experts = []
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        get_peft_model(share(base), TTLoraConfig(**TASK)).save_pretrained(folder / name)
        experts.append({"name": name, "path": str(folder / name)})
    return experts


def share(base: nn.Module) -> nn.Module:
    """A copy with the base's own parameters."""
    return copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})


def gradients(
    base: nn.Module, config: PeftConfig, reentrant: bool | None, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of one step from one start; None is without checkpointing."""
    model = share(base)
    model.enable_input_require_grads()
    torch.manual_seed(1)
    model = get_peft_model(model, config).train()
    generator = torch.Generator(batch["input_ids"].device).manual_seed(2)
    for name, parameter in model.named_parameters():
        if "perft_up" in name:  # adapters that matter, or their routers get no gradient
            nn.init.normal_(parameter, std=0.02, generator=generator)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not isinstance(config, TTLoraMoeConfig):
        batch = {name: tensor for name, tensor in batch.items() if name != "expert_labels"}
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], counts: Callable[[str], bool]) -> float:
    """The largest difference relative to the norm, over the parameters that count."""
    differences = []
    for name, gradient in expected.items():
        if counts(name):
            differences.append(((found[name] - gradient).norm() / gradient.norm()).item() if gradient.any() else 0.0)
    return max(differences)


def main() -> None:
    parser = argument_parser(__doc__, repeats=1, sizes=list(SIZES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = build_base(args.size, args.device, DTYPES[args.dtype])
    ids = torch.randint(1, 512, (2, SIZES[args.size][-1]), generator=torch.Generator().manual_seed(3)).to(args.device)
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100
    batch = {"input_ids": ids, "labels": labels, "expert_labels": torch.tensor([0, 1]).to(args.device)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        losses = {"router_aux_loss_coef": 0.01}
        configs = {
            "perft routed": PerftConfig(
                num_experts=8, rank=16, base_router_aux_loss_coef=0.01, router_z_loss_coef=0.001, **losses, **TASK
            ),
            "perft embedded": PerftConfig(variant="embedded", rank=16, base_router_aux_loss_coef=0.01, **TASK),
            "tt_lora_moe": TTLoraMoeConfig(experts=save_experts(base, Path(folder)), router_noise=False, **TASK),
            "pt_moe": PTMoeConfig(router_noise_std=0.0, **losses, **TASK),
        }
        for adapter, config in configs.items():
            found = {mode: gradients(base, config, reentrant, batch) for mode, reentrant in MODES.items()}
            for mode in list(MODES)[1:]:
                for kind, counts in (("router", lambda n: "router" in n or "ttmoe" in n), ("all", lambda n: True)):
                    if any(map(counts, found["none"])):
                        figure = worst(found[mode], found["none"], counts)
                        rows.append([f"{adapter}, gradients of {kind}, {mode}", f"{figure:.1e}", "", ""])
    report(args, rows)


if __name__ == "__main__":
    main()
