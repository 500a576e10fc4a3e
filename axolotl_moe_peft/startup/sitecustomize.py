"""Imported by every Python that a program under `python -m axolotl_moe_peft run` starts: registers the methods there.

It does so once PEFT is imported; most of what starts a Python is not about models.
"""

import runpy
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path

_HERE = Path(__file__).parent


def _run_theirs() -> None:
    """Run the sitecustomize of the environment itself, before which this one stands."""
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if path != str(_HERE)])
    if spec is not None:
        spec.loader.exec_module(module_from_spec(spec))


def _register() -> None:
    if find_spec("axolotl_moe_peft") is not None:  # a Python of another environment has PEFT alone
        import axolotl_moe_peft  # noqa: F401


_run_theirs()
runpy.run_path(str(_HERE.parent / "after_import.py"))["after_import"]("peft", _register)
