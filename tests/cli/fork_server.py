"""Runs commands of Axolotl in processes of their own, without the 10 s of imports that the command itself takes.

    python -m tests.cli.fork_server FD [MODULE ...] < REQUESTS

imports MODULEs and what `axolotl train`, `evaluate` and `merge-lora` import before they load a plugin, and forks for
each process of a command. A request is a line of JSON: the command's arguments, a file for its standard input, one for
what it prints, what torchrun would put into the environment of each of its processes, and how many seconds it may
take. A process that fails, and the end of the time, end the others. A byte with the exit code goes to the file
descriptor FD.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path

TIMED_OUT = 124  # as `timeout` ends
_IMPORTS = (
    "axolotl.cli.main",
    "axolotl.cli.config",
    "axolotl.cli.evaluate",
    "axolotl.cli.merge_lora",
    "axolotl.cli.train",
    "axolotl.common.datasets",
    "axolotl.core.builders",
    "axolotl.train",
)


def main() -> None:
    exit_codes = int(sys.argv[1])
    for module in (*sys.argv[2:], *_IMPORTS):
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        os.write(exit_codes, bytes([_run(*json.loads(line))]))


def _run(arguments: list[str], stdin: str, log: str, environments: list[dict[str, str]], seconds: int) -> int:
    """The exit code of the first process of the command that failed, or 0."""
    children: set[int] = set()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        for child in children:
            os.kill(child, signal.SIGKILL)

    Path(log).write_bytes(b"")
    signal.signal(signal.SIGALRM, lambda *_: end(TIMED_OUT))
    for environment in environments:
        child = os.fork()
        if child == 0:
            _become_command(arguments, stdin, log, environment)
        children.add(child)
    signal.alarm(seconds)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            end(os.waitstatus_to_exitcode(status) % 256)
    signal.alarm(0)
    return codes[0] if codes else 0


def _become_command(arguments: list[str], stdin: str, log: str, environment: dict[str, str]) -> None:
    import torch
    from axolotl.cli.main import main as axolotl

    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    if environment:
        torch.set_num_threads(1)  # as torchrun
    sys.argv = ["axolotl", *arguments]
    sys.exit(axolotl())


if __name__ == "__main__":
    main()
