"""One process equals two, with DDP and with FSDP2: the log, and the adapter that is saved.

On CPUs by gloo, with the patches of cpu_processes.py. The coefficient of the balance loss, which is not linear in the
batch, is 0. Every run starts from a saved adapter: under FSDP2 each process would keep its own part of a random start.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.args import CONFIGS
from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, write_rows, write_yaml

ROOT = Path(__file__).parents[2]
STEPS = 3
PERFT = {"rank": 4, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1}
BLOCKS: dict[str, dict[str, Any]] = {
    "perft": PERFT,
    "tt_lora": {"rank": 4},
    "tt_lora_moe": {"router_noise": False},  # each process draws its own noise
    "pt_moe": {"num_virtual_tokens": 4, "rank": 3, "router_noise_std": 0.0},
}
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "MixtralDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
        "reshard_after_forward": True,
        "offload_params": False,
    },
}
MODES: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": FSDP2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_model: Callable[[str], Path]) -> Path:
    """Rows with equally many tokens, experts, and for every adapter one to start from."""
    folder = tmp_path_factory.mktemp("processes")
    write_rows(
        folder / "rows.jsonl", [(f"what is {i}?", answer) for i, answer in enumerate(("one", "two", "six", "ten"))]
    )
    for number, name in enumerate(("a", "b")):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(base_model("mixtral"))
        get_peft_model(base, TTLoraConfig(rank=4, alpha=400, task_type="CAUSAL_LM")).save_pretrained(folder / name)
    for adapter in BLOCKS:
        torch.manual_seed(3)
        config = CONFIGS[adapter](**block_of(adapter, folder), task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model("mixtral")), config)
        with torch.no_grad():  # away from zeros, behind which gradients are 0
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(folder / f"{adapter}_start")
    return folder


def block_of(adapter: str, folder: Path) -> dict[str, Any]:
    experts = [{"name": name, "path": str(folder / name)} for name in ("a", "b")]
    return BLOCKS[adapter] | ({"experts": experts} if adapter == "tt_lora_moe" else {})


def write_config(adapter: str, mode: str, folder: Path, base: Path, **keys: Any) -> Path:
    rows = folder / "rows.jsonl"
    expert = {"expert": "a"} if adapter == "tt_lora_moe" else {}
    settings = {
        "plugins": ["tests.cli.cpu_processes.CpuProcesses", "axolotl_moe_peft.MoePeftPlugin"],
        "adapter": adapter,
        "perft": None,
        adapter: block_of(adapter, folder),
        "lora_model_dir": str(folder / f"{adapter}_start"),
        "datasets": [{"path": str(rows), "type": "chat_template", **expert}],
        "gradient_checkpointing": True,
        "optimizer": "sgd",  # its steps show a gradient's size
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "max_steps": STEPS,
        "save_steps": STEPS,
    }
    return write_yaml(folder / f"{adapter}_{mode}.yaml", base, rows, **settings | keys)


@pytest.fixture(scope="module")
def one_process(
    axolotl: AxolotlPool, folder: Path, base_model: Callable[[str], Path]
) -> Callable[[str], tuple[list[dict[str, float]], dict[str, Tensor]]]:
    @functools.cache
    def train(adapter: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        # without the patches: they are for several processes
        keys = {"plugins": ["axolotl_moe_peft.MoePeftPlugin"], "micro_batch_size": 4}
        config = write_config(adapter, "one", folder, base_model("mixtral"), **keys)
        result = axolotl("train", config)
        assert result.code == 0, result.output
        return log_history(config.with_suffix("")), adapter_tensors(config.with_suffix(""))

    return train


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", BLOCKS)
def test_two_processes_log_and_save_what_one_does(
    axolotl: AxolotlPool, adapter: str, mode: str, folder: Path, base_model: Callable[[str], Path], one_process: Callable[[str], Any]
) -> None:
    lines, tensors = one_process(adapter)
    config = write_config(adapter, mode, folder, base_model("mixtral"), micro_batch_size=2, **MODES[mode])
    done = axolotl("train", config, processes=2, timeout=120)
    assert done.code == 0, done.output
    found = log_history(config.with_suffix(""))
    assert len(found) == len(lines) == STEPS
    for line, expected in zip(found, lines):
        # the host rounds what it logs; float32 sums in another order
        for key in ("loss", "grad_norm", *(key for key in expected if key.startswith(("router_", "expert_")))):
            assert line[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key
    saved, start = adapter_tensors(config.with_suffix("")), adapter_tensors(folder / f"{adapter}_start")
    assert saved.keys() == tensors.keys() == start.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(saved[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
        if "ttmoe_cores" not in name:  # frozen
            assert not torch.equal(tensor, start[name]), name
