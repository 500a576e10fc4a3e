"""Promises of training, resuming, evaluating, generating and merging through Axolotl's commands."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer

import axolotl_moe_peft  # noqa: F401  (makes the methods known to PEFT)
from tests.cli.cli_helpers import (
    AxolotlPool,
    Result,
    adapter_tensors,
    checksums,
    lines_to_worry_about,
    log_history,
    run_command,
    save_tokenizer,
    tokenised,
    write_rows,
    write_yaml,
)
from tests.moe_families import tiny_family_model
from tests.tiny_models import VOCAB_SIZE, random_ids, tiny_model

ROUTED = {"variant": "routed", "num_experts": 4, "num_experts_per_tok": 2, "rank": 4, "router_z_loss_coef": 0.001}
TT_LORA = {"rank": 4, "target_modules": "all-linear", "factors": {"q_proj": {"in": [8, 4], "out": [4, 2, 4]}}}
# a different family for each
VARIANTS = {
    "routed": ("mixtral", {"perft": ROUTED}),
    "embedded": ("olmoe", {"perft": {"variant": "embedded", "rank": 4}}),
    "dense": (
        "qwen3_moe",
        {"perft": {"variant": "dense", "num_experts": 2, "rank": 4, "expert_type": "parallel_adapter"}},
    ),
    "single": ("mixtral", {"perft": {"variant": "single", "rank": 4}}),
    "tt_lora": ("llama", {"adapter": "tt_lora", "perft": None, "tt_lora": TT_LORA}),
}
PERFT = [variant for variant in VARIANTS if variant != "tt_lora"]
# one of each method, with all that a run can have
FULL = ("routed", "tt_lora")
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
def full_config(folder: Path, rows: Path, base_model: Callable[[str], Path]) -> Callable[[str], Path]:
    """As a user trains: packing, accumulation, reentrant gradient checkpointing (the default), checkpoints.

    Rows are packed in order: where Axolotl shuffles before it packs, a resumed run sees other rows, with any adapter.
    """

    def write(variant: str) -> Path:
        family, keys = VARIANTS[variant]
        return write_yaml(
            folder / f"{variant}.yaml",
            base_model(family),
            rows,
            sample_packing=True,
            sample_packing_eff_est=1.0,
            sample_packing_sequentially=True,
            curriculum_sampling=True,
            gradient_checkpointing=True,
            micro_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            **keys,
        )

    return write


@pytest.fixture(scope="module")
def preprocessed(axolotl: AxolotlPool, full_config: Callable[[str], Path]) -> Result:
    return axolotl("preprocess", full_config("routed"))


@pytest.fixture(scope="module")
def trained(
    axolotl: AxolotlPool,
    base_model: Callable[[str], Path],
    folder: Path,
    few_rows: Path,
    full_config: Callable[[str], Path],
    preprocessed: Result,
) -> Callable[[str], Run]:
    """`trained("dense")`: the run of that variant."""

    @functools.cache
    def train(variant: str) -> Run:
        family, keys = VARIANTS[variant]
        base = base_model(family)
        before = checksums(base)
        config = (
            full_config(variant) if variant in FULL else write_yaml(folder / f"{variant}.yaml", base, few_rows, **keys)
        )
        if variant == "single":  # the command of the documentation, imports and all
            result = run_command("accelerate", "launch", "-m", "axolotl.cli.train", str(config))
        else:
            result = axolotl("train", config)
        assert result.code == 0, result.output
        return Run(base, config, config.with_suffix(""), result.output, before)

    return train


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


@pytest.mark.parametrize("variant", PERFT)
def test_training_moves_every_up_projection(variant: str, trained: Callable[[str], Run]) -> None:
    tensors = adapter_tensors(trained(variant).output_dir)
    ups = [tensor for name, tensor in tensors.items() if "perft_up" in name]
    assert len(ups) == 2  # one for each layer
    assert all(up.abs().max() > 1e-3 for up in ups)  # they start at 0


# of two layers down, up and router; of two layers the cores of q, k, v, o, gate, up and down
@pytest.mark.parametrize(
    ("variant", "tensors"), [("routed", 2 * 3), ("tt_lora", 2 * (5 + 3 + 3 + 4 + 4 + 4 + 4))], ids=FULL
)
def test_training_goes_on_moving_every_tensor(variant: str, tensors: int, trained: Callable[[str], Run]) -> None:
    output_dir = trained(variant).output_dir
    earlier, later = adapter_tensors(output_dir / f"checkpoint-{STEPS // 2}"), adapter_tensors(output_dir)
    assert len(later) == tensors and earlier.keys() == later.keys()
    assert [name for name in later if torch.equal(earlier[name], later[name])] == []


@pytest.mark.parametrize("variant", FULL)
def test_optimiser_holds_exactly_the_adapter(variant: str, trained: Callable[[str], Run]) -> None:
    run = trained(variant)
    state = torch.load(run.output_dir / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    held = sorted(tuple(moments["exp_avg"].shape) for moments in state["state"].values())
    assert held == sorted(tuple(tensor.shape) for tensor in adapter_tensors(run.output_dir).values())
    assert sum(len(group["params"]) for group in state["param_groups"]) == len(held)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_adapter_loads_with_plain_peft(variant: str, trained: Callable[[str], Run]) -> None:
    run = trained(variant)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.base), run.output_dir)
    prefix = model.base_model.prefix
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if prefix in name}
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
    parts = [("cores", total)] if variant == "tt_lora" else [("experts", total - routers), ("router", routers)]
    expected = [*parts, ("other", 0), ("total", total)]
    adapter = "tt_lora" if variant == "tt_lora" else "perft"
    table = run.output[run.output.index(f"{adapter} adapter attached, trainable parameters:") :].splitlines()[2:]
    rows = [line.split() for line in table[: len(expected)]]
    assert [(row[0], int(row[2].replace(",", ""))) for row in rows] == expected
    # float32, and AdamW's two moments
    size, states = (f"{4 * n / 2**20:,.2f} MiB" for n in (total, 2 * total))
    memory = f"memory of the adapter: parameters {size} + gradients {size} + states of the optimiser {states} ="
    assert memory in run.output
    assert ("the base model is frozen, routers of its own included" in run.output) == (run.base.name != "llama")
    estimated = run.output[run.output.index("memory that training will take on each process, estimated:") :]
    assert [line.split()[0] for line in estimated.splitlines()[1:7]] == [
        "base",
        "adapter",
        "gradients",
        "optimiser",
        "activations",
        "total",
    ]
    assert "?" not in estimated.split("total")[0]


def test_the_start_is_that_of_the_seed_and_without_one_of_the_hosts(
    axolotl: AxolotlPool, folder: Path, base_model: Callable[[str], Path], few_rows: Path
) -> None:
    starts = []
    for seed in (None, 42, 43):
        config = write_yaml(
            folder / f"seed_{seed}.yaml", base_model("mixtral"), few_rows, seed=seed, learning_rate=0.0, max_steps=1
        )
        result = axolotl("train", config)
        assert result.code == 0, result.output
        starts.append(adapter_tensors(config.with_suffix("")))
    name = next(name for name in starts[0] if "perft_router" in name)
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[1][name], starts[2][name])


def test_log_names_the_adapted_layers_where_not_all_have_experts(
    axolotl: AxolotlPool, folder: Path, few_rows: Path
) -> None:
    base = folder / "half_dense"
    tiny_model("qwen3_moe", mlp_only_layers=[0]).save_pretrained(base)
    save_tokenizer(base)
    config = write_yaml(folder / "half_dense.yaml", base, few_rows, max_steps=1)
    result = axolotl("train", config)
    assert result.code == 0, result.output
    assert "layers with an adapter: 1\n" in result.output


def test_a_base_whose_code_needs_values_is_checked_once_it_is_loaded(
    axolotl: AxolotlPool, folder: Path, few_rows: Path
) -> None:
    base = folder / "jetmoe_base"  # its router counts tokens in Python
    tiny_family_model("jetmoe", vocab_size=VOCAB_SIZE).save_pretrained(base)
    save_tokenizer(base)
    block = {"variant": "embedded", "rank": 4}
    result = axolotl("train", write_yaml(folder / "jetmoe.yaml", base, few_rows, perft=block, max_steps=1))
    assert result.code == 0, result.output
    assert "the code of JetMoeForCausalLM asks for values; its memory is known once it is loaded" in result.output
    assert adapter_tensors(folder / "jetmoe")


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


@pytest.mark.parametrize("variant", FULL)
def test_resumed_training_equals_uninterrupted(
    variant: str, axolotl: AxolotlPool, trained: Callable[[str], Run], tmp_path: Path
) -> None:
    run = trained(variant)
    resumed = tmp_path / "resumed"
    shutil.copytree(run.output_dir / f"checkpoint-{STEPS // 2}", resumed / f"checkpoint-{STEPS // 2}")
    result = axolotl(
        "train", run.config, f"--output-dir={resumed}", f"--resume-from-checkpoint={resumed}/checkpoint-{STEPS // 2}"
    )
    assert result.code == 0, result.output
    lines, resumed_lines = log_history(run.output_dir), log_history(resumed)
    assert [line["step"] for line in resumed_lines] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", *(FIGURES if variant == "routed" else ())):
        # the same operations on the same numbers: no tolerance
        assert [line[key] for line in resumed_lines] == [line[key] for line in lines], key
    tensors, resumed_tensors = adapter_tensors(run.output_dir), adapter_tensors(resumed)
    assert tensors.keys() == resumed_tensors.keys()
    assert all(torch.equal(tensors[name], resumed_tensors[name]) for name in tensors)


@pytest.mark.matrix("commands: train --lora-model-dir", "{variant}")
@pytest.mark.parametrize(
    ("variant", "keys"),
    [
        ("routed", {"perft": ROUTED | {"dropout": 0.1, "router_aux_loss_coef": 0.0, "init": "paper"}}),
        ("tt_lora", {"tt_lora": TT_LORA | {"dropout": 0.1, "init": "zero"}}),
    ],
    ids=FULL,
)
def test_lora_model_dir_continues_from_the_saved_adapter(
    variant: str,
    keys: dict[str, Any],
    axolotl: AxolotlPool,
    trained: Callable[[str], Run],
    tmp_path: Path,
    few_rows: Path,
) -> None:
    run = trained(variant)
    # what shapes training may differ from the saved adapter_config.json
    keys = VARIANTS[variant][1] | keys | {"learning_rate": 0.0, "max_steps": 1}
    config = write_yaml(tmp_path / "continued.yaml", run.base, few_rows, **keys)
    result = axolotl("train", config, f"--lora-model-dir={run.output_dir}")
    assert result.code == 0, result.output
    given, saved = adapter_tensors(run.output_dir), adapter_tensors(config.with_suffix(""))
    assert given.keys() == saved.keys()
    assert all(torch.equal(given[name], saved[name]) for name in given)
    (line,) = log_history(config.with_suffix(""))
    assert line["grad_norm"] > 0  # it was being trained


@pytest.mark.matrix("commands: evaluate", "{variant}")
@pytest.mark.parametrize("variant", FULL)
def test_evaluate_measures_the_trained_adapter(
    variant: str, axolotl: AxolotlPool, trained: Callable[[str], Run], tmp_path: Path, few_rows: Path
) -> None:
    run = trained(variant)
    keys = VARIANTS[variant][1] | {"eval_batch_size": 4}
    config = write_yaml(tmp_path / "evaluated.yaml", run.base, few_rows, **keys)
    result = axolotl("evaluate", config, f"--lora-model-dir={run.output_dir}")
    assert result.code == 0, result.output
    assert lines_to_worry_about(result.output) == []
    assert_speaks_of_no_training(result.output)
    with (config.with_suffix("") / "eval_summary.csv").open() as file:
        loss = float({row["metric"]: row["training"] for row in csv.DictReader(file)}["loss"])
    assert f"train_loss: {loss}" in result.output

    base = AutoModelForCausalLM.from_pretrained(run.base)
    base_loss = mean_loss(base, few_rows)
    adapted_loss = mean_loss(PeftModel.from_pretrained(base, run.output_dir).eval(), few_rows)
    assert loss == pytest.approx(adapted_loss, abs=1e-5)  # float32; padded there, row by row here
    assert loss < base_loss - 0.2


def assert_speaks_of_no_training(output: str) -> None:
    assert "loaded, its parameters:" in output
    assert not re.search("trainable parameters|states of the optimiser|the base model is frozen", output)


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
def test_transformers_loads_what_a_run_leaves_from_its_folder(trained: Callable[[str], Run]) -> None:
    run = trained("routed")
    assert not (run.output_dir / "config.json").exists()  # with which transformers looks for a whole model there
    ids = random_ids(2, 9)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.base), run.output_dir).eval()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(run.output_dir)(ids).logits, expected(ids).logits)
    text = "what is 1 + 7?"
    tokenizer = AutoTokenizer.from_pretrained(run.output_dir)
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(run.base)(text).input_ids
    card = (run.output_dir / "README.md").read_text()
    assert (
        card.count("axolotl moe-serve ADAPTER") == 1
        and f"PERFT (routed, experts: 4, rank: 4) for `{run.base}`" in card
    )


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


@pytest.mark.matrix("commands: inference", "{variant}")
@pytest.mark.parametrize("variant", FULL)
def test_inference_answers_a_prompt(variant: str, axolotl: AxolotlPool, trained: Callable[[str], Run]) -> None:
    run = trained(variant)
    result = axolotl("inference", run.config, f"--lora-model-dir={run.output_dir}", stdin="what is 1 + 7?")
    assert result.code == 0, result.output
    assert lines_to_worry_about(result.output) == []
    assert_speaks_of_no_training(result.output)
    answer = result.output.rpartition("<|assistant|>")[2]
    assert "<|user|>" in result.output and len(answer.strip(" =\n")) > 0, result.output


@pytest.mark.matrix("commands: merge-lora", "perft", cell="refused: no weight of the base computes what a router adds")
@pytest.mark.parametrize("method", ["memory_efficient", "legacy"])
def test_merge_lora_refuses_perft_with_the_reason(
    method: str, axolotl: AxolotlPool, trained: Callable[[str], Run]
) -> None:
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


@pytest.mark.matrix("commands: merge-lora", "tt_lora")
@torch.no_grad()
def test_merge_lora_writes_a_model_that_computes_what_base_and_adapter_do(
    axolotl: AxolotlPool, trained: Callable[[str], Run]
) -> None:
    run = trained("tt_lora")
    saved = adapter_checksums(run)
    result = axolotl("merge-lora", run.config)
    assert result.code == 0, result.output
    assert lines_to_worry_about(result.output) == []
    assert_speaks_of_no_training(result.output)
    assert adapter_checksums(run) == saved
    ids = random_ids(2, 9)
    merged = AutoModelForCausalLM.from_pretrained(run.output_dir / "merged")
    assert not hasattr(merged, "peft_config")
    base = AutoModelForCausalLM.from_pretrained(run.base)
    of_base = base(ids).logits
    adapted = PeftModel.from_pretrained(base, run.output_dir).eval()(ids).logits
    # float32: the update is added to the weight instead of to the layer's output
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - of_base).abs().max() > 0.1


def test_merge_lora_refuses_the_method_that_would_write_the_base_unchanged(
    axolotl: AxolotlPool, trained: Callable[[str], Run], tmp_path: Path
) -> None:
    run = trained("tt_lora")
    result = axolotl(
        "merge-lora",
        run.config,
        "--merge-method=memory_efficient",
        f"--lora-model-dir={run.output_dir}",
        f"--output-dir={tmp_path / 'out'}",
    )
    assert result.code == 1
    assert "`merge_method: memory_efficient`" in result.error and "Remove the key" in result.error
    assert checksums(tmp_path / "out") == {}


@torch.no_grad()
def test_export_tt_lora_writes_a_lora_that_computes_the_same(
    axolotl: AxolotlPool, trained: Callable[[str], Run], tmp_path: Path
) -> None:
    run = trained("tt_lora")
    result = axolotl("export-tt-lora", run.output_dir, str(tmp_path / "lora"))
    assert result.code == 0, result.output
    tensors = len(adapter_tensors(tmp_path / "lora"))
    assert f"wrote {tensors} tensors to {tmp_path / 'lora'}" in result.output.splitlines()
    assert lines_to_worry_about(result.output) == []
    ids = random_ids(2, 9)
    logits = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.base), folder).eval()(ids).logits
        for folder in (run.output_dir, tmp_path / "lora")
    ]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)  # float32: the same products, unpadded


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{base}", "{out}"], 1, "Error: '{base}' holds no adapter_config.json; give the folder of a saved adapter."),
        (["{base}"], 2, "Error: Missing argument 'OUT_FOLDER'."),
    ],
    ids=["no adapter", "no second folder"],
)
def test_export_tt_lora_refuses_in_one_line(
    arguments: list[str],
    code: int,
    message: str,
    axolotl: AxolotlPool,
    base_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    paths = {"base": base_model("llama"), "out": tmp_path / "lora"}
    given = [argument.format(**paths) for argument in arguments]
    result = axolotl("export-tt-lora", *given)
    assert (result.code, result.tracebacks) == (code, 0), result.output
    assert message.format(**paths) in result.output.splitlines()
    assert not (tmp_path / "lora").exists()


def adapter_checksums(run: Run) -> dict[str, str]:
    return {name: digest for name, digest in checksums(run.output_dir).items() if not name.startswith("merged/")}
