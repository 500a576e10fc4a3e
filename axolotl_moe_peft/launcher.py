"""Runs other programs with the methods of this package registered with PEFT, in their process and in its children.

Whoever loads an adapter by its folder, as PEFT, transformers and lm_eval do, finds the method by its name in
adapter_config.json, which only this package's import makes known.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

PROGRAM = f"python -m {__package__}"
USAGE = f"""\
usage: {PROGRAM} run -m MODULE [ARGUMENT ...]
       {PROGRAM} run NAME [ARGUMENT ...]

Run a module, as `python -m MODULE` does, or an installed command by its NAME, with the adapters of this package known
to PEFT, transformers and what is built on them: in that program and in the Pythons that it starts.

  {PROGRAM} run lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks gsm8k
  {PROGRAM} run accelerate launch my_script.py
  {PROGRAM} run -m my_package.my_module --my-option
"""

_STARTUP = str(Path(__file__).parent / "startup")


def main(arguments: list[str]) -> None:
    """Run what the arguments of `python -m axolotl_moe_peft` say; ends with the exit code of that."""
    match arguments:
        case ["-h" | "--help"] | ["run", "-h" | "--help"]:
            print(USAGE, end="")
        case ["run", "-m", module, *rest]:
            run_module(module, rest)
        case ["run", name, *rest] if not name.startswith("-"):
            run_command(name, rest)
        case _:
            print(USAGE, end="", file=sys.stderr)
            sys.exit(2)


def run_module(module: str, arguments: list[str]) -> None:
    """Run a module as `python -m` does.

    Raises:
        SystemExit: there is no such module, or the module's own.
    """
    if not _can_be_run(module):
        sys.exit(f"{PROGRAM} run: there is no module {module!r} to run in this environment ({sys.prefix}).")
    register_in_children()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_command(name: str, arguments: list[str]) -> None:
    """Run a command that a package of this environment has installed.

    Raises:
        SystemExit: there is no such command, or what it returns.
    """
    scripts = [*entry_points(group="console_scripts", name=name)]
    if not scripts:
        sys.exit(
            f"{PROGRAM} run: no package of this environment ({sys.prefix}) has a command {name!r}. To run a module "
            f"write `run -m {name}`."
        )
    register_in_children()
    sys.argv = [name, *arguments]
    sys.modules["__main__"].__package__ = None  # else usage texts say `python -m axolotl_moe_peft.NAME`
    sys.exit(scripts[0].load()())


def register_in_children() -> None:
    """Have each Python that this process starts from now on register the methods, once it imports PEFT."""
    inherited = os.environ.get("PYTHONPATH")
    if inherited is None:
        os.environ["PYTHONPATH"] = _STARTUP
    elif _STARTUP not in inherited.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([_STARTUP, inherited])


def _can_be_run(module: str) -> bool:
    try:
        spec = find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{module}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a package around it lacks something else
        return False
    return spec is not None
