"""PT-MoE through Axolotl's commands: training packed and unpacked, resuming, continuing, and bad input."""

from __future__ import annotations

import csv
import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, T5Config

import axolotl_moe_peft  # noqa: F401  (makes the methods known to PEFT)
from tests.cli.cli_helpers import (
    AxolotlPool,
    Result,
    adapter_tensors,
    checksums,
    log_history,
    save_tokenizer,
    tokenised,
    write_rows,
    write_yaml,
)
from tests.tiny_models import VOCAB_SIZE

BLOCK = {"num_virtual_tokens": 8, "num_experts": 3, "rank": 4, "router_noise_std": 0.0}
NOISY = BLOCK | {"router_noise_std": 0.1, "router_aux_loss_coef": 0.1}
FIGURES = {"expert_entropy", "expert_max_share", "expert_used_fraction"}
STEPS = 6
# of three experts at hidden size 32
PARTS = {"experts": 3 * 8 * 4, "shared": 4 * 32, "router": 3 * 32 + 3}


@dataclass
class Run:
    """A finished training run."""

    config: Path
    output_dir: Path
    output: str

    @property
    def lines(self) -> list[dict[str, float]]:
        return log_history(self.output_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pt_moe")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Path:
    return write_rows(folder / "rows.jsonl", ((f"what is {i} + {7 * i}?", "ok" * (1 + i % 3)) for i in range(48)))


@pytest.fixture(scope="module")
def few_rows(folder: Path) -> Path:
    """Four rows of different lengths: one batch, and together one packed row."""
    pairs = [("what is 1?", "one"), ("what is seven?", "7"), ("and?", "twenty-two"), ("what is the last one?", "n")]
    return write_rows(folder / "few_rows.jsonl", pairs)


@pytest.fixture(scope="module")
def base(base_model: Callable[[str], Path]) -> Path:
    return base_model("llama")


def pt_moe_yaml(path: Path, base: Path, rows: Path, **keys: Any) -> Path:
    return write_yaml(path, base, rows, **{"adapter": "pt_moe", "perft": None, "pt_moe": BLOCK} | keys)


@pytest.fixture(scope="module")
def train(axolotl: AxolotlPool, folder: Path, base: Path, rows: Path) -> Callable[[str], Run]:
    """`train("as a user, packed")`: the run of that name.

    Rows are packed in order: where Axolotl shuffles before it packs, a resumed run sees other rows, with any adapter.
    """
    packed = {"sample_packing": True, "sample_packing_eff_est": 1.0, "micro_batch_size": 1}
    in_order = {"sample_packing_sequentially": True, "curriculum_sampling": True}
    settings: dict[str, dict[str, Any]] = {
        "as a user, unpacked": {},
        "as a user, packed": packed | in_order | {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    }

    @functools.cache
    def run(name: str) -> Run:
        keys = {"pt_moe": NOISY, "save_steps": STEPS // 2, "max_steps": STEPS} | settings[name]
        config = pt_moe_yaml(folder / f"{name}.yaml", base, rows, **keys)
        before = checksums(base)
        result = axolotl("train", config)
        assert result.code == 0, result.output
        assert checksums(base) == before
        return Run(config, config.with_suffix(""), result.output)

    return run


as_users_do = pytest.mark.parametrize("name", ["as a user, unpacked", "as a user, packed"])


def lines_to_worry_about(output: str) -> list[str]:
    return [
        line
        for line in output.splitlines()
        if re.search(r"warn|error", line, re.I) and re.search("pt_moe|axolotl_moe_peft|ptmoe", line)
    ]


@as_users_do
def test_the_loss_falls(name: str, train: Callable[[str], Run]) -> None:
    losses = [line["loss"] for line in train(name).lines]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.05, losses  # a prompt moves a random model little


@as_users_do
def test_training_saves_the_adapter_alone(name: str, train: Callable[[str], Run]) -> None:
    run = train(name)
    for saved in (run.output_dir, run.output_dir / f"checkpoint-{STEPS}"):
        assert (saved / "adapter_config.json").is_file()
        weights = {path.name for path in saved.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")}
        assert weights - {"training_args.bin", "optimizer.pt", "scheduler.pt"} == {"adapter_model.safetensors"}
    earlier, later = adapter_tensors(run.output_dir / f"checkpoint-{STEPS // 2}"), adapter_tensors(run.output_dir)
    measured = {key for key in later if "ptmoe_router_mean" in key}
    assert sorted(later[key].numel() for key in measured) == [1, 32]
    assert sorted(later[key].numel() for key in later.keys() - measured) == sorted([8 * 4 * 3, 4 * 32, 3 * 32, 3])
    assert {key for key in later if torch.equal(earlier[key], later[key])} == measured


@as_users_do
def test_the_optimiser_holds_exactly_the_adapter(name: str, train: Callable[[str], Run]) -> None:
    run = train(name)
    state = torch.load(run.output_dir / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    held = sorted(tuple(moments["exp_avg"].shape) for moments in state["state"].values())
    saved = adapter_tensors(run.output_dir)
    assert held == sorted(tuple(saved[key].shape) for key in saved if "ptmoe_router_mean" not in key)


@as_users_do
def test_the_log_has_the_parameter_table_and_the_routers_figures(name: str, train: Callable[[str], Run]) -> None:
    run = train(name)
    table = run.output[run.output.index("pt_moe adapter attached, trainable parameters:") :].splitlines()[2:7]
    counts = {line.split()[0]: int(line.split()[2].replace(",", "")) for line in table}
    assert counts == PARTS | {"other": 0, "total": sum(PARTS.values())}
    for line in run.lines:
        assert FIGURES | {"router_aux_loss"} <= line.keys()
        assert 1 / 3 <= line["expert_max_share"] <= 1
        assert 0 < line["expert_used_fraction"] <= 1


@as_users_do
def test_training_warns_of_nothing_of_ours(name: str, train: Callable[[str], Run]) -> None:
    assert lines_to_worry_about(train(name).output) == []


@as_users_do
def test_resumed_training_equals_uninterrupted(
    name: str, axolotl: AxolotlPool, train: Callable[[str], Run], tmp_path: Path
) -> None:
    run, resumed = train(name), tmp_path / "resumed"
    half = f"checkpoint-{STEPS // 2}"
    shutil.copytree(run.output_dir / half, resumed / half)
    result = axolotl("train", run.config, f"--output-dir={resumed}", f"--resume-from-checkpoint={resumed / half}")
    assert result.code == 0, result.output
    lines, resumed_lines = run.lines, log_history(resumed)
    for key in ("loss", "grad_norm", *FIGURES):
        # the same operations on the same numbers, noise included: no tolerance
        assert [line[key] for line in resumed_lines] == [line[key] for line in lines], key
    straight, again = adapter_tensors(run.output_dir), adapter_tensors(resumed)
    assert all(torch.equal(straight[key], again[key]) for key in straight)


def test_a_rank_of_null_is_a_prompt_that_is_not_factorised(
    axolotl: AxolotlPool, base: Path, few_rows: Path, tmp_path: Path
) -> None:
    block = {"num_virtual_tokens": 4, "num_experts": 1, "rank": None}
    config = pt_moe_yaml(tmp_path / "prompt_tuning.yaml", base, few_rows, pt_moe=block, max_steps=1)
    result = axolotl("train", config)
    assert result.code == 0, result.output
    (prompt,) = adapter_tensors(config.with_suffix("")).values()
    assert prompt.shape == (1, 4, 32)


@pytest.mark.matrix("commands: train --lora-model-dir", "pt_moe")
def test_lora_model_dir_continues_from_the_saved_adapter(
    axolotl: AxolotlPool, train: Callable[[str], Run], base: Path, few_rows: Path, tmp_path: Path
) -> None:
    run = train("as a user, packed")
    # what shapes training may differ from the saved adapter_config.json
    config = pt_moe_yaml(tmp_path / "continued.yaml", base, few_rows, learning_rate=0.0, max_steps=1)
    result = axolotl("train", config, f"--lora-model-dir={run.output_dir}")
    assert result.code == 0, result.output
    given, saved = adapter_tensors(run.output_dir), adapter_tensors(config.with_suffix(""))
    assert given.keys() == saved.keys()
    assert all(torch.equal(given[key], saved[key]) for key in given)
    assert log_history(config.with_suffix(""))[0]["grad_norm"] > 0  # it was being trained


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Path) -> float:
    """Cross-entropy over all supervised tokens, one row at a time; the router reads the question."""
    total, tokens = 0.0, 0
    for row in tokenised(rows):
        supervised = sum(label != -100 for label in row["labels"])
        loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        total, tokens = total + loss.item() * supervised, tokens + supervised
    return total / tokens


@pytest.mark.matrix("commands: evaluate", "pt_moe")
def test_evaluate_measures_the_trained_adapter(
    axolotl: AxolotlPool, train: Callable[[str], Run], base: Path, few_rows: Path, tmp_path: Path
) -> None:
    run = train("as a user, packed")
    config = pt_moe_yaml(tmp_path / "evaluated.yaml", base, few_rows, eval_batch_size=4)
    result = axolotl("evaluate", config, f"--lora-model-dir={run.output_dir}")
    assert result.code == 0, result.output
    assert lines_to_worry_about(result.output) == []
    with (config.with_suffix("") / "eval_summary.csv").open() as file:
        loss = float({row["metric"]: row["training"] for row in csv.DictReader(file)}["loss"])
    model = AutoModelForCausalLM.from_pretrained(base)
    base_loss = mean_loss(model, few_rows)
    adapted_loss = mean_loss(PeftModel.from_pretrained(model, run.output_dir).eval(), few_rows)
    assert loss == pytest.approx(adapted_loss, abs=1e-5)  # float32; padded there, row by row here
    assert abs(loss - base_loss) > 0.01


@pytest.mark.matrix("commands: inference", "pt_moe")
def test_inference_answers_a_prompt(axolotl: AxolotlPool, train: Callable[[str], Run]) -> None:
    run = train("as a user, packed")
    result = axolotl("inference", run.config, f"--lora-model-dir={run.output_dir}", stdin="what is 1 + 7?")
    assert result.code == 0, result.output
    assert lines_to_worry_about(result.output) == []
    assert len(result.output.rpartition("<|assistant|>")[2].strip(" =\n")) > 0, result.output


@pytest.mark.matrix("commands: merge-lora", "pt_moe", cell="refused: its prompt is no weight of the base")
@pytest.mark.parametrize("method", ["memory_efficient", "legacy"])
def test_merge_lora_is_refused_with_the_reason(method: str, axolotl: AxolotlPool, train: Callable[[str], Run]) -> None:
    run = train("as a user, packed")
    before = checksums(run.output_dir)
    result = axolotl("merge-lora", run.config, f"--merge-method={method}", f"--lora-model-dir={run.output_dir}")
    assert_refused(result, ("cannot merge an adapter of type pt_moe", "a prompt before the text"))
    assert not (run.output_dir / "merged").exists()
    assert checksums(run.output_dir) == before


def completion(folder: Path) -> dict[str, Any]:
    return {"datasets": [{"path": str(folder / "few_rows.jsonl"), "type": "completion"}]}


# what is changed in a valid YAML, given the folder of the rows, and parts of the message
REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], tuple[str, ...]]] = {
    "rank above the prompt's length": (
        lambda f: {"pt_moe": {"num_virtual_tokens": 8, "rank": 9}},
        ("pt_moe.rank: 9 is more than num_virtual_tokens (8)", "smaller rank, or null"),
    ),
    "rank above the hidden size": (
        lambda f: {"pt_moe": {"num_virtual_tokens": 40, "rank": 33}},
        ("pt_moe.rank: 33 is more than the hidden size of LlamaForCausalLM (32)", "smaller rank, or null"),
    ),
    "no experts": (lambda f: {"pt_moe": BLOCK | {"num_experts": 0}}, ("pt_moe.num_experts: 0", "at least 1")),
    "more experts per prompt than experts": (
        lambda f: {"pt_moe": BLOCK | {"top_k": 4}},
        ("pt_moe.top_k: 4 is more than num_experts (3)",),
    ),
    "empty init_text": (
        lambda f: {"pt_moe": BLOCK | {"init_text": " "}},
        ("pt_moe.init_text: ' ' is not allowed", "or null"),
    ),
    "another number of texts than experts": (
        lambda f: {"pt_moe": BLOCK | {"init_text": ["a", "b"]}},
        ("pt_moe.init_text: 2 texts for 3 experts",),
    ),
    "a prompt longer than the model": (
        lambda f: {"pt_moe": BLOCK | {"num_virtual_tokens": 512}},
        ("512", "positions"),
    ),
    "no room for sequence_len": (
        lambda f: {"sequence_len": 505},
        ("sequence_len: 505 and the prompt of 8 tokens", "512 positions", "`sequence_len: 504` at most"),
    ),
    "a router that nothing trains": (
        lambda f: {"pt_moe": BLOCK | {"scale_by_router_prob": False}},
        ("pt_moe.scale_by_router_prob: false", "set router_aux_loss_coef above 0"),
    ),
    "balance loss without a router": (
        lambda f: {"pt_moe": {"num_experts": 1, "router_aux_loss_coef": 0.1}},
        ("pt_moe.router_aux_loss_coef: 0.1 means nothing with num_experts: 1",),
    ),
    "completion": (completion, ("`datasets[0].type: completion`", "no prompts", "router_input: sequence")),
    "train_on_inputs": (lambda f: {"train_on_inputs": True}, ("`train_on_inputs: true`", "router_input: sequence")),
    "pretraining_dataset": (
        lambda f: {"datasets": None, "pretraining_dataset": str(f / "few_rows.jsonl")},
        ("`pretraining_dataset`", "no prompts"),
    ),
    "rl": (lambda f: {"rl": "dpo"}, ("`rl: dpo` does not work with `adapter: pt_moe`", "without labels")),
    "lora_r": (lambda f: {"lora_r": 8}, ("`lora_r`", "write `rank` in the `pt_moe:` block")),
    "lora_target_modules": (
        lambda f: {"lora_target_modules": ["q_proj"]},
        ("`lora_target_modules` means nothing with `adapter: pt_moe`; remove it",),
    ),
    "misspelt key": (
        lambda f: {"pt_moe": {"num_virtual_token": 8}},
        ("pt_moe.num_virtual_token", "did you mean `num_virtual_tokens`?"),
    ),
    "no block": (lambda f: {"pt_moe": None}, ("needs a `pt_moe:` block", "`pt_moe: {}`")),
    "another method's block": (lambda f: {"perft": {"rank": 4}}, ("`perft:`", "'pt_moe'", "remove the block")),
}


def assert_refused(result: Result, parts: tuple[str, ...]) -> None:
    assert result.code == 1, result.output
    assert result.tracebacks == 1, result.output
    assert [part for part in parts if part not in result.error] == [], result.error


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_ends_with_one_message_before_anything_is_written(
    mistake: str, axolotl: AxolotlPool, folder: Path, base: Path, few_rows: Path, tmp_path: Path
) -> None:
    keys, parts = REFUSED[mistake]
    prepared = {"dataset_prepared_path": str(tmp_path / "prepared")}
    config = pt_moe_yaml(tmp_path / "refused.yaml", base, few_rows, **prepared | keys(folder))
    assert_refused(axolotl("train", config), parts)
    assert not any(tmp_path.rglob("adapter_*")) and not (tmp_path / "prepared").exists()


def test_an_encoder_decoder_is_refused_before_the_rows_are_tokenised(
    axolotl: AxolotlPool, few_rows: Path, tmp_path: Path
) -> None:
    T5Config(vocab_size=VOCAB_SIZE, d_model=32).save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    prepared = tmp_path / "prepared"
    config = pt_moe_yaml(tmp_path / "t5.yaml", tmp_path / "t5", few_rows, dataset_prepared_path=str(prepared))
    assert_refused(axolotl("train", config), ("base_model", "T5Config", "encoder-decoder", "decoder-only model"))
    assert not any(tmp_path.rglob("adapter_*")) and not prepared.exists()


@pytest.mark.parametrize(
    ("block", "steps", "warns"),
    [({"center_router_input": False}, 105, True), ({"router_aux_loss_coef": 0.0}, 55, False)],
)
def test_a_router_that_sends_everything_to_one_expert_is_warned_of_once(
    block: dict[str, Any],
    steps: int,
    warns: bool,
    axolotl: AxolotlPool,
    folder: Path,
    base: Path,
    few_rows: Path,
) -> None:
    name = f"collapse_{steps}"
    config = pt_moe_yaml(
        folder / f"{name}.yaml",
        base,
        few_rows,
        pt_moe=BLOCK | block,
        max_steps=steps,
        learning_rate=0.0,
        logging_steps=5,
    )
    result = axolotl("train", config)
    assert result.code == 0, result.output
    assert result.output.count("routers have collapsed") == warns
    if warns:
        line = next(line for line in result.output.splitlines() if "collapsed" in line)
        assert "pt_moe: 1 of 1 routers have collapsed: in prompt 100% of the choices since step 0" in line
        assert "until step 50" in line and "router_aux_loss_coef" in line
