"""The routing report through Axolotl's commands: at the end of training, by itself, packed, in several processes."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.adapters import adapter_keys
from tests.cli.cli_helpers import AxolotlPool, Result, run_command, write_rows, write_yaml
from tests.cli.test_cli_processes import HANGS, MODES, PLUGIN, SHIM

METHODS = ("perft", "perft embedded", "tt_lora_moe", "pt_moe")
PACKED = {"sample_packing": True, "micro_batch_size": 1, "pad_to_sequence_len": False}
MATHS, LAW = 7, 4  # rows for evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_rows(folder / "train.jsonl", ((f"what is {i}?", "ok" * (1 + i % 3)) for i in range(12)))
    write_rows(folder / "maths.jsonl", ((f"how much is {i} + {i * i}?", str(i + i * i)) for i in range(MATHS)))
    write_rows(folder / "law.jsonl", (("who may " + "vote " * (1 + i) + "?", "all of them") for i in range(LAW)))
    return folder


@pytest.fixture(scope="module")
def write(
    folder: Path, base_model: Callable[[str], Path], experts: Callable[[str], Path], start: Callable[..., Path]
) -> Callable[..., Path]:
    """`write("perft", "packed", **keys)`: a YAML of a run that hardly moves a trained adapter."""

    def write(adapter: str, name: str, **keys: Any) -> Path:
        settings = adapter_keys(adapter, experts("mixtral"))
        method = settings["adapter"]
        block = settings[method] | {"routing_report": True}
        expert = [{"expert": name} if method == "tt_lora_moe" else {} for name in "ab"]
        rows = folder / "train.jsonl"
        settings |= {
            method: block,
            "datasets": [{"path": str(rows), "type": "chat_template", **expert[0]}],
            "test_datasets": [
                {"path": str(folder / f"{name}.jsonl"), "type": "chat_template", "split": "train", **label}
                for name, label in zip(("maths", "law"), expert)
            ],
            "dataset_prepared_path": str(folder / "prepared"),
            "lora_model_dir": str(start("mixtral", adapter)),
            "learning_rate": 1e-30,
            "max_steps": 2,
            "save_steps": 2,
            "val_set_size": None,
        }
        return write_yaml(folder / f"{adapter} {name}.yaml", base_model("mixtral"), rows, **settings | keys)

    return write


@pytest.fixture(scope="module")
def trained(axolotl: AxolotlPool, write: Callable[..., Path]) -> Callable[..., Path]:
    """`trained("perft")`: the YAML of a finished run."""

    @functools.cache
    def train(adapter: str) -> Path:
        config = write(adapter, "trained")
        result = axolotl("train", config)
        assert result.code == 0, result.output
        return config

    return train


def moe_report(config: Path, *options: str) -> Result:
    return run_command(sys.executable, "-m", "axolotl_moe_peft.report", str(config), *options)


def report_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "routing.json").read_text())


def measured(folder: Path) -> dict[str, Any]:
    return {key: report_in(folder)[key] for key in ("datasets", "routers", "hidden")}


@pytest.mark.matrix("routing_report: at the end of training", "{adapter}")
@pytest.mark.parametrize("adapter", METHODS)
def test_training_ends_with_a_report(adapter: str, trained: Callable[..., Path], folder: Path) -> None:
    report = report_in(trained(adapter).with_suffix(""))
    page = (trained(adapter).with_suffix("") / "routing.html").read_text()
    assert (report["version"], report["method"], report["step"]) == (1, adapter.split()[0], 2)
    assert [d["name"] for d in report["datasets"]] == [str(folder / "maths.jsonl"), str(folder / "law.jsonl")]
    assert [d["rows"] for d in report["datasets"]] == [MATHS, LAW]
    tokens = [d["tokens"] for d in report["datasets"]]
    routers = {router["of"]: router for router in report["routers"]}
    assert list(routers) == (["base"] if adapter == "perft embedded" else ["adapter", "base"])
    for layer in routers["base"]["layers"]:  # two experts for each token of the text
        assert [sum(counts) for counts in layer["choices"]] == [2 * n for n in tokens]
    if adapter in ("tt_lora_moe", "pt_moe"):
        (layer,) = routers["adapter"]["layers"]
        assert [sum(counts) for counts in layer["choices"]] == [MATHS, LAW]
        assert (routers["adapter"]["confusion"] is not None) == (adapter == "tt_lora_moe")
        assert "h o w   m u c h" in page  # the tokenizer has a token for each character
    if adapter == "perft":
        assert report["history"]["expert_entropy"][1][0] == 2
    assert f"{sum(tokens):,} tokens" in page


@pytest.mark.matrix("routing_report: packed, and axolotl moe-report", "perft")
def test_packed_rows_and_the_command_say_the_same(
    trained: Callable[..., Path], write: Callable[..., Path], axolotl: AxolotlPool
) -> None:
    padded = trained("perft").with_suffix("")
    packed = write("perft", "packed", **PACKED)
    result = axolotl("train", packed)
    assert result.code == 0, result.output
    assert measured(packed.with_suffix("")) == measured(padded)
    result = axolotl("evaluate", packed)  # rows keep the name of their dataset, of which no model knows
    assert result.code == 0, result.output
    before = report_in(padded)
    (padded / "routing.json").unlink()
    result = moe_report(trained("perft"), "--lora-model-dir", str(padded))
    assert result.code == 0, result.output
    assert report_in(padded) == before


@pytest.mark.matrix("routing_report: processes: 2, {mode}", "perft")
@pytest.mark.parametrize("mode", list(MODES)[:2])
def test_two_processes_measure_what_one_does(
    mode: str, trained: Callable[..., Path], write: Callable[..., Path], axolotl: AxolotlPool
) -> None:
    # of so few tokens that the rows are several batches
    config = write("perft", mode, plugins=[SHIM, PLUGIN], eval_batch_size=1, **MODES[mode])
    result = axolotl("train", config, processes=2, timeout=HANGS)
    assert result.code == 0, result.output
    assert measured(config.with_suffix("")) == measured(trained("perft").with_suffix(""))


def test_a_part_of_the_training_data(write: Callable[..., Path], axolotl: AxolotlPool, folder: Path) -> None:
    datasets = [{"path": str(folder / f"{name}.jsonl"), "type": "chat_template"} for name in ("train", "law")]
    config = write("perft", "held out", datasets=datasets, test_datasets=None, val_set_size=6)
    result = axolotl("train", config)
    assert result.code == 0, result.output
    of = {d["name"]: d["rows"] for d in report_in(config.with_suffix(""))["datasets"]}
    assert set(of) == {str(folder / "train.jsonl"), str(folder / "law.jsonl")} and sum(of.values()) == 6


def test_a_report_that_fails_leaves_a_trained_adapter(write: Callable[..., Path], axolotl: AxolotlPool) -> None:
    config = write("perft", "in the way", plugins=[PLUGIN], max_steps=1, save_steps=9)
    (config.with_suffix("") / "routing.json").mkdir(parents=True)
    result = axolotl("train", config)
    assert result.code and "RuntimeError: the adapter is trained and saved in" in result.output
    assert (config.with_suffix("") / "adapter_model.safetensors").is_file()


def test_without_evaluation_data(write: Callable[..., Path], axolotl: AxolotlPool) -> None:
    result = axolotl("train", write("perft", "nothing held out", test_datasets=None))
    assert result.code and "perft.routing_report: true needs evaluation data" in result.output
    assert "Loading raw datasets" not in result.output
