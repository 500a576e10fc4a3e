"""load_in_4bit and load_in_8bit: the base is the one of Axolotl's own qlora and lora, and all else as ever.

bitsandbytes computes on CPUs, too. The experts of MoE blocks are no linear layers, and transformers keeps them as they
are for every adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.host.args import CONFIGS
from tests.cli.cli_helpers import (
    AxolotlPool,
    adapter_tensors,
    checksums,
    lines_to_worry_about,
    log_history,
    save_tokenizer,
    tokenised,
    write_rows,
    write_yaml,
)
from tests.tiny_models import random_ids, tiny_model

STEPS = 3
BITS = ("4bit", "8bit")
LORA = {"perft": None, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "perft routed": {"perft": {"rank": 4}},
    "perft embedded": {"perft": {"rank": 4, "variant": "embedded"}},
    "perft dense": {"perft": {"rank": 4, "variant": "dense", "num_experts": 2}},
    "tt_lora": {"adapter": "tt_lora", "perft": None, "tt_lora": {"rank": 4, "init": "zero"}},
    "tt_lora_moe": {"adapter": "tt_lora_moe", "perft": None},
    "pt_moe": {
        "adapter": "pt_moe",
        "perft": None,
        "pt_moe": {"num_virtual_tokens": 4, "rank": 3, "router_noise_std": 0.0},
    },
}
# step 0 is the base's
FROM_ZERO = [("4bit", adapter) for adapter in ADAPTERS if adapter not in ("tt_lora_moe", "pt_moe")]
FROM_ZERO += [("8bit", "perft routed"), ("8bit", "tt_lora")]
CASES = [("4bit", adapter) for adapter in ADAPTERS] + FROM_ZERO[-2:]


@dataclass
class Run:
    """A finished training run."""

    output_dir: Path
    output: str

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in log_history(self.output_dir)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with sizes that bitsandbytes packs on a CPU, rows of equal length, and two experts."""
    folder = tmp_path_factory.mktemp("quantized")
    model = tiny_model("mixtral", hidden_size=64)
    with torch.no_grad():
        for layer in model.model.layers:  # attention that matters, so that the loss tells how it is rounded
            for projection in layer.self_attn.children():
                projection.weight *= 8
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    write_rows(folder / "rows.jsonl", ((f"what is {i}?", "ok") for i in range(4)))
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        get_peft_model(base, TTLoraConfig(rank=4, task_type="CAUSAL_LM")).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def trained(axolotl: AxolotlPool, folder: Path) -> Callable[[str, str], Run]:
    """`trained("4bit", "tt_lora")`: three steps of one batch; in 8 bits with bf16, as the host needs it."""

    @functools.cache
    def train(bits: str, adapter: str) -> Run:
        keys = ADAPTERS.get(adapter) or LORA | {"adapter": adapter}
        dataset = {"path": str(folder / "rows.jsonl"), "type": "chat_template"}
        if adapter == "tt_lora_moe":
            experts = [{"name": name, "path": str(folder / name)} for name in ("a", "b")]
            keys = keys | {"tt_lora_moe": {"experts": experts, "router_noise": False}}
            dataset["expert"] = "a"
        settings = {f"load_in_{bits}": True, "datasets": [dataset], "max_steps": STEPS, "save_steps": 1}
        settings |= {"gradient_checkpointing": True, "learning_rate": 0.01}
        if bits == "8bit":
            settings |= {"bf16": True, "plugins": ["tests.cli.cpu_training.UseCpu", "axolotl_moe_peft.MoePeftPlugin"]}
        config = write_yaml(
            folder / f"{adapter} {bits}.yaml", folder / "base", folder / "rows.jsonl", **settings | keys
        )
        before = checksums(folder / "base")
        result = axolotl("train", config)
        assert result.code == 0, result.output
        assert checksums(folder / "base") == before
        return Run(config.with_suffix(""), result.output)

    return train


def quantised_base(folder: Path) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=quantization, device_map={"": "cpu"}
    )
    return base.train()  # in evaluation some CPUs multiply in bf16


@torch.no_grad()
def loss_of(model: PreTrainedModel | PeftModel, folder: Path) -> float:
    """Of the rows, one batch without padding."""
    rows = list(tokenised(folder / "rows.jsonl"))
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    return model(**batch, use_cache=False).loss.item()


@pytest.mark.matrix("base: load_in_{bits}", "{adapter}")
@pytest.mark.parametrize(("bits", "adapter"), FROM_ZERO)
def test_the_first_step_is_that_of_the_hosts_own_adapter(
    bits: str, adapter: str, trained: Callable[[str, str], Run]
) -> None:
    control = trained(bits, {"4bit": "qlora", "8bit": "lora"}[bits]).losses[0]
    # in 8 bits the control multiplies by the experts in float32, ours in bf16 as without quantisation
    assert trained(bits, adapter).losses[0] == pytest.approx(control, rel={"4bit": 1e-5, "8bit": 4e-4}[bits])


@pytest.mark.parametrize("bits", BITS)
def test_the_first_step_is_not_that_of_the_base_in_full_precision(
    bits: str, trained: Callable[[str, str], Run], folder: Path
) -> None:
    found = trained(bits, "perft routed").losses[0]
    full = AutoModelForCausalLM.from_pretrained(folder / "base")
    if bits == "8bit":
        with torch.autocast("cpu", torch.bfloat16):
            # 4e-4 apart at most, if it were the same base
            assert abs(found / loss_of(full.bfloat16(), folder) - 1) > 6e-4
    else:
        assert abs(found / loss_of(full, folder) - 1) > 2e-4
        assert found == pytest.approx(loss_of(quantised_base(folder), folder), rel=1e-5)  # float32


@pytest.mark.matrix("base: load_in_{bits}", "lora")
@pytest.mark.parametrize("bits", BITS)
def test_the_control_trains(bits: str, trained: Callable[[str, str], Run]) -> None:
    losses = trained(bits, {"4bit": "qlora", "8bit": "lora"}[bits]).losses
    assert losses[-1] < losses[0]


@pytest.mark.matrix("base: load_in_{bits}", "{adapter}")
@pytest.mark.parametrize(("bits", "adapter"), CASES)
def test_the_loss_falls_and_the_adapter_is_saved(bits: str, adapter: str, trained: Callable[[str, str], Run]) -> None:
    run = trained(bits, adapter)
    assert run.losses[-1] < run.losses[0], run.losses
    weights = {path.name for path in run.output_dir.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")}
    assert weights == {"adapter_model.safetensors"}
    assert [line for line in lines_to_worry_about(run.output) if "no dataset has `expert: b`" not in line] == []


@pytest.mark.parametrize(
    "adapter", [name for name in ADAPTERS if name != "tt_lora_moe"]
)  # which logs its router's loss
def test_the_saved_adapter_continues_on_the_quantised_base_where_it_was(
    adapter: str, trained: Callable[[str, str], Run], folder: Path
) -> None:
    run = trained("4bit", adapter)
    model = PeftModel.from_pretrained(quantised_base(folder), run.output_dir / "checkpoint-1").train()
    assert run.losses[1] == pytest.approx(loss_of(model, folder), rel=1e-5)  # float32, without checkpointing


@torch.no_grad()
@pytest.mark.matrix(
    "base: load_in_4bit, merge_and_unload", "tt_lora", cell="refused: its weights would have to be rounded again"
)
def test_tt_lora_refuses_to_merge_into_a_quantised_base(trained: Callable[[str, str], Run], folder: Path) -> None:
    model = PeftModel.from_pretrained(quantised_base(folder), trained("4bit", "tt_lora").output_dir).eval()
    ids = random_ids(2, 9)
    before = model(ids).logits
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged into a quantised Linear4bit.*merge-lora"):
            merge()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.matrix("base: load_in_4bit, merge-lora into full precision", "tt_lora")
def test_merge_lora_merges_into_the_base_in_full_precision(
    axolotl: AxolotlPool, trained: Callable[[str, str], Run], folder: Path
) -> None:
    run = trained("4bit", "tt_lora")
    result = axolotl("merge-lora", folder / "tt_lora 4bit.yaml")
    assert result.code == 0, result.output
    ids = random_ids(2, 9)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(run.output_dir / "merged")(ids).logits
        # float32: the update is added to the weight instead of to the layer's output
        torch.testing.assert_close(
            merged, PeftModel.from_pretrained(base, run.output_dir).eval()(ids).logits, rtol=1e-4, atol=1e-5
        )


def test_lora_model_dir_continues_on_a_quantised_base(
    axolotl: AxolotlPool, trained: Callable[[str, str], Run], folder: Path
) -> None:
    run = trained("4bit", "perft routed")
    out = folder / "continued"
    result = axolotl(
        "train",
        folder / "perft routed 4bit.yaml",
        f"--lora-model-dir={run.output_dir / 'checkpoint-1'}",
        f"--output-dir={out}",
        "--max-steps=1",
    )
    assert result.code == 0, result.output
    assert log_history(out)[0]["loss"] == pytest.approx(run.losses[1], rel=1e-5)  # the rows in another order
    assert adapter_tensors(out).keys() == adapter_tensors(run.output_dir).keys()


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ("`load_in_4bit`", "`load_in_8bit`", "Remove one")),
        ({"load_in_4bit": True, "deepspeed": "zero3.json"}, ("`load_in_4bit`", "`deepspeed`", "Remove one")),
        ({"load_in_4bit": True, "fsdp_version": 2, "fsdp_config": {"offload_params": False}}, ("`fsdp_config`",)),
        ({"load_in_4bit": True, "quantize_moe_experts": True}, ("quantize_moe_experts",)),
        ({"gptq": True}, ("`gptq`", "load_in_4bit")),
    ],
)
def test_what_the_host_keeps_to_its_own_adapters_is_refused(
    keys: dict[str, Any], fragments: tuple[str, ...], axolotl: AxolotlPool, folder: Path, tmp_path: Path
) -> None:
    config = write_yaml(tmp_path / "refused.yaml", folder / "base", folder / "rows.jsonl", **keys)
    result = axolotl("train", config)
    assert (result.code, result.tracebacks) == (1, 1), result.output
    assert [f for f in fragments if f not in result.error] == [], result.error
    assert not config.with_suffix("").exists()


@pytest.mark.gpu
@pytest.mark.matrix("base: load_in_{bits}", "{adapter}")
@pytest.mark.parametrize("adapter", ["perft routed", "perft embedded", "perft dense", "tt_lora"])
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu_step_0_is_the_base_and_every_tensor_gets_a_gradient(bits: str, adapter: str, folder: Path) -> None:
    keys = ADAPTERS[adapter]
    name = keys.get("adapter", "perft")
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}": True}), device_map={"": 0}
    )
    ids = random_ids(2, 9).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        of_base = base.train()(ids).logits
        model = get_peft_model(base, CONFIGS[name](**keys[name], task_type="CAUSAL_LM")).train()
        output = model(input_ids=ids, labels=ids)
    assert torch.equal(output.logits, of_base)
    output.loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    assert any(parameter.grad.abs().sum() > 0 for parameter in trained)
