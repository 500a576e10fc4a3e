"""Promises of training, resuming, evaluating and generating through Axolotl's commands."""

import csv
import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import axolotl_moe_peft  # noqa: F401  (makes PERFT known to PEFT)
from tests.cli.cli_helpers import (
    AxolotlPool,
    Result,
    adapter_tensors,
    checksums,
    log_history,
    run_command,
    tokenised,
    write_rows,
    write_yaml,
)

ROUTED = {"variant": "routed", "num_experts": 4, "num_experts_per_tok": 2, "rank": 4, "router_z_loss_coef": 0.001}
# a different family for each
VARIANTS = {
    "routed": ("mixtral", ROUTED),
    "embedded": ("olmoe", {"variant": "embedded", "rank": 4}),
    "dense": ("qwen3_moe", {"variant": "dense", "num_experts": 2, "rank": 4, "expert_type": "parallel_adapter"}),
    "single": ("mixtral", {"variant": "single", "rank": 4}),
}
FIGURES = {"router_aux_loss", "router_z_loss", "expert_entropy", "expert_max_share", "expert_used_fraction"}
STEPS = 6


@dataclass
class Run:
    """A finished training run."""

    base: Path
    config: Path
    output_dir: Path
    output: str
    base_checksums: dict[str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Path:
    """Sums, with answers of one to six characters."""
    return write_rows(folder / "rows.jsonl", ((f"what is {i} + {7 * i}?", "ok" * (1 + i % 3)) for i in range(48)))


@pytest.fixture(scope="module")
def few_rows(folder: Path) -> Path:
    """One batch."""
    return write_rows(folder / "few_rows.jsonl", ((f"what is {i}?", "ok" * (i % 3 + 1)) for i in range(4)))


@pytest.fixture(scope="module")
def routed_config(folder: Path, rows: Path, base_model: Callable[[str], Path]) -> Path:
    """As a user trains: packing, accumulation, reentrant gradient checkpointing (the default), checkpoints.

    Rows are packed in order: where Axolotl shuffles before it packs, a resumed run sees other rows, with any adapter.
    """
    return write_yaml(
        folder / "routed.yaml",
        base_model("mixtral"),
        rows,
        perft=ROUTED,
        sample_packing=True,
        sample_packing_eff_est=1.0,
        sample_packing_sequentially=True,
        curriculum_sampling=True,
        gradient_checkpointing=True,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_steps=STEPS // 2,
    )


@pytest.fixture(scope="module")
def preprocessed(axolotl: AxolotlPool, routed_config: Path) -> Result:
    return axolotl("preprocess", routed_config)


@pytest.fixture(scope="module")
def trained(
    axolotl: AxolotlPool,
    base_model: Callable[[str], Path],
    folder: Path,
    few_rows: Path,
    routed_config: Path,
    preprocessed: Result,
) -> Callable[[str], Run]:
    """`trained("dense")`: the run of that variant."""

    @functools.cache
    def train(variant: str) -> Run:
        family, block = VARIANTS[variant]
        base = base_model(family)
        before = checksums(base)
        config = folder / f"{variant}.yaml"
        if variant != "routed":
            write_yaml(config, base, few_rows, perft=block)
        if variant == "single":  # the command of the documentation, imports and all
            result = run_command("accelerate", "launch", "-m", "axolotl.cli.train", str(config))
        else:
            result = axolotl("train", config)
        assert result.code == 0, result.output
        return Run(base, config, config.with_suffix(""), result.output, before)

    return train


def lines_to_worry_about(output: str) -> list[str]:
    return [
        line
        for line in output.splitlines()
        if re.search(r"warn|error", line, re.I) and re.search("perft|axolotl_moe_peft", line)
    ]


def test_preprocess_prepares_the_rows_that_training_reads(
    preprocessed: Result, trained: Callable[[str], Run], rows: Path
) -> None:
    assert preprocessed.code == 0, preprocessed.output
    assert "Success! Preprocessed data path" in preprocessed.output
    assert f"Loading prepared dataset from disk at {rows.with_suffix('.prepared')}" in trained("routed").output


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_saves_the_adapter_alone(variant: str, trained: Callable[[str], Run]) -> None:
    run = trained(variant)
    for saved in (run.output_dir, run.output_dir / f"checkpoint-{STEPS}"):
        assert (saved / "adapter_config.json").is_file()
        weights = {path.name for path in saved.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")}
        assert weights - {"training_args.bin", "optimizer.pt", "scheduler.pt"} == {"adapter_model.safetensors"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_leaves_the_base_as_it_was(variant: str, trained: Callable[[str], Run]) -> None:
    run = trained(variant)
    assert checksums(run.base) == run.base_checksums


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_moves_every_up_projection(variant: str, trained: Callable[[str], Run]) -> None:
    tensors = adapter_tensors(trained(variant).output_dir)
    ups = [tensor for name, tensor in tensors.items() if "perft_up" in name]
    assert len(ups) == 2  # one for each layer
    assert all(up.abs().max() > 1e-3 for up in ups)  # they start at 0


def test_training_goes_on_moving_every_tensor(trained: Callable[[str], Run]) -> None:
    output_dir = trained("routed").output_dir
    earlier, later = adapter_tensors(output_dir / f"checkpoint-{STEPS // 2}"), adapter_tensors(output_dir)
    assert len(later) == 6 and earlier.keys() == later.keys()  # down, up and router of two layers
    assert [name for name in later if torch.equal(earlier[name], later[name])] == []


def test_optimiser_holds_exactly_the_adapter(trained: Callable[[str], Run]) -> None:
    run = trained("routed")
    state = torch.load(run.output_dir / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    held = sorted(tuple(moments["exp_avg"].shape) for moments in state["state"].values())
    assert held == sorted(tuple(tensor.shape) for tensor in adapter_tensors(run.output_dir).values())
    assert sum(len(group["params"]) for group in state["param_groups"]) == len(held)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_adapter_loads_with_plain_peft(variant: str, trained: Callable[[str], Run]) -> None:
    run = trained(variant)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.base), run.output_dir)
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "perft_" in name}
    saved = adapter_tensors(run.output_dir)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_falls(variant: str, trained: Callable[[str], Run]) -> None:
    losses = [line["loss"] for line in log_history(trained(variant).output_dir)]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2, losses


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_has_the_parameter_table(variant: str, trained: Callable[[str], Run]) -> None:
    run = trained(variant)
    tensors = adapter_tensors(run.output_dir)
    routers = sum(tensor.numel() for name, tensor in tensors.items() if "perft_router" in name)
    total = sum(tensor.numel() for tensor in tensors.values())
    table = run.output[run.output.index("perft adapter attached, trainable parameters:") :].splitlines()[2:6]
    assert [(line.split()[0], int(line.split()[2].replace(",", ""))) for line in table] == [
        ("experts", total - routers),
        ("router", routers),
        ("other", 0),
        ("total", total),
    ]


def test_every_log_line_has_the_routers_figures(trained: Callable[[str], Run]) -> None:
    lines = log_history(trained("routed").output_dir)
    assert len(lines) == STEPS
    for line in lines:
        assert FIGURES <= line.keys()
        assert 0 < line["router_aux_loss"] <= ROUTED["num_experts"]
        assert line["router_z_loss"] > 0
        assert 0 < line["expert_entropy"] <= 1
        assert 1 / ROUTED["num_experts"] <= line["expert_max_share"] <= 1 / ROUTED["num_experts_per_tok"]
        assert 0 < line["expert_used_fraction"] <= 1


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "routed"])
def test_variants_without_a_router_log_no_figures(variant: str, trained: Callable[[str], Run]) -> None:
    assert not any(FIGURES & line.keys() for line in log_history(trained(variant).output_dir))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_warns_of_nothing_of_ours(variant: str, trained: Callable[[str], Run]) -> None:
    assert lines_to_worry_about(trained(variant).output) == []


def test_resumed_training_equals_uninterrupted(
    axolotl: AxolotlPool, trained: Callable[[str], Run], folder: Path, rows: Path
) -> None:
    run = trained("routed")
    resumed = folder / "resumed"
    shutil.copytree(run.output_dir / f"checkpoint-{STEPS // 2}", resumed / f"checkpoint-{STEPS // 2}")
    result = axolotl(
        "train", run.config, f"--output-dir={resumed}", f"--resume-from-checkpoint={resumed}/checkpoint-{STEPS // 2}"
    )
    assert result.code == 0, result.output
    lines, resumed_lines = log_history(run.output_dir), log_history(resumed)
    assert [line["step"] for line in resumed_lines] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", *FIGURES):
        # the same operations on the same numbers: no tolerance
        assert [line[key] for line in resumed_lines] == [line[key] for line in lines], key
    tensors, resumed_tensors = adapter_tensors(run.output_dir), adapter_tensors(resumed)
    assert tensors.keys() == resumed_tensors.keys()
    assert all(torch.equal(tensors[name], resumed_tensors[name]) for name in tensors)


def test_lora_model_dir_continues_from_the_saved_adapter(
    axolotl: AxolotlPool, trained: Callable[[str], Run], folder: Path, few_rows: Path
) -> None:
    run = trained("routed")
    # what shapes training may differ from the saved adapter_config.json
    block = ROUTED | {"dropout": 0.1, "router_aux_loss_coef": 0.0, "init": "paper"}
    config = write_yaml(folder / "continued.yaml", run.base, few_rows, perft=block, learning_rate=0.0, max_steps=1)
    result = axolotl("train", config, f"--lora-model-dir={run.output_dir}")
    assert result.code == 0, result.output
    given, saved = adapter_tensors(run.output_dir), adapter_tensors(config.with_suffix(""))
    assert given.keys() == saved.keys()
    assert all(torch.equal(given[name], saved[name]) for name in given)
    (line,) = log_history(config.with_suffix(""))
    assert line["grad_norm"] > 0  # it was being trained


def test_evaluate_measures_the_trained_adapter(
    axolotl: AxolotlPool, trained: Callable[[str], Run], folder: Path, few_rows: Path
) -> None:
    run = trained("routed")
    config = write_yaml(folder / "evaluated.yaml", run.base, few_rows, perft=ROUTED, eval_batch_size=4)
    result = axolotl("evaluate", config, f"--lora-model-dir={run.output_dir}")
    assert result.code == 0, result.output
    assert lines_to_worry_about(result.output) == []
    with (config.with_suffix("") / "eval_summary.csv").open() as file:
        loss = float({row["metric"]: row["training"] for row in csv.DictReader(file)}["loss"])
    assert f"train_loss: {loss}" in result.output

    base = AutoModelForCausalLM.from_pretrained(run.base)
    base_loss = mean_loss(base, few_rows)
    adapted_loss = mean_loss(PeftModel.from_pretrained(base, run.output_dir).eval(), few_rows)
    assert loss == pytest.approx(adapted_loss, abs=1e-5)  # float32; padded there, row by row here
    assert loss < base_loss - 0.2


def test_evaluate_warns_of_an_untrained_adapter(
    axolotl: AxolotlPool, trained: Callable[[str], Run], folder: Path, few_rows: Path
) -> None:
    run = trained("routed")
    config = write_yaml(folder / "untrained.yaml", run.base, few_rows, perft=ROUTED)
    result = axolotl("evaluate", config)
    assert result.code == 0, result.output
    (line,) = lines_to_worry_about(result.output)
    assert "untrained" in line and "--lora-model-dir" in line


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Path) -> float:
    """Cross-entropy over all supervised tokens, one row at a time."""
    total, tokens = 0.0, 0
    for row in tokenised(rows):
        input_ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=input_ids).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
        tokens += (labels[1:] != -100).sum().item()
    return total / tokens


def test_inference_answers_a_prompt(axolotl: AxolotlPool, trained: Callable[[str], Run]) -> None:
    run = trained("routed")
    result = axolotl("inference", run.config, f"--lora-model-dir={run.output_dir}", stdin="what is 1 + 7?")
    assert result.code == 0, result.output
    assert lines_to_worry_about(result.output) == []
    answer = result.output.rpartition("<|assistant|>")[2]
    assert "<|user|>" in result.output and len(answer.strip(" =\n")) > 0, result.output


@pytest.mark.parametrize("method", ["memory_efficient", "legacy"])
def test_merge_lora_refuses_with_the_reason(method: str, axolotl: AxolotlPool, trained: Callable[[str], Run]) -> None:
    run = trained("routed")
    before = checksums(run.output_dir)
    if method == "memory_efficient":  # the default
        result = run_command("axolotl", "merge-lora", str(run.config))
    else:
        result = axolotl("merge-lora", run.config, "--merge-method=legacy", f"--lora-model-dir={run.output_dir}")
    assert result.code == 1
    assert "merge-lora` cannot merge an adapter of type perft" in result.error
    assert "no weight of the base model computes that" in result.error
    assert not (run.output_dir / "merged").exists()
    assert checksums(run.output_dir) == before
