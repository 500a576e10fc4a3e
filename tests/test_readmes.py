"""What the methods' READMEs say: their scripts run, and their tables have the keys and defaults of the code."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig, TTLoraMoeConfig, launcher
from axolotl_moe_peft.shared.config import ModulesToSaveConfig
from tests.cli.cli_helpers import fill_vocabulary, save_base_model
from tests.tiny_adapters import trained

ROOT = Path(__file__).parents[1]
CONFIGS = {"perft": PerftConfig, "tt_lora": TTLoraConfig, "tt_lora_moe": TTLoraMoeConfig, "pt_moe": PTMoeConfig}
every_method = pytest.mark.parametrize("method", CONFIGS)


def readme(method: str) -> str:
    return (ROOT / "axolotl_moe_peft" / method / "README.md").read_text(encoding="utf-8")


def rows(method: str) -> list[str]:
    """The rows of the table of keys."""
    return (
        readme(method).partition("| key | default | meaning |\n|---|---|---|\n")[2].partition("\n\n")[0].splitlines()
    )


@every_method
def test_the_script_runs(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(re.search(r"```python\n(.+?)```", readme(method), flags=re.DOTALL)[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@every_method
def test_the_table_has_every_key_and_no_other(method: str) -> None:
    named = {key for row in rows(method) for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    of_peft = {field.name for field in dataclasses.fields(ModulesToSaveConfig)}
    assert named == {field.name for field in dataclasses.fields(CONFIGS[method])} - of_peft


@every_method
def test_the_defaults_are_those_of_the_code(method: str) -> None:
    experts = {"experts": [{"name": "a", "path": "b"}]} if method == "tt_lora_moe" else {}
    config = CONFIGS[method](**experts)
    for row in rows(method):
        keys = re.findall(r"`(\w+)`", row.split("|")[1])
        defaults = yaml.safe_load(f"[{row.split('|')[2].replace('`', '')}]")
        defaults = defaults * len(keys) if len(defaults) == 1 else defaults
        stated = dict(zip(keys, defaults, strict=True))
        assert stated in ({key: getattr(config, key) for key in keys}, {"experts": "required"})


def test_the_lines_that_use_a_trained_adapter_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of Axolotl's commands are tested with these (tests/cli); inference waits for what is typed."""
    section = (ROOT / "README.md").read_text().partition("## Use a trained adapter")[2].partition("\n## ")[0]
    shell, python = (re.findall(r"^    (.+)$", part, re.M) for part in section.split("or in Python"))
    folder = tmp_path / "outputs" / "olmoe-perft"
    base = save_base_model(tmp_path / "base", "olmoe")
    fill_vocabulary(base)
    trained("perft", AutoModelForCausalLM.from_pretrained(base), []).save_pretrained(folder)
    (tmp_path / "task.yaml").write_text("""
task: task
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: label
""")
    (tmp_path / "rows.jsonl").write_text('{"question": "1 or 2?", "label": 0}\n')
    monkeypatch.chdir(tmp_path)
    script = ["import axolotl_moe_peft, peft, transformers", *python]
    assert len(script) == 4
    Path("script.py").write_text("\n".join(script))
    runpy.run_path("script.py")
    commands = "\n".join(shell).replace("\\\n", "").splitlines()
    of_axolotl = [command.split()[1] for command in commands if command.startswith("axolotl ")]
    assert of_axolotl == ["inference", "evaluate", "merge-lora"]
    if not find_spec("lm_eval"):  # which Axolotl brings
        return
    (command,) = commands[len(of_axolotl) :]
    command = command.replace("allenai/OLMoE-1B-7B-0924", "base").replace("gsm8k", "task")
    python, option, package, *arguments = shlex.split(command)
    assert (python, option, package) == ("python", "-m", "axolotl_moe_peft")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(SystemExit) as end:
        launcher.main([*arguments, "--device", "cpu", "--include_path", "."])
    assert not end.value.code
    assert re.search(r"acc\s*\|", capsys.readouterr().out)


def test_every_link_leads_somewhere() -> None:
    pages = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    for page in pages.stdout.split():
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
            assert link.startswith("http") or (ROOT / page).parent.joinpath(link).exists(), (page, link)
