"""Calls a function once a module has been imported, by whomever. Stands alone: startup/sitecustomize.py reads it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, call: Callable[[], None]) -> None:
    """Call a function once after the import of the module of this name; at once if it is imported already."""
    if name in sys.modules:
        call()
    elif not any(isinstance(finder, _Finder) and finder.is_for(name, call) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, call))


class _Finder(MetaPathFinder):
    """Finds what the finders behind it find, and adds the call to how it is executed."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self._name, self._call = name, call

    def is_for(self, name: str, call: Callable[[], None]) -> bool:
        return (self._name, self._call) == (name, call)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]  # those before may be of this kind, and ask this one
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:  # who only asks whether it is there gets a spec as well
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._call()

            spec.loader.exec_module = execute_and_call
        return spec
