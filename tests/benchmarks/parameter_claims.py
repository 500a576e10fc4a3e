"""The papers' claims about numbers of parameters, counted on Llama-3.2-1B: writes their table into README.md.

    python -m tests.benchmarks.parameter_claims

Ours and PEFT's are attached to the architecture on the meta device. Adapters and AdapterFusion are counted by their
papers' formulas, for L layers of width d and a bottleneck b: Houlsby et al. (arXiv 1902.00751) put two modules into a
layer, each of 2 d b + b + d; Pfeiffer et al. (arXiv 2005.00247) one, and fusion adds query, key and value, 3 d^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaForCausalLM

from axolotl_moe_peft import PTMoeConfig, TTLoraConfig, TTLoraMoeConfig
from axolotl_moe_peft.tt_lora_moe.router import PromptRouter
from tests.pt_moe.test_counts import LLAMA
from tests.tt_lora.test_counts import AUTHORS

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- claims: written by python -m tests.benchmarks.parameter_claims -->", "<!-- claims end -->"
WIDTH, LAYERS = LLAMA.hidden_size, LLAMA.num_hidden_layers
POOL = 17  # experts of the paper's largest pool
ATTENTION = ["q_proj", "v_proj"]


class Claim(NamedTuple):
    """A paper's claim, and what two counts say to it.

    Attributes:
        text: the claim; empty: that of the row above.
        ours, others: what is compared, in words, and the parameters.
    """

    text: str
    ours: tuple[str, int]
    others: tuple[str, int]

    @property
    def share(self) -> float:
        return self.ours[1] / self.others[1]


def trainable(config: PeftConfig) -> int:
    """Trainable parameters of an adapter on Llama-3.2-1B."""
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(LLAMA), config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def router(num_experts: int) -> int:
    """Parameters of a TT-LoRA MoE's router, noise included."""
    experts = [{"name": str(i), "path": str(i)} for i in range(num_experts)]
    module = PromptRouter(WIDTH)
    module.update_layer("default", TTLoraMoeConfig(experts=experts), torch.device("meta"))
    return sum(p.numel() for p in module.parameters())


def adapters(bottleneck: int, in_a_layer: int) -> int:
    return LAYERS * in_a_layer * (2 * WIDTH * bottleneck + bottleneck + WIDTH)


def fusion() -> int:
    return LAYERS * 3 * WIDTH**2


def claims() -> Iterator[Claim]:
    """The claims, each with the settings that may be meant."""
    q, v_in, v_out = AUTHORS["1b"]
    factors = {"q_proj": {"in": q, "out": q}, "v_proj": {"in": v_in, "out": v_out}}
    tt_lora = trainable(TTLoraConfig(factors=factors, task_type="CAUSAL_LM"))
    expert = ("a TT-LoRA expert, the authors' factors, rank 5, q and v", tt_lora)
    lora = trainable(LoraConfig(r=16, target_modules=ATTENTION, task_type="CAUSAL_LM"))
    yield Claim("TT-LoRA MoE: 2 % of LoRA", expert, ("LoRA, rank 16, q and v", lora))
    for i, (bottleneck, in_a_layer) in enumerate(((64, 2), (96, 2), (128, 2), (128, 1))):
        text = "TT-LoRA MoE: 0.3 % of Adapters" if not i else ""
        yield Claim(
            text, expert, (f"Adapters, {in_a_layer} a layer, b = {bottleneck}", adapters(bottleneck, in_a_layer))
        )
    of_fusion = ("AdapterFusion, its fusion layers", fusion())
    routed = (f"the router of {POOL} experts, noise included", router(POOL))
    yield Claim("TT-LoRA MoE: 0.03 % of AdapterFusion", routed, of_fusion)
    yield Claim("", expert, of_fusion)
    pool = POOL * adapters(128, 1)
    everything = (f"{POOL} experts and their router", POOL * tt_lora + routed[1])
    yield Claim("", everything, (f"AdapterFusion with {POOL} Adapters, 1 a layer, b = 128", fusion() + pool))
    pt_moe = trainable(PTMoeConfig(num_virtual_tokens=40, num_experts=2, rank=36, task_type="CAUSAL_LM"))
    one = trainable(LoraConfig(r=1, target_modules=ATTENTION, task_type="CAUSAL_LM"))
    yield Claim(
        "PT-MoE: 25 % fewer than LoRA",
        ("PT-MoE, 2 experts, 40 virtual tokens, rank 36", pt_moe),
        ("LoRA, rank 1, q and v", one),
    )


def table() -> str:
    """The claims in Markdown."""
    lines = ["| claim | ours | | beside | | ours / beside |", "|---|---|---|---|---|---|"]
    for claim in claims():
        (ours, count), (others, other_count) = claim.ours, claim.others
        share = f"{100 * claim.share:.2g} %"
        lines.append(f"| {claim.text} | {ours} | {count:,} | {others} | {other_count:,} | {share} |")
    return "\n".join(lines)


def page_table() -> str:
    """The table as the page has it."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")
    print(table())
