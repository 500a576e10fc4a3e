"""Bases that are published quantised: in MXFP4 (GPT-OSS), in FP8 (Qwen3, DeepSeek), in bitsandbytes' own format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from tests.cli.cli_helpers import (
    AxolotlPool,
    checksums,
    lines_to_worry_about,
    log_history,
    run_on_gpu,
    save_tokenizer,
    tokenised,
    write_rows,
    write_yaml,
)
from tests.published_formats import save_bitsandbytes, save_fp8, save_mxfp4

FORMATS = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
EXPERTS = {
    "quantize_moe_experts": True,
    "device_map": "cpu",
    "plugins": ["tests.cli.cpu_training.QuantiseExpertsOnCpu", "axolotl_moe_peft.MoePeftPlugin"],
}
TT_LORA = {"adapter": "tt_lora", "perft": None, "tt_lora": {"rank": 4, "init": "zero"}}
CASES = {
    "mxfp4": ("mxfp4", TT_LORA, "tt_lora"),
    "mxfp4, quantize_moe_experts": ("mxfp4", EXPERTS, "perft routed"),
    "fp8, quantize_moe_experts": (
        "fp8",
        EXPERTS | {"perft": {"rank": 4, "variant": "embedded"}},
        "perft embedded",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three bases and rows of equal length."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(save_mxfp4(folder / "mxfp4"), folder / "experts.pt")
    save_fp8(folder / "fp8")
    save_bitsandbytes(folder / "bitsandbytes")
    for name in ("mxfp4", "fp8", "bitsandbytes"):
        save_tokenizer(folder / name)
    write_rows(folder / "rows.jsonl", ((f"what is {i}?", "ok") for i in range(4)))
    return folder


@pytest.fixture
def config_for(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """`config_for("mxfp4", **keys)`: a YAML for that base; what is not bitsandbytes' is dequantised."""

    def write(published: str, **keys: Any) -> Path:
        settings = {"gradient_checkpointing": True, "learning_rate": 0.01, "max_steps": 3, "save_steps": 3}
        settings |= {"attn_implementation": "eager"}
        if published in FORMATS:
            settings |= {
                "model_quantization_config": FORMATS[published],
                "model_quantization_config_kwargs": {"dequantize": True},
            }
        return write_yaml(tmp_path / "run.yaml", folder / published, folder / "rows.jsonl", **settings | keys)

    return write


def in_full(folder: Path, published: str) -> PreTrainedModel:
    """The base in float32, dequantised in this file (MXFP4) or by a plain product (FP8)."""
    tensors = load_file(folder / published / "model.safetensors")
    if published == "mxfp4":
        tensors = {n: t for n, t in tensors.items() if not n.endswith(("_blocks", "_scales"))}
        tensors |= torch.load(folder / "experts.pt")
    else:
        scales = {n: tensors.pop(n) for n in list(tensors) if n.endswith("_scale_inv")}
        tensors |= {n.removesuffix("_scale_inv"): None for n in scales}
        stored = load_file(folder / published / "model.safetensors")
        tensors |= {n: stored[n].float() * scales[f"{n}_scale_inv"] for n, t in tensors.items() if t is None}
    config = AutoConfig.from_pretrained(folder / published)
    del config.quantization_config
    plain = folder / f"{published} in full"
    plain.mkdir(exist_ok=True)
    config.save_pretrained(plain)
    save_file({n: t.float().contiguous() for n, t in tensors.items()}, plain / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager")


def reads_fp8() -> bool:
    """transformers 5.16 does not, if the base's configuration has a plan for tensor parallelism."""
    try:
        FineGrainedFP8HfQuantizer(FineGrainedFP8Config()).update_tp_plan(Qwen3MoeConfig())
    except AttributeError:
        return False
    return True


@torch.no_grad()
def loss_of(model: PreTrainedModel, folder: Path) -> float:
    rows = list(tokenised(folder / "rows.jsonl"))
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    return model(**batch, use_cache=False).loss.item()


@pytest.mark.matrix("base: {case} as published", "{adapter}")
@pytest.mark.parametrize(("case", "adapter"), [(case, adapter) for case, (*_, adapter) in CASES.items()])
def test_it_trains_from_where_the_base_is(
    case: str, adapter: str, axolotl: AxolotlPool, config_for: Callable[..., Path], folder: Path
) -> None:
    published, keys, _ = CASES[case]
    config = config_for(published, **keys)
    before = checksums(folder / published)
    result = axolotl("train", config)
    if published == "fp8" and not reads_fp8():
        assert "cannot be read by transformers" in result.error and "load_in_4bit" in result.error, result.output
        return
    assert result.code == 0, result.output
    assert lines_to_worry_about(result.output) == []
    assert checksums(folder / published) == before
    losses = [line["loss"] for line in log_history(config.with_suffix(""))]
    assert losses[-1] < losses[0]
    apart = abs(losses[0] / loss_of(in_full(folder, published), folder) - 1)
    if "experts" in case:
        assert "Quantized 4 MoE expert parameter(s) to 4-bit" in result.output
        assert 1e-4 < apart < 0.02  # rounded twice
    else:
        assert apart < 1e-5  # to bfloat16 exactly, and computed in float32


@pytest.mark.matrix("base: bitsandbytes as published", "perft routed")
def test_a_base_in_bitsandbytes_own_format_trains_as_it_is(
    axolotl: AxolotlPool, config_for: Callable[..., Path], folder: Path
) -> None:
    config = config_for("bitsandbytes")
    result = axolotl("train", config)
    assert result.code == 0, result.output
    assert lines_to_worry_about(result.output) == []
    losses = [line["loss"] for line in log_history(config.with_suffix(""))]
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(folder / "bitsandbytes", device_map={"": "cpu"}).train()
    assert losses[0] == pytest.approx(loss_of(base, folder), rel=1e-5)
    model = PeftModel.from_pretrained(base, config.with_suffix("")).train()
    assert loss_of(model, folder) < losses[-1]


@pytest.mark.parametrize("published", ["mxfp4", "bitsandbytes"])
@pytest.mark.matrix("base: {published} as published, merge-lora", "tt_lora", cell="refused: into full precision only")
def test_tt_lora_is_not_merged_into_it(published: str, axolotl: AxolotlPool, config_for: Callable[..., Path]) -> None:
    config = config_for(published, **TT_LORA)
    config.with_suffix("").mkdir()
    result = axolotl("merge-lora", config)
    assert (result.code, result.tracebacks) == (1, 1), result.output
    assert "merges into a base in full precision only. Nothing was written. Set `base_model`" in result.error
    assert not (config.with_suffix("") / "merged").exists()


def test_without_dequantising_it_is_refused_before_it_is_loaded(
    axolotl: AxolotlPool, config_for: Callable[..., Path]
) -> None:
    config = config_for("mxfp4", model_quantization_config=None, model_quantization_config_kwargs=None)
    result = axolotl("train", config)
    assert (result.code, result.tracebacks) == (1, 1), result.output
    assert "`model_quantization_config: Mxfp4Config`" in result.error
    assert "Loading weights" not in result.output


@pytest.mark.gpu
@pytest.mark.parametrize("published", ["mxfp4", *(["fp8"] if reads_fp8() else [])])
def test_on_a_gpu_the_host_quantises_the_dequantised_experts(
    published: str, config_for: Callable[..., Path], folder: Path
) -> None:
    config = config_for(published, quantize_moe_experts=True, bf16=True)
    result = run_on_gpu("train", config)
    assert result.code == 0, result.output
    assert "Quantized 4 MoE expert parameter(s) to 4-bit" in result.output
    losses = [line["loss"] for line in log_history(config.with_suffix(""))]
    assert losses[-1] < losses[0] == pytest.approx(loss_of(in_full(folder, published), folder), rel=0.02)
