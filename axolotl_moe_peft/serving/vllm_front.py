"""Routers before vLLM's engine: of what a whole prompt decides, the engine sees the result.

A request's way: HTTP -> vLLM's server, which makes tokens of it -> the router -> the engine. Chunks and cached
prefixes come after the router, which so sees every prompt whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import torch
from vllm.engine.protocol import EngineClient
from vllm.inputs.engine import EngineInput, embeds_input
from vllm.lora.request import LoRARequest

from .prompt_routers import ExpertRouter, PromptMixer

Routed = tuple[EngineInput, LoRARequest | None]
Route = Callable[[EngineInput, LoRARequest | None], Routed]


class SoftPrompts:
    """pt_moe: puts the prompt that is mixed for a request before its tokens."""

    def __init__(self, adapter: str, engine: EngineClient) -> None:
        config = engine.model_config
        self._mixer = PromptMixer(adapter, config.model, config.dtype)

    def __call__(self, prompt: EngineInput, lora_request: LoRARequest | None) -> Routed:
        ids = token_ids(prompt)
        prompt_TD = self._mixer.mix(ids)
        count = len(prompt_TD)
        return embeds_input(
            torch.cat([prompt_TD, prompt_TD.new_zeros(len(ids), prompt_TD.shape[1])]),
            prompt=prompt.get("prompt"),
            cache_salt=prompt.get("cache_salt"),
            # penalties count a prompt's tokens: this one is among them anyway
            prompt_token_ids=[ids[0]] * count + ids,
            is_token_ids=[False] * count + [True] * len(ids),
        ), lora_request


class ExpertOfThePrompt:
    """tt_lora_moe: hands a request for the pool on to the expert that the router chooses.

    Args:
        adapter: folder or hub id of the pool.
        name: of the pool as a model.
        engine: which is told of the experts as LoRAs called NAME/EXPERT.
    """

    def __init__(self, adapter: str, name: str, engine: EngineClient) -> None:
        config = engine.model_config
        self._router, self._name = ExpertRouter(adapter, config.model, config.dtype), name
        self._experts: dict[str, LoRARequest] = {}
        add_lora = engine.add_lora

        async def add_and_note(lora_request: LoRARequest) -> bool:
            self._experts[lora_request.lora_name] = lora_request
            return await add_lora(lora_request)

        engine.add_lora = add_and_note

    def __call__(self, prompt: EngineInput, lora_request: LoRARequest | None) -> Routed:
        if lora_request is not None and lora_request.lora_name == self._name:
            lora_request = self._experts[f"{self._name}/{self._router.choose(token_ids(prompt))}"]
        return prompt, lora_request


def token_ids(prompt: Any) -> list[int]:
    """The tokens of a request.

    Raises:
        ValueError: it has something else, such as embeddings or images.
    """
    if not isinstance(prompt, dict) or prompt.get("type") != "token" or not prompt["prompt_token_ids"]:
        raise ValueError(
            "this adapter's router reads the tokens of a prompt: send text or token ids, and at least one."
        )
    return list(prompt["prompt_token_ids"])


def put_before(engine: EngineClient, route: Route) -> None:
    """Let every request to an engine go through a router."""
    add_request = engine.add_request

    async def add_routed(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        # in a thread: the server goes on with other requests
        prompt, lora_request = await asyncio.to_thread(route, prompt, kwargs.pop("lora_request", None))
        return await add_request(request_id, prompt, params, *args, lora_request=lora_request, **kwargs)

    engine.add_request = add_routed
