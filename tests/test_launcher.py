"""`python -m axolotl_moe_peft run ...`: other programs with the methods registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from axolotl_moe_peft.launcher import main, register_in_children, run_module

ROOT = Path(__file__).parents[1]


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what a launcher changes in its process."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_module_runs_as_with_python_m_and_its_children_know_the_methods_too(tmp_path):
    """Its arguments, exit code, `__main__`, multiprocessing and sitecustomize; what has no PEFT pays nothing."""
    for folder in ("package", "theirs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "theirs" / "sitecustomize.py").write_text("import sys; sys.theirs = True")
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "program.py").write_text("""
import importlib.util, multiprocessing, subprocess, sys

def known():
    assert sys.theirs
    assert importlib.util.find_spec("peft").name == "peft"  # whether it is there, as transformers asks
    import peft
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == "<run_path>"]
    return "PERFT" in peft.PeftType.__members__

if __name__ == "__main__":
    assert known() and sys.modules["__main__"].known is known
    print(sys.argv[1:], __spec__.name, __file__ == sys.argv[0])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(known)
    subprocess.run([sys.executable, "-c", "import sys; sys.exit('torch' in sys.modules)"], check=True)
    sys.exit(7)
""")
    done = subprocess.run(
        [sys.executable, "-m", "axolotl_moe_peft", "run", "-m", "package.program", "--help", "-m", "x"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "theirs"), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == "['--help', '-m', 'x'] package.program True\n"
    assert "Traceback" not in done.stderr and "sitecustomize" not in done.stderr


def test_children_are_told_once(process):
    for _ in range(2):
        register_in_children()
    first, *others = os.environ["PYTHONPATH"].split(os.pathsep)
    assert Path(first, "sitecustomize.py").is_file() and others == [str(ROOT)]


def test_an_installed_command_runs_by_its_name(process, capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", "tqdm", "--help"])
    assert not end.value.code
    assert "usage" in capsys.readouterr().out.lower()
    assert sys.argv == ["tqdm", "--help"] and os.environ["PYTHONPATH"] != str(ROOT)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "run NAME [ARGUMENT ...]"),
        (["run", "-h"], 0, "run -m MODULE [ARGUMENT ...]"),
        ([], 2, "usage: python -m axolotl_moe_peft run"),
        (["run", "--model", "hf"], 2, "usage: python -m axolotl_moe_peft run"),
        (["run", "-m", "no_such_module"], 1, "there is no module 'no_such_module' to run in this environment"),
        (["run", "-m", "json.no_such.module"], 1, "there is no module 'json.no_such.module'"),
        (["run", "-m", "importlib"], 1, "there is no module 'importlib' to run"),
        (["run", "no-such-command"], 1, "has a command 'no-such-command'. To run a module write `run -m no-such"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(arguments, code, said, process, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
        sys.exit(0)
    printed = capsys.readouterr()
    assert said in f"{end.value.code}{printed.out}{printed.err}"
    assert (1 if isinstance(end.value.code, str) else end.value.code) == code


def test_a_package_that_lacks_something_itself_says_so(tmp_path, process, monkeypatch):
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "__init__.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        run_module("lacking.program", [])
