"""Prints this package's entry for Axolotl's community registry, registry/plugins/axolotl-moe-peft.json there.

    python -m tests.registry_entry https://github.com/OWNER/axolotl-moe-peft

The entry is of the commit that is checked out. What the package asks of a user's run is read off the code.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "axolotl_moe_peft"
# what the registry calls the hooks of a plugin; None: it has no word for them
CAPABILITIES: dict[str, str | None] = {
    "register": None,
    "get_input_args": "config_args",
    "get_adapter_capabilities": "model_patches",
    "load_datasets": None,
    "pre_model_load": "model_patches",
    "post_model_build": "model_patches",
    "load_adapter": None,
    "add_callbacks_post_trainer": "callbacks",
    "post_train": None,
    "post_train_unload": None,
}
# run in the checkout, without network, where nothing but the package is installed
CHECKS = {
    "plugin": "from axolotl_moe_peft import MoePeftPlugin; "
    "print([c.name for c in MoePeftPlugin().get_adapter_capabilities()])",
    "attach": "import torch, peft, transformers, axolotl_moe_peft as a; "
    "base = transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=32, hidden_size=16, "
    "intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)); "
    "model = peft.get_peft_model(base, a.PerftConfig(rank=4, task_type='CAUSAL_LM')); "
    "ids = torch.arange(8)[None]; loss = model(input_ids=ids, labels=ids).loss; loss.backward(); print(loss.item())",
}


def overridden_hooks() -> set[str]:
    """The public methods of the package's subclasses of BasePlugin, without running any of it."""
    return {
        method.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("BasePlugin") for base in node.bases)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
    }


def capabilities() -> list[str]:
    """What the plugin does to a run, in the registry's words: its hooks, and its sub-commands (pyproject.toml)."""
    found = {CAPABILITIES[hook] for hook in overridden_hooks()} - {None}
    if "axolotl.cli_commands" in project():
        found.add("cli_commands")
    return sorted(found)


def project() -> str:
    # as text: Python 3.10 has no reader of TOML
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def of_project(pattern: str) -> str:
    return re.search(pattern, project(), flags=re.MULTILINE)[1]


def entry(source: str, ref: str) -> dict[str, Any]:
    """The entry as the registry's file holds it.

    Args:
        source: https://github.com/OWNER/NAME
        ref: the commit, 40 hexadecimal digits.
    """
    return {
        "name": of_project(r'^name = "(.+)"'),
        "description": of_project(r'^description = "(.+)"'),
        "source": source,
        "ref": ref,
        "subdir": None,
        "cls": ["axolotl_moe_peft.MoePeftPlugin"],
        "capabilities": capabilities(),
        "install_mode": "pip",
        "min_axolotl_version": of_project(r'"axolotl>=([\d.]+)') + ".0",
        "maintainer": source.split("/")[3],
        "license": of_project(r'^license = "(.+)"'),
        "checks": [
            {"name": name, "run": f'python -c "{script}"', "timeout_seconds": 300} for name, script in CHECKS.items()
        ],
        "last_scan": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.registry_entry", description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="https://github.com/OWNER/NAME")
    source = parser.parse_args().source
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", source):
        parser.error(f"source: {source!r} is not https://github.com/OWNER/NAME")
    ref = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    json.dump(entry(source, ref.stdout.strip()), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
