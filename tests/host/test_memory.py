"""What is said of a run's memory before it."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.host.memory import estimate, format_parts, log_estimate, report, total_bytes
from axolotl_moe_peft_commands import moe_memory

Load = Callable[..., DictDefault]
QUANTISED_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "vocab_size": 256}


def sizes(cfg: DictDefault) -> dict[str, int | None]:
    return {part.name: part.bytes for part in estimate(cfg)}


def test_base_adapter_gradients_and_optimiser_are_those_that_are_built(load: Load) -> None:
    cfg = load(perft={"rank": 4}, optimizer="adamw_torch", sequence_len=64)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cfg.base_model))
    base_bytes = sum(tensor.nbytes for tensor in (*base.parameters(), *base.buffers()))
    model = peft.get_peft_model(base, PerftConfig(rank=4, task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [s for state in optimizer.state.values() for s in state.values() if s.dim()]

    found = sizes(cfg)
    adapter = sum(p.nbytes for p in trained)
    assert (found["base model"], found["adapter"], found["gradients"]) == (base_bytes, adapter, adapter)
    assert found["optimiser"] == sum(s.nbytes for s in states)
    assert found["activations"] > 0
    assert total_bytes(estimate(cfg)) == sum(found.values())


def test_activations_follow_the_batch_and_checkpointing(load: Load) -> None:
    settings = {"sequence_len": 128, "gradient_accumulation_steps": 2}  # gradients are there beside the peak
    one, two = (sizes(load(micro_batch_size=rows, **settings))["activations"] for rows in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.1)
    cfg = load(gradient_checkpointing=True, micro_batch_size=2, **settings)
    checkpointed = sizes(cfg)["activations"]
    assert checkpointed < two
    assert "with gradient checkpointing" in format_parts(estimate(cfg))
    assert f"{two / 2**20:,.2f} MiB without" in format_parts(estimate(cfg))


def test_a_balance_loss_of_the_base_router_reads_no_values(load: Load) -> None:
    cfg = load(perft={"variant": "dense", "base_router_aux_loss_coef": 0.1}, sequence_len=64)
    assert all(part.bytes for part in estimate(cfg))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_takes_what_bitsandbytes_stores(load: Load, tmp_path: Path, bits: int) -> None:
    config = MixtralConfig(hidden_size=128, intermediate_size=256, num_key_value_heads=4, **QUANTISED_MOE)
    config.save_pretrained(tmp_path / "moe")
    cfg = load(base_model=str(tmp_path / "moe"), sequence_len=32)
    # the recipe's check of these keys is another test's
    cfg = DictDefault({**cfg, f"load_in_{bits}bit": True, "quantize_moe_experts": True})

    def stored(weight: Tensor) -> int:
        if bits == 4:
            packed, state = bitsandbytes.functional.quantize_4bit(
                weight.flatten(0, -2), quant_type="nf4", compress_statistics=True
            )
            scales = (state.absmax, state.state2.absmax)
        else:
            packed, *scales = bitsandbytes.functional.int8_vectorwise_quant(weight.flatten(0, -2).half())[:2]
        return packed.nbytes + sum(scale.nbytes for scale in scales)

    model = AutoModelForCausalLM.from_config(config)
    quantised = {name for name, p in model.named_parameters() if p.dim() == 3}
    quantised |= {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    expected = sum(
        stored(tensor.data) if name in quantised - {"lm_head.weight"} else tensor.nbytes
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    )
    assert sizes(cfg)["base model"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("adapter", ["perft", "pt_moe"])
def test_a_run_does_not_notice_that_it_was_estimated(load: Load, adapter: str) -> None:
    blocks = {"perft": {"perft": {"dropout": 0.1}}, "pt_moe": {"pt_moe": {"rank": 4}, "perft": None}}
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    cfg = load(adapter=adapter, sequence_len=64, **reentrant, **blocks[adapter])
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sizes(cfg)["activations"] is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_known_is_said(load: Load) -> None:
    cfg = load(rl="dpo", datasets=[{"path": "rows.jsonl", "type": "chat_template.default"}])
    assert sizes(cfg)["activations"] is None
    assert "and what is not known" in format_parts(estimate(cfg))


def test_a_run_that_will_not_fit_is_warned_of_with_two_keys(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    cfg = load(micro_batch_size=4, sequence_len=128)
    needed = total_bytes(estimate(cfg))
    with caplog.at_level(logging.INFO, "axolotl_moe_peft"):
        log_estimate(cfg, None)
        log_estimate(cfg, needed)
        assert "activations" in caplog.text and "will not fit" not in caplog.text
        log_estimate(cfg, needed - 1)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "it will not fit" in warning and warning.count("(then ") == 2
    assert any(key in warning for key in ("`micro_batch_size: 2`", "`gradient_checkpointing: true`"))


def test_the_command_prints_the_table_and_no_weights_are_there_to_load(load: Load, tmp_path: Path) -> None:
    cfg = load(perft={}, sequence_len=64)
    assert not list(Path(cfg.base_model).glob("*.safetensors"))
    result = CliRunner().invoke(moe_memory, [str(tmp_path / "config.yaml")], catch_exceptions=False)
    assert result.exit_code == 0
    assert report(cfg) in result.output
    assert "with load_in_4bit: true, quantize_moe_experts: true: " in result.output


def test_the_command_refuses_other_adapters(load: Load, tmp_path: Path) -> None:
    load(adapter="lora", perft=None, lora_r=8, lora_target_linear=True)
    result = CliRunner().invoke(moe_memory, [str(tmp_path / "config.yaml")])
    assert result.exit_code == 1
    assert "adapter: 'lora' is none of this package" in result.output
