"""What the host knows for a routing report: whether there can be one, the datasets' names, the figures of the log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner

from axolotl_moe_peft.host.base_model import check_base_model
from axolotl_moe_peft.host.report import history_of, read_state
from axolotl_moe_peft_commands import moe_report
from tests.tiny_models import tiny_config

Load = Callable[..., DictDefault]
REPORT = {"routing_report": True}


@pytest.mark.parametrize(
    ("adapter", "block"),
    [
        ("perft", {"target_modules": "mlp", "variant": "single"}),
        ("pt_moe", {"num_experts": 1, "rank": 4}),
    ],
)
def test_nothing_to_report(adapter: str, block: dict, load: Load, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    tiny_config("llama").save_pretrained(dense)
    keys = {"perft": None, "adapter": adapter, "base_model": str(dense), "val_set_size": 0.1, "sequence_len": 64}
    with pytest.raises(ValueError, match=f"{adapter}.routing_report: true reports what routers do, and neither"):
        check_base_model(load(**keys | {adapter: block | REPORT}))
    check_base_model(load(**keys | {adapter: block}))


def test_names_of_datasets(load: Load) -> None:
    paths = [{"path": "a"}, {"path": "b", "name": "x"}, {"path": "b", "name": "y"}, {"path": "c"}, {"path": "c"}]
    datasets = [path | {"type": "chat_template"} for path in paths]
    cfg = load(perft=REPORT, val_set_size=0.1, datasets=datasets)
    names = [json.loads(entry["conversation"])["dataset"] for entry in cfg.datasets]
    assert names == ["a", "b (x)", "b (y)", "datasets[3]: c", "datasets[4]: c"]
    assert all(entry["conversation"] is None for entry in load(perft={}, val_set_size=0.1, datasets=datasets).datasets)


def test_figures_of_the_log(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 2.0, "expert_entropy": 0.5, "learning_rate": 1e-3},
        {"step": 1, "eval_loss": 2.0, "eval_router_accuracy": 0.5},
        {"step": 2, "loss": 1.0, "expert_entropy": 0.7, "router_accuracy/a": 1.0},
    ]
    assert history_of(lines) == {"expert_entropy": [(1, 0.5), (2, 0.7)], "router_accuracy/a": [(2, 1.0)]}
    assert read_state(str(tmp_path)) == {} == read_state("owner/name")
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert read_state(str(tmp_path)) == {"global_step": 10}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adapter": "lora"}, "adapter: 'lora' is none of this package"),
        ({"adapter": "perft", "perft": {}, "output_dir": "nowhere"}, "there is no trained adapter in output_dir"),
        ({"adapter": "perft", "perft": {}, "lora_model_dir": "x", "deepspeed": "y"}, "without DeepSpeed"),
    ],
)
def test_the_command_says_what_is_wrong(keys: dict, message: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(keys))
    result = CliRunner().invoke(moe_report, [str(config)])
    assert result.exit_code == 1 and message in result.output
