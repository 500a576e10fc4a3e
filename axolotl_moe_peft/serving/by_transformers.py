"""transformers' own server, with the adapter as PEFT has it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers.utils.import_utils import is_serve_available

from ..perft import PerftConfig
from ..tt_lora import TTLoraConfig
from .served import Served

_BATCHING = "--continuous-batching"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# training may have given it another chat template
_TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")


def serve_by_transformers(served: Served, options: list[str]) -> None:
    """Serve an adapter by `transformers serve` with these options of its own.

    What works token by token is batched continuously. Of the other methods each prompt has a decision of its own, and
    such a batch is one packed row: their requests are answered one by one.

    Raises:
        ValueError: the server's packages are not installed, or the options do not go with the method.
    """
    by_token = isinstance(served.config, (PerftConfig, TTLoraConfig))
    if not by_token and _BATCHING in options:
        raise ValueError(
            f"{_BATCHING} puts the requests into one packed row, and this adapter decides once for each prompt. Leave "
            "the option out; its requests are answered one by one."
        )
    for option in {option.partition("=")[0] for option in options} & {"--quantization", "--compile"}:
        raise ValueError(f"{option} is not tried with adapters of this package. Leave it out.")
    if not is_serve_available():
        raise ValueError(
            "transformers' server is not all there: pip install 'transformers[serving]', or vLLM: pip install "
            "'axolotl-moe-peft[serve]'."
        )
    link_model(served)
    from transformers.cli.transformers import app

    if by_token:
        options = [*_batching(options), *options]
    # it calls a model by the path that it is given
    os.chdir(served.scratch)
    app(["serve", served.name, "--port", str(served.port), *options], prog_name="transformers")


def _batching(options: list[str]) -> list[str]:
    """Continuous batching, which without a GPU would take nine tenths of the memory that is free."""
    given = {option.partition("=")[0] for option in options}
    sized = given & {"--cb-num-blocks", "--cb-max-memory-percent"} or torch.accelerator.is_available()
    return [*([] if _BATCHING in given else [_BATCHING]), *([] if sized else ["--cb-max-memory-percent", "0.2"])]


def link_model(served: Served) -> None:
    """Make what that server takes for a model: the base's files, and the adapter's beside them."""
    folder = served.scratch / served.name
    folder.mkdir(parents=True)
    base = Path(served.base)
    if not base.is_dir():
        base = Path(snapshot_download(served.base, revision=served.config.revision))
    files = {path.name: path for path in base.iterdir() if path.is_file()}
    files |= {path.name: path for pattern in (*_ADAPTER, *_TOKENIZER) for path in served.folder.glob(pattern)}
    for name, path in files.items():
        (folder / name).symlink_to(path.resolve())
