"""Quantised bases: the one of Axolotl's own qlora and lora, and all else as ever.

bitsandbytes computes on CPUs, too. The experts of MoE blocks are no linear layers: `quantize_moe_experts` quantises
them, without which transformers keeps them as they are for every adapter.
"""

from __future__ import annotations

import csv
import functools
import shutil
from collections.abc import Callable
from contextlib import nullcontext
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
    run_on_gpu,
    save_tokenizer,
    tokenised,
    write_rows,
    write_yaml,
)
from tests.quantised_experts import quantised_experts
from tests.tiny_models import random_ids, tiny_model

STEPS = 3
EXPERTS = {
    "quantize_moe_experts": True,
    "device_map": "cpu",
    "plugins": ["tests.cli.cpu_training.QuantiseExpertsOnCpu", "axolotl_moe_peft.MoePeftPlugin"],
}
BF16 = {"bf16": True, "plugins": ["tests.cli.cpu_training.UseCpu", "axolotl_moe_peft.MoePeftPlugin"]}
# in 8 bits with bf16, as the host needs it
BASES: dict[str, dict[str, Any]] = {
    "load_in_4bit": {"load_in_4bit": True},
    "load_in_8bit": {"load_in_8bit": True} | BF16,
    "load_in_4bit, quantize_moe_experts": {"load_in_4bit": True} | EXPERTS,
    "load_in_8bit, quantize_moe_experts": {"load_in_8bit": True}
    | EXPERTS
    | {"bf16": True, "plugins": [*BF16["plugins"][:1], *EXPERTS["plugins"]]},
}
LORA = {"perft": None, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "perft routed": {"perft": {"rank": 4}},
    "perft embedded": {"perft": {"rank": 4, "variant": "embedded"}},
    "perft dense": {"perft": {"rank": 4, "variant": "dense", "num_experts": 2}},
    "perft single": {"perft": {"rank": 4, "variant": "single"}},
    "tt_lora": {"adapter": "tt_lora", "perft": None, "tt_lora": {"rank": 4, "init": "zero"}},
    "tt_lora_moe": {"adapter": "tt_lora_moe", "perft": None},
    "pt_moe": {
        "adapter": "pt_moe",
        "perft": None,
        "pt_moe": {"num_virtual_tokens": 4, "rank": 3, "router_noise_std": 0.0},
    },
}
CASES = [
    *(("load_in_4bit", adapter) for adapter in ("perft routed", "tt_lora")),
    *(("load_in_8bit", adapter) for adapter in ("perft routed", "tt_lora")),
    *(("load_in_4bit, quantize_moe_experts", adapter) for adapter in ADAPTERS),
    *(("load_in_8bit, quantize_moe_experts", adapter) for adapter in ("perft embedded", "tt_lora_moe")),
]
# step 0 is the base's
FROM_ZERO = [(base, adapter) for base, adapter in CASES if adapter not in ("tt_lora_moe", "pt_moe")]


def control(base: str) -> str:
    """The host's own adapter for that base."""
    return "qlora" if "4bit" in base else "lora"


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
    """`trained("load_in_4bit", "tt_lora")`: three steps of one batch."""

    @functools.cache
    def train(base: str, adapter: str) -> Run:
        keys = ADAPTERS.get(adapter) or LORA | {"adapter": adapter}
        dataset = {"path": str(folder / "rows.jsonl"), "type": "chat_template"}
        if adapter == "tt_lora_moe":
            experts = [{"name": name, "path": str(folder / name)} for name in ("a", "b")]
            keys = keys | {"tt_lora_moe": {"experts": experts, "router_noise": False}}
            dataset["expert"] = "a"
        settings = BASES[base] | {"datasets": [dataset], "max_steps": STEPS, "save_steps": 1}
        settings |= {"gradient_checkpointing": True, "learning_rate": 0.01}
        config = write_yaml(
            folder / f"{adapter} {base}.yaml", folder / "base", folder / "rows.jsonl", **settings | keys
        )
        before = checksums(folder / "base")
        result = axolotl("train", config)
        assert result.code == 0, result.output
        assert checksums(folder / "base") == before
        return Run(config.with_suffix(""), result.output)

    return train


def quantised_base(folder: Path, base: str = "load_in_4bit") -> PreTrainedModel:
    """In 4 bits, its experts too if `base` says so."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with quantised_experts("4bit") if "experts" in base else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=quantization, device_map={"": "cpu"}
        )
    return model.train()  # in evaluation some CPUs multiply in bf16


@torch.no_grad()
def loss_of(model: PreTrainedModel | PeftModel, folder: Path) -> float:
    """Of the rows, one batch without padding."""
    rows = list(tokenised(folder / "rows.jsonl"))
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    return model(**batch, use_cache=False).loss.item()


@pytest.mark.matrix("base: {base}", "{adapter}")
@pytest.mark.parametrize(("base", "adapter"), FROM_ZERO)
def test_the_first_step_is_that_of_the_hosts_own_adapter(
    base: str, adapter: str, trained: Callable[[str, str], Run]
) -> None:
    expected = trained(base, control(base)).losses[0]
    # the control multiplies by whole experts in float32 then, ours in bf16 as without quantisation
    rel = 4e-4 if base == "load_in_8bit" else 1e-5
    assert trained(base, adapter).losses[0] == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_first_step_tells_whether_experts_are_quantised(bits: str, trained: Callable[[str, str], Run]) -> None:
    adapter = control(bits)
    with_experts = trained(f"load_in_{bits}, quantize_moe_experts", adapter)
    assert abs(with_experts.losses[0] / trained(f"load_in_{bits}", adapter).losses[0] - 1) > 1e-4
    assert f"Quantized 4 MoE expert parameter(s) to {bits[0]}-bit" in with_experts.output


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_first_step_is_not_that_of_the_base_in_full_precision(
    bits: str, trained: Callable[[str, str], Run], folder: Path
) -> None:
    found = trained(f"load_in_{bits}", "perft routed").losses[0]
    full = AutoModelForCausalLM.from_pretrained(folder / "base")
    if bits == "8bit":
        with torch.autocast("cpu", torch.bfloat16):
            # 4e-4 apart at most, if it were the same base
            assert abs(found / loss_of(full.bfloat16(), folder) - 1) > 6e-4
    else:
        assert abs(found / loss_of(full, folder) - 1) > 2e-4
        assert found == pytest.approx(loss_of(quantised_base(folder), folder), rel=1e-5)  # float32


@pytest.mark.matrix("base: {base}", "lora")
@pytest.mark.parametrize("base", BASES)
def test_the_control_trains(base: str, trained: Callable[[str, str], Run]) -> None:
    losses = trained(base, control(base)).losses
    assert losses[-1] < losses[0]


@pytest.mark.matrix("base: {base}", "{adapter}")
@pytest.mark.parametrize(("base", "adapter"), CASES)
def test_the_loss_falls_and_the_adapter_is_saved(base: str, adapter: str, trained: Callable[[str, str], Run]) -> None:
    run = trained(base, adapter)
    assert run.losses[-1] < run.losses[0], run.losses
    weights = {path.name for path in run.output_dir.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")}
    assert weights == {"adapter_model.safetensors"}
    assert [line for line in lines_to_worry_about(run.output) if "no dataset has `expert: b`" not in line] == []


@pytest.mark.parametrize(
    # tt_lora_moe logs its router's loss
    ("base", "adapter"),
    [(base, adapter) for base, adapter in CASES if "4bit" in base and adapter != "tt_lora_moe"],
)
def test_the_saved_adapter_continues_on_the_quantised_base_where_it_was(
    base: str, adapter: str, trained: Callable[[str, str], Run], folder: Path
) -> None:
    run = trained(base, adapter)
    model = PeftModel.from_pretrained(quantised_base(folder, base), run.output_dir / "checkpoint-1").train()
    assert run.losses[1] == pytest.approx(loss_of(model, folder), rel=1e-5)  # float32, without checkpointing


@torch.no_grad()
@pytest.mark.matrix(
    "base: load_in_4bit, merge_and_unload", "tt_lora", cell="refused: its weights would have to be rounded again"
)
def test_tt_lora_refuses_to_merge_into_a_quantised_base(trained: Callable[[str, str], Run], folder: Path) -> None:
    model = PeftModel.from_pretrained(quantised_base(folder), trained("load_in_4bit", "tt_lora").output_dir).eval()
    ids = random_ids(2, 9)
    before = model(ids).logits
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged into a quantised Linear4bit.*merge-lora"):
            merge()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.matrix("base: {base}, merge-lora into full precision", "tt_lora")
@pytest.mark.parametrize("base", ["load_in_4bit", "load_in_4bit, quantize_moe_experts"])
def test_merge_lora_merges_into_the_base_in_full_precision(
    base: str, axolotl: AxolotlPool, trained: Callable[[str, str], Run], folder: Path
) -> None:
    run = trained(base, "tt_lora")
    result = axolotl("merge-lora", folder / f"tt_lora {base}.yaml")
    assert result.code == 0, result.output
    ids = random_ids(2, 9)
    full = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(run.output_dir / "merged")(ids).logits
        # float32: the update is added to the weight instead of to the layer's output
        torch.testing.assert_close(
            merged, PeftModel.from_pretrained(full, run.output_dir).eval()(ids).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.matrix("base: load_in_4bit, quantize_moe_experts, resume", "perft routed")
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    axolotl: AxolotlPool, trained: Callable[[str, str], Run], folder: Path
) -> None:
    run = trained("load_in_4bit, quantize_moe_experts", "perft routed")
    out = folder / "resumed"
    shutil.copytree(run.output_dir / "checkpoint-1", out / "checkpoint-1")
    result = axolotl(
        "train",
        folder / "perft routed load_in_4bit, quantize_moe_experts.yaml",
        f"--resume-from-checkpoint={out / 'checkpoint-1'}",
        f"--output-dir={out}",
    )
    assert result.code == 0, result.output
    assert [line["loss"] for line in log_history(out)] == run.losses
    resumed, whole = adapter_tensors(out), adapter_tensors(run.output_dir)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_evaluate_measures_the_trained_adapter_on_the_quantised_base(
    axolotl: AxolotlPool, trained: Callable[[str, str], Run], folder: Path
) -> None:
    base = "load_in_4bit, quantize_moe_experts"
    run = trained(base, "perft embedded")
    config, out = folder / f"perft embedded {base}.yaml", folder / "evaluated"
    result = axolotl("evaluate", config, f"--lora-model-dir={run.output_dir}", f"--output-dir={out}")
    assert result.code == 0, result.output
    with (out / "eval_summary.csv").open() as file:
        loss = float({row["metric"]: row["training"] for row in csv.DictReader(file)}["loss"])
    model = PeftModel.from_pretrained(quantised_base(folder, base), run.output_dir).train()
    assert loss == pytest.approx(loss_of(model, folder), rel=2e-3)  # in evaluation some CPUs multiply in bf16


def test_lora_model_dir_continues_on_a_quantised_base(
    axolotl: AxolotlPool, trained: Callable[[str, str], Run], folder: Path
) -> None:
    run = trained("load_in_4bit", "perft routed")
    out = folder / "continued"
    result = axolotl(
        "train",
        folder / "perft routed load_in_4bit.yaml",
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
        ({"quantize_moe_experts": True}, ("`quantize_moe_experts`", "Add `load_in_4bit: true`")),
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
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
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


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "adapter"), [("4bit", "perft embedded"), ("8bit", "tt_lora")])
def test_on_a_gpu_the_host_quantises_the_experts(bits: str, adapter: str, folder: Path, tmp_path: Path) -> None:
    keys = {f"load_in_{bits}": True, "quantize_moe_experts": True, "bf16": True, "gradient_checkpointing": True}
    losses = {}
    for name, of_adapter in ((adapter, ADAPTERS[adapter]), ("control", LORA | {"adapter": control(bits)})):
        settings = keys | {"max_steps": STEPS, "learning_rate": 0.01} | of_adapter
        config = write_yaml(tmp_path / f"{name}.yaml", folder / "base", folder / "rows.jsonl", **settings)
        result = run_on_gpu("train", config)
        assert result.code == 0, result.output
        assert f"Quantized 4 MoE expert parameter(s) to {bits[0]}-bit" in result.output
        losses[name] = [line["loss"] for line in log_history(config.with_suffix(""))]
    assert losses[adapter][-1] < losses[adapter][0]
    assert losses[adapter][0] == pytest.approx(losses["control"][0], rel=2e-3)  # bf16
