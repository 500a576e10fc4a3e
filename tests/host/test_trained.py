"""What a run leaves behind for whoever loads its adapter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from axolotl.integrations.lm_eval.cli import build_lm_eval_command, get_model_path
from axolotl.utils.dict import DictDefault
from lm_eval.utils import simple_parse_args_string

from axolotl_moe_peft.host.trained import finish


@pytest.fixture
def output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", "theirs")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_the_bases_config_goes_from_beside_an_adapter_and_stays_beside_a_model(output_dir: Path) -> None:
    (output_dir / "model-00001-of-00002.safetensors").touch()
    finish(DictDefault(output_dir=str(output_dir)))
    assert (output_dir / "config.json").exists()
    (output_dir / "model-00001-of-00002.safetensors").unlink()
    for _ in range(2):  # each process of a run does it
        finish(DictDefault(output_dir=str(output_dir)))
        assert not (output_dir / "config.json").exists()
    assert os.environ["PYTHONPATH"] == "theirs"


@pytest.mark.parametrize("given", [None, "other,peft=mine"])
def test_lm_eval_after_a_run_gets_base_and_adapter_and_knows_the_methods(given: str | None, output_dir: Path) -> None:
    cfg = DictDefault(
        base_model="org/base",
        output_dir=str(output_dir),
        lm_eval_tasks=["a"],
        lm_eval_post_train=True,
        lm_eval_model=given,
        hub_model_id="org/adapter",
    )
    finish(cfg)
    (command,) = build_lm_eval_command(cfg.lm_eval_tasks, output_dir=cfg.output_dir, model=get_model_path(cfg))
    arguments = simple_parse_args_string(command[command.index("--model_args") + 1])
    expected = ("org/base", str(output_dir)) if given is None else ("other", "mine")
    assert (arguments["pretrained"], arguments["peft"]) == expected
    startup, *others = os.environ["PYTHONPATH"].split(os.pathsep)
    assert Path(startup, "sitecustomize.py").is_file() and others == ["theirs"]
