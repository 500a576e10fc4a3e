import importlib
import importlib.util
import sys

import pytest

from axolotl_moe_peft.after_import import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported, once."""
    (tmp_path / "a_package_for_this").mkdir()
    (tmp_path / "a_package_for_this" / "__init__.py").touch()
    (tmp_path / "a_package_for_this" / "part.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield "a_package_for_this.part"
    for name in ("a_package_for_this", "a_package_for_this.part"):
        sys.modules.pop(name, None)


def test_every_call_comes_once_whoever_asked_how_often_and_after_the_module_is_there(module):
    calls = []

    def first():
        calls.append(("first", sys.modules[module].value))

    def second():
        calls.append(("second", sys.modules[module].value))

    finders = len(sys.meta_path)
    for call in (first, second, first, first):
        after_import(module, call)
    assert len(sys.meta_path) == finders + 2
    assert importlib.util.find_spec(module).name == module  # only asked for
    assert calls == []
    importlib.import_module(module)
    assert sorted(calls) == [("first", 1), ("second", 1)] and len(sys.meta_path) == finders
    after_import(module, first)
    assert len(calls) == 3


def test_a_module_that_is_not_there_is_not_found_as_ever(module):
    after_import("a_package_for_this.missing", lambda: pytest.fail("called"))
    assert importlib.util.find_spec("a_package_for_this.missing") is None
    with pytest.raises(ModuleNotFoundError, match=r"a_package_for_this\.missing"):
        importlib.import_module("a_package_for_this.missing")
