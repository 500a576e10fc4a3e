"""One small configuration of each method, for what is the same with all of them."""

from pathlib import Path

from peft import PeftConfig

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig, TTLoraMoeConfig
from tests.tt_lora_moe.pools import save_experts

METHODS = ("perft", "tt_lora", "tt_lora_moe", "pt_moe")


def config_of(method: str, folder: Path, **kwargs) -> PeftConfig:
    """A configuration for the tiny Mixtral; a pool's experts are saved under `folder`."""
    kwargs = {"task_type": "CAUSAL_LM", **kwargs}
    if method == "tt_lora_moe":
        return TTLoraMoeConfig(experts=save_experts(folder, "mixtral"), **kwargs)
    configs = {
        "perft": lambda: PerftConfig(rank=4, init="paper", **kwargs),
        "tt_lora": lambda: TTLoraConfig(alpha=500, **kwargs),
        "pt_moe": lambda: PTMoeConfig(num_virtual_tokens=6, rank=4, **kwargs),
    }
    return configs[method]()
