"""The routers that read a whole prompt, apart from the model that they were trained beside.

Shape suffixes: T virtual tokens, D width of the embeddings.
"""

from __future__ import annotations

import json

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.utils import load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..pt_moe import PTMoeConfig
from ..pt_moe.layer import PTMoeLayer
from ..shared.auxiliary import AuxiliaryLosses
from ..shared.batches import find_sequences
from ..shared.decoder import decoder_of
from ..tt_lora_moe import TTLoraMoeConfig
from ..tt_lora_moe.router import PromptRouter

_ADAPTER = "default"


class ExpertRouter:
    """Chooses the expert of a saved pool (tt_lora_moe) for a prompt.

    Args:
        adapter: folder or hub id of the pool.
        base: folder or hub id of its base model. For the router `base_hidden` all of it is loaded, on the CPU.
        dtype: of the base model.

    Raises:
        ValueError: the base's embeddings cannot be found.
    """

    def __init__(self, adapter: str, base: str, dtype: torch.dtype) -> None:
        config: TTLoraMoeConfig = PeftConfig.from_pretrained(adapter)
        self.expert_names = config.expert_names
        if config.router == "base_hidden":
            model = AutoModelForCausalLM.from_pretrained(base, revision=config.revision, dtype=dtype).eval()
            self._embedding, self._decoder = model.get_input_embeddings(), decoder_of(model)
        else:
            self._embedding, self._decoder = input_embeddings(base, config.revision, dtype), None
        self._router = PromptRouter(self._embedding.weight.shape[1])
        self._router.update_layer(_ADAPTER, config, torch.device("cpu"))
        _load(self._router, adapter)

    @torch.no_grad()
    def choose(self, prompt_ids: list[int]) -> str:
        """The name of the expert for a prompt's tokens."""
        input_ids = torch.tensor([prompt_ids])
        if self._decoder is not None:
            features_1D = self._decoder(input_ids=input_ids, use_cache=False).last_hidden_state[:, -1]
        else:
            features_1D = find_sequences({"input_ids": input_ids}).prompt_mean(self._embedding(input_ids))
        return self.expert_names[int(self._router(features_1D, _ADAPTER).argmax(-1))]


class PromptMixer:
    """Mixes the soft prompt of a saved pt_moe adapter for a prompt.

    Args:
        adapter: folder or hub id of the adapter.
        base: folder or hub id of its base model.
        dtype: of the base model.

    Raises:
        ValueError: the base's embeddings cannot be found.
    """

    def __init__(self, adapter: str, base: str, dtype: torch.dtype) -> None:
        config: PTMoeConfig = PeftConfig.from_pretrained(adapter)
        self._embedding = input_embeddings(base, config.revision, dtype)
        self._layer = PTMoeLayer(AuxiliaryLosses(self._embedding))
        self._layer.update_layer(_ADAPTER, config, self._embedding.weight.shape[1], torch.device("cpu"))
        _load(self._layer, adapter)

    @torch.no_grad()
    def mix(self, prompt_ids: list[int]) -> Tensor:
        """The soft prompt (T, D) for a prompt's tokens, in the dtype of the base model."""
        input_ids = torch.tensor([prompt_ids])
        sequences = find_sequences({"input_ids": input_ids})
        return self._layer.prompts(_ADAPTER, sequences, self._embedding(input_ids), learns=False)[0]


def _load(layer: nn.Module, adapter: str) -> None:
    """Load a layer's parameters from a saved adapter, which has them under the name of the layer."""
    parameters = {name.removesuffix(f".{_ADAPTER}"): p for name, p in layer.named_parameters()}
    tensors = {key.rpartition(".")[2]: tensor for key, tensor in load_peft_weights(adapter, device="cpu").items()}
    if missing := parameters.keys() - tensors.keys():
        raise ValueError(f"adapter tensors missing in {adapter!r}: {', '.join(sorted(missing))}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    layer.requires_grad_(False).eval()


def input_embeddings(base: str, revision: str | None, dtype: torch.dtype) -> nn.Module:
    """The module that makes embeddings of a model's token ids; nothing else of its weights is read.

    Args:
        base, revision: folder or hub id of the model.
        dtype: that the model is run in.

    Raises:
        ValueError: they are not in its safetensors files under their usual name.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, revision=revision))
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    full = f"{name}.weight"
    weight = _read_tensor(base, revision, full, full.removeprefix(f"{model.base_model_prefix}."))
    if weight.shape != embedding.weight.shape:
        raise ValueError(f"{base!r}: {full} is {tuple(weight.shape)}, not {tuple(embedding.weight.shape)}.")
    embedding.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return embedding.eval()


def _read_tensor(base: str, revision: str | None, *names: str) -> Tensor:
    def find(file: str) -> str | None:
        return cached_file(base, file, revision=revision, _raise_exceptions_for_missing_entries=False)

    files = {}
    if index := find(SAFE_WEIGHTS_INDEX_NAME):
        with open(index, encoding="utf-8") as opened:
            files = json.load(opened)["weight_map"]
    for name in names:
        path = find(files.get(name, SAFE_WEIGHTS_NAME))
        if path is None:
            continue
        with safe_open(path, framework="pt") as tensors:
            if name in tensors.keys():
                return tensors.get_tensor(name)
    raise ValueError(
        f"{base!r} has no {' or '.join(names)} in its safetensors files, of which the router reads its embeddings. "
        "Save the base model with `save_pretrained`, or use --engine transformers."
    )
