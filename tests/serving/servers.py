"""`moe-serve` as a process of its own, and clients of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai

ROOT = Path(__file__).parents[2]
_START, _STOP = 240, 60  # s, on a busy machine


class Server:
    """A running server.

    Args:
        process: it.
        port: of localhost.
        scratch: its folder for temporary files.
    """

    def __init__(self, process: subprocess.Popen, port: int, scratch: Path) -> None:
        self.process, self.scratch = process, scratch
        self.client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=120)

    def models(self) -> list[str]:
        return [model.id for model in self.client.models.list()]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(_STOP)

    def completions(self, model: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """The greedy tokens for these prompts, all asked for at once."""

        def complete(prompt: list[int]) -> list[int]:
            extra = {"ignore_eos": True, "return_token_ids": True}
            answer = self.client.completions.create(
                model=model, prompt=prompt, max_tokens=new_tokens, temperature=0, extra_body=extra
            )
            return answer.choices[0].token_ids

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(complete, prompts))


@contextmanager
def serving(adapter: Path, *options: str, work: Path) -> Iterator[Server]:
    """`python -m axolotl_moe_peft.serving ADAPTER OPTIONS`, from when it answers.

    Args:
        adapter: a folder.
        options: of the command.
        work: for its log.
    """
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = unused.getsockname()[1]
    scratch = Path(tempfile.mkdtemp())  # a short name: sockets go there
    paths = os.pathsep.join([str(ROOT), str(ROOT / "axolotl_moe_peft" / "commands")])
    environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(scratch), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-m", "axolotl_moe_peft.serving", str(adapter), "--port", str(port), *options]
    log = work / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=work)
    try:
        _wait_until_up(process, port, log)
        yield Server(process, port, scratch)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(_STOP)
        shutil.rmtree(scratch)


def _wait_until_up(process: subprocess.Popen, port: int, log: Path) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            if httpx.get(f"http://localhost:{port}/health").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-6000:])
