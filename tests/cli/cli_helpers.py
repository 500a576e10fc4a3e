"""What a user has on disk (a base model with its tokenizer, rows, a YAML), and Axolotl's command line run on it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import load_from_disk
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.cli.fork_server import TIMED_OUT
from tests.tiny_models import BOS, EOS, PAD, VOCAB_SIZE, tiny_model

_TIMEOUT = 600  # s, for one command
# exact comparisons need the CPU, also where there is a GPU
_CPU_ONLY = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
CPU_PROCESSES = {"ACCELERATE_USE_CPU": "true"}  # of several, see cpu_processes.py
ROOT = Path(__file__).parents[2]
_PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass
class Result:
    """What a command left: its exit code and all it wrote to stdout and stderr."""

    code: int
    output: str

    @property
    def tracebacks(self) -> int:
        """How many the user has to read."""
        return self.output.count("Traceback (most recent call last)")

    @property
    def error(self) -> str:
        """What the first traceback ends with: the exception and its message."""
        frames, message = "Traceback (most recent call last):", r"^\S.*?(?=^nanobind: |^\[20\d\d-|\Z)"
        found = re.search(message, self.output.partition(frames)[2], re.MULTILINE | re.DOTALL)
        return found[0] if found else ""


def run_command(*command: str, **environment: str) -> Result:
    """Run a command as a user would, with `environment` added to that of the tests."""
    done = subprocess.run(
        command,
        env=_CPU_ONLY | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT,
    )
    return Result(done.returncode, done.stdout)


def run_on_gpu(command: str, config: Path | str, *options: str) -> Result:
    """Run `axolotl ...` on the first GPU, with all its imports: a process that was forked cannot use CUDA."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    axolotl = (sys.executable, "-m", "axolotl.cli.main", command, "--launcher", "python")
    return run_command(*axolotl, str(config), *options, CUDA_VISIBLE_DEVICES=devices[0], PYTHONPATH=_PYTHONPATH)


class AxolotlPool:
    """Runs `axolotl ...` in new processes each time, without paying for the imports each time.

    Args:
        folder: for its files.
        modules: imported, too, where every command of the pool needs them.
        environment: variables of the commands.
    """

    def __init__(self, folder: Path, *modules: str, **environment: str) -> None:
        self._stdin, self._log, self._errors = folder / "stdin", folder / "log", folder / "errors"
        self._exit_codes, write_end = os.pipe()
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cli.fork_server", str(write_end), *modules],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[write_end],
                # compiling the packing algorithm takes longer than running it
                env=_CPU_ONLY | {"NUMBA_DISABLE_JIT": "1"} | environment,
                text=True,
            )
        os.close(write_end)

    def __call__(
        self,
        command: str,
        config: Path | str,
        *options: str,
        stdin: str = "",
        processes: int | None = None,
        timeout: int = _TIMEOUT,
        **environment: str,
    ) -> Result:
        """Run a command, `processes` times at once as torchrun would; None is without torchrun.

        `environment` is added to that of each process.
        """
        launcher = ["--launcher", "python"] if command in ("train", "evaluate", "inference") else []
        arguments = [command, *launcher, str(config), *options]
        environments = [{}] if processes is None else _torchrun_environments(processes)
        environments = [variables | environment for variables in environments]
        self._stdin.write_text(stdin)
        request = [arguments, str(self._stdin), str(self._log), environments, timeout]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = os.read(self._exit_codes, 1)
        if not answer:
            raise RuntimeError(f"the pool has ended:\n{self._errors.read_text()}")
        code = answer[0]
        if code == TIMED_OUT:
            raise TimeoutError(f"axolotl {command} takes more than {timeout} s:\n{self._log.read_text()}")
        return Result(code, self._log.read_text())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        os.close(self._exit_codes)


def _torchrun_environments(processes: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        CPU_PROCESSES
        | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(processes)
    ]


def save_base_model(folder: Path, family: str) -> Path:
    """A tiny random model of the family and a tokenizer with one token per character."""
    tiny_model(family).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    special = {PAD: "<pad>", EOS: "<eos>", BOS: "<bos>", 3: "<|user|>", 4: "<|assistant|>", 5: "<unk>"}
    vocabulary = special | {i: chr(i) for i in range(32, 127)}
    assert max(vocabulary) < VOCAB_SIZE
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in vocabulary.items()}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fast.save_pretrained(folder)


def fill_vocabulary(folder: Path) -> None:
    """Give a saved tokenizer as many tokens as its model has embeddings; lm_eval makes it so beside an adapter."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"<{i}>": i for i in range(VOCAB_SIZE) if i not in vocabulary.values()})
    path.write_text(json.dumps(tokenizer))


def write_rows(path: Path, pairs: Iterable[tuple[str, str]]) -> Path:
    """A chat dataset of (question, answer)."""
    with path.open("w") as file:
        for question, answer in pairs:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_yaml(path: Path, base_model: Path, rows: Path, **keys: Any) -> Path:
    """A YAML with the plugin, this base model and dataset, small and quick settings, and `keys` (None removes one)."""
    settings = {
        "base_model": str(base_model),
        "plugins": ["axolotl_moe_peft.MoePeftPlugin"],
        "datasets": [{"path": str(rows), "type": "chat_template"}],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(rows.with_suffix(".prepared")),
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "val_set_size": 0,
        "sequence_len": 128,
        "output_dir": str(path.with_suffix("")),
        "adapter": "perft",
        "perft": {"rank": 4},
        "attn_implementation": "sdpa",
        "bf16": False,
        "seed": 42,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "optimizer": "adamw_torch",
        "learning_rate": 0.05,
        "lr_scheduler": "constant",
        "logging_steps": 1,
    } | keys
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return path


def tokenised(rows: Path) -> Iterable[dict[str, Any]]:
    """The rows as a command has prepared them."""
    # one folder for each tokeniser's path and for packing, all with the same rows
    return load_from_disk(str(next(filter(Path.is_dir, rows.with_suffix(".prepared").iterdir()))))


def log_history(output_dir: Path) -> list[dict[str, float]]:
    """The host's log line of every training step, as the last checkpoint holds it."""
    checkpoint = max(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if "loss" in line]


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The saved adapter's tensors by name."""
    return load_file(folder / "adapter_model.safetensors")


def checksums(folder: Path) -> dict[str, str]:
    """Of every file but debug.log, which the host starts anew with each command."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "debug.log"
    }


def lines_to_worry_about(output: str) -> list[str]:
    """Warnings and errors that name us."""
    return [
        line
        for line in output.splitlines()
        if re.search(r"warn|error", line, re.I) and re.search("perft|tt_lora|axolotl_moe_peft", line)
    ]
