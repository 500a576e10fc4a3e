"""The table of Axolotl's keys that do not go with an adapter: every row of it refuses, with every adapter it names."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault

import axolotl_moe_peft
from axolotl_moe_peft.host.host_keys import HOST_KEYS, HostKey, check_host_keys
from axolotl_moe_peft.host.saved import own_fields
from axolotl_moe_peft.registration import METHODS, config_class
from tests import limits

Load = Callable[..., DictDefault]
# the smallest block of every method
BLOCKS: dict[str, dict[str, Any]] = {
    "perft": {},
    "tt_lora": {},
    "tt_lora_moe": {"experts": [{"name": "a", "path": "./a"}]},
    "pt_moe": {},
}
# a value that is refused, where it is not simply true
VALUES: dict[str, Any] = {
    "rl": "dpo",
    "optimizer": "muon",
    "context_parallel_size": 2,
    "sequence_parallel_degree": 2,
    "tensor_parallel_size": 2,
    "expert_parallel_size": 2,
    "plugins": ["axolotl.integrations.diffusion.DiffusionPlugin"],
}


def refused_value(key: HostKey) -> Any:
    if key.name == "optimizer":
        return next(name for name in ("muon", "galore_adamw", "lomo") if key.values(name))
    return VALUES.get(key.name, True)


def keys_beside(key: HostKey) -> dict[str, Any]:
    name, _, value = key.beside[0].partition(": ") if key.beside else ("", "", "")
    block, _, part = name.partition(".")
    return ({block: {part: True}} if part else {name: value or True}) if name else {}


def cells() -> Iterator[Any]:
    """Every row of the table with every adapter that it concerns, and its cell of the matrix."""
    for key in HOST_KEYS:
        if not key.losses:
            for adapter in limits.adapters(key):
                cell = f"refused: {key.reason_for(adapter) or 'the block has keys of its own'}"
                row = f"key: {limits.key_with_values(key).replace('`', '')}"
                mark = pytest.mark.matrix(row, adapter, cell=cell)
                yield pytest.param(
                    key, adapter, marks=mark, id=f"{key.name} {key.shown} {'+'.join(key.beside)} {adapter}"
                )


@pytest.mark.parametrize(("key", "adapter"), cells())
def test_every_row_refuses_by_name_and_says_what_to_write(key: HostKey, adapter: str) -> None:
    data = {"adapter": adapter, key.name: refused_value(key)} | keys_beside(key)
    with pytest.raises(ValueError) as caught:
        check_host_keys(data, own_fields(config_class(adapter)))
    message = str(caught.value)
    assert f"`{key.name}" in message and f"`adapter: {adapter}`" in message
    assert not key.own or "write `" in message or message.endswith("remove it.")
    assert key.own or key.instead in message or message.endswith("remove it.")


@pytest.mark.parametrize("adapter", METHODS)
def test_a_plain_yaml_has_none_of_them(adapter: str) -> None:
    data = {"adapter": adapter, "optimizer": "adamw_torch", "context_parallel_size": 1, "lora_model_dir": "./a"}
    check_host_keys(data, own_fields(config_class(adapter)))
    check_host_keys(data | {"rl": "grpo"} if adapter in ("perft", "tt_lora") else data, {})


@pytest.mark.parametrize(("name", "value"), [("unfrozen_parameters", ["lm_head"]), ("tensor_parallel_size", 2)])
@pytest.mark.parametrize("adapter", ["perft", "tt_lora", "pt_moe"])
def test_axolotl_asks_the_table_before_anything_else(name: str, value: Any, adapter: str, load: Load) -> None:
    with pytest.raises(
        ValueError, match=rf"1 validation error(.|\n)*`{name}.* does not work with `adapter: {adapter}`"
    ):
        load(**{"perft": None, "adapter": adapter, adapter: BLOCKS[adapter], name: value})


def test_the_pages_table_is_that_of_the_package() -> None:
    assert limits.page_table() == limits.table(), "write it anew: python -m tests.limits"


def test_methods_and_what_they_share_do_not_know_the_host() -> None:
    package = Path(axolotl_moe_peft.__file__).parent
    for folder in (*METHODS, "shared"):
        for path in (package / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                parts = {part for module in modules for part in module.split(".")}
                assert not parts & {"axolotl", "host", "pydantic", "click"}, path
                if folder == "shared":
                    assert not parts & set(METHODS), path
