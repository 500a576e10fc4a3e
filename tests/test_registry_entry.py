"""The entry for Axolotl's community registry is one that its checks take, and its own checks pass."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from tests import registry_entry

SOURCE = "https://github.com/someone/axolotl-moe-peft"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=registry_entry.ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_prints_an_entry_of_the_registrys_form() -> None:
    done = run(sys.executable, "-m", "tests.registry_entry", SOURCE)
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{2,40}", entry["name"])
    assert 8 <= len(entry["description"]) <= 200
    assert (entry["source"], entry["maintainer"], entry["license"]) == (SOURCE, "someone", "Apache-2.0")
    assert re.fullmatch(r"[0-9a-f]{40}", entry["ref"])
    assert entry["install_mode"] in ("auto", "pip", "syspath")
    assert entry["min_axolotl_version"] == "0.19.0"
    assert entry["capabilities"] == ["callbacks", "cli_commands", "config_args", "model_patches"]
    assert (entry["subdir"], entry["last_scan"]) == (None, None)
    assert entry["checks"] and all(0 < check["timeout_seconds"] <= 1800 for check in entry["checks"])


def test_a_source_that_the_registry_does_not_take_is_refused() -> None:
    done = run(sys.executable, "-m", "tests.registry_entry", "git@github.com:someone/axolotl-moe-peft.git")
    assert done.returncode == 2 and "https://github.com/OWNER/NAME" in done.stderr


def test_every_hook_of_the_plugin_is_known_to_the_table() -> None:
    assert registry_entry.overridden_hooks() == set(registry_entry.CAPABILITIES)


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="the registry's machine has Axolotl")
@pytest.mark.parametrize("check", registry_entry.entry(SOURCE, "0" * 40)["checks"], ids=lambda check: check["name"])
def test_its_checks_pass(check: dict[str, str]) -> None:
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", check["run"]], cwd=registry_entry.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
