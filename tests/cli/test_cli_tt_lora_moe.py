"""Stage 2 through Axolotl's commands: dataset experts, packing, resuming, a pool that grows, and bad input."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_moe_peft import PerftConfig, TTLoraConfig
from tests.cli.cli_helpers import (
    AxolotlPool,
    Result,
    adapter_tensors,
    checksums,
    log_history,
    write_rows,
    write_yaml,
)

ALPHABETS = {"digits": "0123456789", "letters": "abcdefghij", "signs": "+-*/<>=!?%"}
EXPERTS = ("digits", "letters")
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_model: Callable[[str], Path]) -> Path:
    """An expert and rows for each of three tasks that a router can tell apart, and adapters that are no experts.

    The last of the three is a plain LoRA.
    """
    folder = tmp_path_factory.mktemp("tt_lora_moe")
    adapters: dict[str, Any] = {
        name: TTLoraConfig(rank=3 + k, alpha=400, task_type="CAUSAL_LM") for k, name in enumerate(ALPHABETS)
    }
    of_lora = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    adapters["signs"] = LoraConfig(r=4, init_lora_weights=False, **of_lora)
    adapters["dora"] = LoraConfig(use_dora=True, **of_lora)
    adapters["perft"] = PerftConfig(task_type="CAUSAL_LM")
    for name, config in adapters.items():
        torch.manual_seed(len(name))
        base = AutoModelForCausalLM.from_pretrained(base_model("mixtral"))
        get_peft_model(base, config).save_pretrained(folder / name)
    shutil.copytree(folder / "letters", folder / "foreign")
    config_file = folder / "foreign" / "adapter_config.json"
    config = json.loads(config_file.read_text()) | {"base_model_name_or_path": "org/another-model"}
    config_file.write_text(json.dumps(config))
    shutil.copytree(folder / "letters", folder / "truncated")
    weights = folder / "truncated" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    generator = random.Random(0)
    for name, alphabet in ALPHABETS.items():
        for split, count in (("train", 80), ("test", 12)):
            texts = ["".join(generator.choices(alphabet, k=generator.randint(4, 16))) for _ in range(2 * count)]
            write_rows(folder / f"{name}_{split}.jsonl", zip(texts[::2], texts[1::2]))
    alpaca = [{"instruction": "digits", "input": "".join(generator.choices("0123456789", k=9)), "output": "7"}] * 8
    (folder / "alpaca.jsonl").write_text("\n".join(map(json.dumps, alpaca)))
    return folder


def experts(folder: Path, *names: str) -> list[dict[str, str]]:
    return [{"name": name, "path": str(folder / name)} for name in names]


def datasets(folder: Path, split: str, *names: str) -> list[dict[str, str]]:
    return [
        {"path": str(folder / f"{name}_{split}.jsonl"), "type": "chat_template", "expert": name, "split": "train"}
        for name in names
    ]


def pool_yaml(path: Path, folder: Path, base: Path, names: tuple[str, ...] = EXPERTS, **keys: Any) -> Path:
    return write_yaml(
        path,
        base,
        folder / "digits_train.jsonl",
        **{
            "adapter": "tt_lora_moe",
            "perft": None,
            "tt_lora_moe": {"experts": experts(folder, *names)},
            "datasets": datasets(folder, "train", *names),
            "test_datasets": datasets(folder, "test", *names),
            "val_set_size": None,
            "dataset_prepared_path": str(path.with_suffix(".prepared")),
            "gradient_checkpointing": True,
            "max_steps": STEPS,
            "eval_steps": STEPS,
            "save_steps": STEPS // 2,
            "learning_rate": 0.05,
        }
        | keys,
    )


@pytest.fixture(scope="module")
def trained(axolotl: AxolotlPool, folder: Path, base_model: Callable[[str], Path]) -> Callable[[bool], Path]:
    """`trained(packing)`: the YAML of a finished run, beside its output folder and its log."""

    def train(packing: bool) -> Path:
        config = folder / f"pool_{packing}.yaml"
        if not config.exists():
            before = checksums(base_model("mixtral"))
            keys = {"sample_packing": True, "micro_batch_size": 1} if packing else {}
            pool_yaml(config, folder, base_model("mixtral"), **keys)
            result = axolotl("train", config)
            assert result.code == 0, result.output
            assert checksums(base_model("mixtral")) == before
            config.with_suffix(".log").write_text(result.output)
        return config

    return train


@pytest.mark.parametrize("packing", [False, True])
def test_the_router_learns_the_datasets_experts(packing: bool, trained: Callable[[bool], Path]) -> None:
    output_dir = trained(packing).with_suffix("")
    checkpoint = output_dir / f"checkpoint-{STEPS}"
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    training, evaluations = log_history(output_dir), [line for line in history if "eval_loss" in line]
    losses = [line["router_loss"] for line in training]
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
    for line in training:
        # the task loss gives the router no gradient, and is not computed
        assert line["loss"] == pytest.approx(line["router_loss"], abs=1e-4)  # the host rounds
    last = evaluations[-1]
    assert last["eval_router_accuracy"] > 0.9 > evaluations[0]["eval_router_accuracy"]
    for name in EXPERTS:
        assert last[f"eval_router_accuracy/{name}"] > 0.8
        assert f"eval_router_loss/{name}" in last
    # the loss through the chosen experts, of a random model
    assert 4 < last["eval_loss"] < 6


@pytest.mark.parametrize("packing", [False, True])
def test_the_saved_pool_is_complete_and_its_optimiser_holds_the_router_alone(
    packing: bool, trained: Callable[[bool], Path], folder: Path, base_model: Callable[[str], Path]
) -> None:
    output_dir = trained(packing).with_suffix("")
    tensors = adapter_tensors(output_dir)
    routers = sorted(tuple(tensor.shape) for name, tensor in tensors.items() if "prompt_router" in name)
    assert routers == [(2,), (2, 32), (2, 32)]
    state = torch.load(output_dir / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    assert sorted(tuple(m["exp_avg"].shape) for m in state["state"].values()) == routers
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model("mixtral")), output_dir)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    stage_one = [
        torch.cat(
            [
                core.flatten()
                for name, core in adapter_tensors(folder / e).items()
                if "layers.0" in name and "q_proj" in name
            ]
        )
        for e in EXPERTS
    ]
    assert torch.equal(layer.ttmoe_cores["default"], torch.cat(stage_one))


@pytest.mark.parametrize("packing", [False, True])
def test_the_log_warns_of_nothing_of_ours(packing: bool, trained: Callable[[bool], Path]) -> None:
    log = trained(packing).with_suffix(".log").read_text()
    ours = [line for line in log.splitlines() if re.search("tt_lora|axolotl_moe_peft|ttmoe", line)]
    assert [line for line in ours if re.search("warn|error", line, re.I)] == []


def test_resumed_training_equals_uninterrupted(
    axolotl: AxolotlPool, trained: Callable[[bool], Path], folder: Path
) -> None:
    config, resumed = trained(False), folder / "resumed"
    half = f"checkpoint-{STEPS // 2}"
    shutil.copytree(config.with_suffix("") / half, resumed / half)
    result = axolotl("train", config, f"--output-dir={resumed}", f"--resume-from-checkpoint={resumed / half}")
    assert result.code == 0, result.output
    lines, resumed_lines = log_history(config.with_suffix("")), log_history(resumed)
    # the same operations on the same numbers, noise included: no tolerance
    assert [line["loss"] for line in resumed_lines] == [line["loss"] for line in lines]
    straight, again = adapter_tensors(config.with_suffix("")), adapter_tensors(resumed)
    assert all(torch.equal(straight[name], again[name]) for name in straight)


@pytest.mark.matrix("commands: evaluate", "tt_lora_moe")
@pytest.mark.matrix("commands: inference", "tt_lora_moe")
def test_evaluate_and_inference_take_the_saved_pool_without_the_stage_one_folders(
    axolotl: AxolotlPool, trained: Callable[[bool], Path], folder: Path, base_model: Callable[[str], Path]
) -> None:
    pool = trained(False).with_suffix("")
    gone = [{"name": name, "path": str(folder / "gone" / name)} for name in EXPERTS]
    sets = {"datasets": datasets(folder, "train", "digits"), "test_datasets": datasets(folder, "test", "letters")}
    config = pool_yaml(folder / "evaluated.yaml", folder, base_model("mixtral"), tt_lora_moe={"experts": gone}, **sets)
    result = axolotl("evaluate", config, f"--lora-model-dir={pool}")
    assert result.code == 0, result.output
    for prefix, of, other in (("train", "digits", "letters"), ("eval", "letters", "digits")):
        for task in ("", f"/{of}"):
            assert float(re.search(rf"^.*\b{prefix}_router_accuracy{task}: ([\d.]+)$", result.output, re.M)[1]) > 0.8
        assert f"{prefix}_router_accuracy/{other}" not in result.output
    with (config.with_suffix("") / "eval_summary.csv").open() as file:
        rows = {row["metric"]: (row["training"], row["validation"]) for row in csv.DictReader(file)}
    assert all(rows["router_accuracy"]) and all(rows["router_loss"])
    assert [bool(value) for value in rows["router_loss/digits"]] == [True, False]
    assert [bool(value) for value in rows["router_loss/letters"]] == [False, True]
    assert f"tt_lora_moe adapter of {str(pool)!r} loaded, its parameters:" in result.output
    result = axolotl("inference", config, f"--lora-model-dir={pool}", stdin="1234?")
    assert result.code == 0, result.output
    assert len(result.output.rpartition("<|assistant|>")[2].strip(" =\n")) > 0, result.output


@pytest.mark.matrix("commands: train --lora-model-dir", "tt_lora_moe")
def test_a_trained_pool_takes_one_more_expert(
    axolotl: AxolotlPool, trained: Callable[[bool], Path], folder: Path, base_model: Callable[[str], Path]
) -> None:
    pool = trained(False).with_suffix("")
    config = pool_yaml(
        folder / "grown.yaml", folder, base_model("mixtral"), tuple(ALPHABETS), lora_model_dir=str(pool)
    )
    result = axolotl("train", config)
    assert result.code == 0, result.output
    before, after = adapter_tensors(pool), adapter_tensors(config.with_suffix(""))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "ttmoe_cores" in name:
            assert torch.equal(after[name][: len(tensor)], tensor)
    weight = next(tensor for name, tensor in after.items() if name.endswith("ttmoe_weight"))
    assert weight.shape[0] == 3
    first = log_history(config.with_suffix(""))[0]
    # it starts from the trained router: the two old tasks are told apart at once
    assert first["grad_norm"] > 0 and first["router_loss"] < 3
    reordered = {"experts": experts(folder, "letters", "digits")}
    other = pool_yaml(folder / "reordered.yaml", folder, base_model("mixtral"), tt_lora_moe=reordered)
    result = axolotl("train", other, f"--lora-model-dir={pool}")
    assert result.code == 1
    assert "has the experts digits, letters, the block letters, digits" in result.error


def test_the_label_is_part_of_the_dataset_cache_whatever_the_type(
    axolotl: AxolotlPool, folder: Path, base_model: Callable[[str], Path]
) -> None:
    prepared = folder / "cache"

    def labels_of(first: str, second: str, type_of_second: Any) -> set[tuple[str, int]]:
        before = set(prepared.glob("*/"))
        sets = datasets(folder, "train", "digits")
        sets[0]["expert"] = first
        sets.append({"path": str(folder / "alpaca.jsonl"), "type": type_of_second, "expert": second})
        keys = {"datasets": sets, "test_datasets": None, "dataset_prepared_path": str(prepared), "sequence_len": 512}
        result = axolotl("preprocess", pool_yaml(folder / "cached.yaml", folder, base_model("mixtral"), **keys))
        assert result.code == 0, result.output
        (new,) = set(prepared.glob("*/")) - before
        rows = load_from_disk(str(new))
        return {("alpaca" if len(r["input_ids"]) > 60 else "chat", *r["expert_labels"]) for r in rows}

    own_type = {
        "field_instruction": "instruction",
        "field_input": "input",
        "field_output": "output",
        "format": "below is an instruction that describes a task. {instruction} {input} answer: ",
    }
    assert labels_of("digits", "letters", "alpaca") == {("chat", 0), ("alpaca", 1)}
    assert labels_of("letters", "digits", "alpaca") == {("chat", 1), ("alpaca", 0)}
    assert labels_of("digits", "letters", own_type) == {("chat", 0), ("alpaca", 1)}


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], tuple[str, ...]]] = {
    "dataset without expert": (
        lambda f: {"datasets": [*datasets(f, "train", "digits"), {"path": "x.jsonl", "type": "chat_template"}]},
        ("datasets[1] (x.jsonl) has no `expert:`", "one of digits, letters"),
    ),
    "unknown expert": (
        lambda f: {"datasets": [datasets(f, "train", "digits")[0] | {"expert": "digit"}]},
        ("datasets[0].expert: 'digit'", "use one of digits, letters"),
    ),
    "unknown expert in test_datasets": (
        lambda f: {"test_datasets": [datasets(f, "test", "digits")[0] | {"expert": "digit"}]},
        ("test_datasets[0].expert: 'digit'",),
    ),
    "expert of another adapter": (
        lambda f: {"adapter": "tt_lora", "tt_lora": {}, "tt_lora_moe": None},
        ("datasets[0].expert means nothing with `adapter: tt_lora`",),
    ),
    "no block": (lambda f: {"tt_lora_moe": None}, ("needs a `tt_lora_moe:` block",)),
    "no experts": (lambda f: {"tt_lora_moe": {}}, ("tt_lora_moe.experts", "{name: ..., path: ...}")),
    "misspelt key": (
        lambda f: {"tt_lora_moe": {"experts": experts(f, *EXPERTS), "ruoter": "base_hidden"}},
        ("tt_lora_moe.ruoter", "did you mean `router`?"),
    ),
    "duplicate names": (
        lambda f: {"tt_lora_moe": {"experts": experts(f, "digits", "letters", "digits")}},
        ("'digits' is given twice",),
    ),
    "folder that is not there": (
        lambda f: {"tt_lora_moe": {"experts": [*experts(f, *EXPERTS), {"name": "rte", "path": "./nowhere"}]}},
        ("tt_lora_moe.experts: rte (./nowhere)", "adapter_config.json"),
    ),
    "another method's adapter": (
        lambda f: {"tt_lora_moe": {"experts": experts(f, *EXPERTS, "perft")}},
        ("tt_lora_moe.experts: perft", "type PERFT, not TT_LORA or LORA"),
    ),
    "another base's adapter": (
        lambda f: {"tt_lora_moe": {"experts": experts(f, *EXPERTS, "foreign")}},
        ("tt_lora_moe.experts: foreign", "trained on the base model 'org/another-model'"),
    ),
    "truncated file": (
        lambda f: {"tt_lora_moe": {"experts": experts(f, *EXPERTS, "truncated")}},
        ("tt_lora_moe.experts: truncated", "cannot be taken as an expert"),
    ),
    "more than a plain LoRA": (
        lambda f: {"tt_lora_moe": {"experts": experts(f, *EXPERTS, "dora")}},
        ("tt_lora_moe.experts: dora", "its use_dora: True makes it more than a plain LoRA"),
    ),
    "completion": (
        lambda f: {"datasets": [d | {"type": "completion"} for d in datasets(f, "train", *EXPERTS)]},
        ("`datasets[0].type: completion`", "no prompts", "router_input: sequence"),
    ),
    "train_on_inputs": (
        lambda f: {"train_on_inputs": True},
        ("`train_on_inputs: true`", "no prompts", "router_input: sequence"),
    ),
    "rl": (lambda f: {"rl": "dpo"}, ("`rl: dpo` does not work with `adapter: tt_lora_moe`", "without labels")),
    "pretraining_dataset": (
        lambda f: {"datasets": None, "pretraining_dataset": "x.jsonl"},
        ("`pretraining_dataset`", "leaves no prompts", "Use `datasets`"),
    ),
    "lora_r": (lambda f: {"lora_r": 8}, ("`lora_r` means nothing with `adapter: tt_lora_moe`",)),
}


def assert_refused(result: Result, parts: tuple[str, ...]) -> None:
    assert result.code == 1, result.output
    assert result.tracebacks == 1, result.output
    for part in parts:
        assert part in result.error, result.error


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_ends_with_one_message_before_anything_is_written(
    mistake: str, axolotl: AxolotlPool, folder: Path, base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    keys, parts = REFUSED[mistake]
    config = pool_yaml(tmp_path / "refused.yaml", folder, base_model("mixtral"), **keys(folder))
    assert_refused(axolotl("train", config), parts)
    assert not any(tmp_path.rglob("adapter_*")) and not config.with_suffix(".prepared").exists()


def test_an_expert_without_rows_is_a_warning(
    axolotl: AxolotlPool, folder: Path, base_model: Callable[[str], Path]
) -> None:
    keys = {"datasets": datasets(folder, "train", "digits"), "test_datasets": None}
    result = axolotl("preprocess", pool_yaml(folder / "lonely.yaml", folder, base_model("mixtral"), **keys))
    assert result.code == 0, result.output
    assert "no dataset has `expert: letters`" in result.output


@pytest.mark.matrix("commands: merge-lora", "tt_lora_moe", cell="refused: the expert is chosen for each sequence")
def test_merge_lora_is_refused_with_the_reason(axolotl: AxolotlPool, trained: Callable[[bool], Path]) -> None:
    result = axolotl("merge-lora", trained(False))
    assert_refused(result, ("cannot merge an adapter of type tt_lora_moe", "chosen for each sequence"))
    assert not (trained(False).with_suffix("") / "merged").exists()
