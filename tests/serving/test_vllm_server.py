"""`moe-serve` with vLLM's server: a client gets the tokens of PEFT's `generate`, of every method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from peft import PeftModel
from transformers import AutoTokenizer

from axolotl_moe_peft import PerftConfig
from tests.serving.served_models import (
    NEW_TOKENS,
    SIZES,
    generated,
    prompts,
    save_adapter,
    save_base,
    save_tokenizer,
)
from tests.serving.servers import Server, serving

pytestmark = pytest.mark.serve

OPTIONS = [
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "32"),
    *("--max-num-seqs", "32", "--max-num-batched-tokens", "64", "--enable-prefix-caching"),
]


@pytest.fixture(scope="module")
def perft(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    folder = tmp_path_factory.mktemp("perft")
    base = save_base("flex_olmo", folder / "base", **SIZES)
    save_tokenizer(folder / "base")
    config = PerftConfig(num_experts=6, rank=4, task_type="CAUSAL_LM")
    return save_adapter(base, config, folder / "my-adapter")


def folder_of(model: PeftModel) -> Path:
    return Path(model.get_base_model().name_or_path).parent / "my-adapter"


@pytest.fixture(scope="module")
def perft_server(perft: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(folder_of(perft), *OPTIONS, work=tmp_path_factory.mktemp("perft-server")) as server:
        yield server


def chat_answer(model: PeftModel, messages: list[dict[str, str]]) -> str:
    base = model.get_base_model().name_or_path
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return tokenizer.decode(generated(model, [ids])[0], skip_special_tokens=True)


def test_parallel_requests_get_the_tokens_of_generate(perft: PeftModel, perft_server: Server) -> None:
    assert perft_server.models() == ["my-adapter"]
    assert perft_server.completions("my-adapter", prompts(), NEW_TOKENS) == generated(perft, prompts())


def test_a_chat_of_two_turns_streamed_and_not(perft: PeftModel, perft_server: Server) -> None:
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    asked = {"model": "my-adapter", "max_tokens": NEW_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    chat = perft_server.client.chat.completions
    for question in ("And twice that?", None):
        answer = chat.create(messages=messages, **asked).choices[0].message.content
        assert answer == chat_answer(perft, messages)
        parts = [part.choices[0].delta.content or "" for part in chat.create(messages=messages, stream=True, **asked)]
        assert len(parts) > 2 and "".join(parts) == answer
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]


def test_requests_that_cannot_be_answered_are_errors_of_the_client(perft_server: Server) -> None:
    client = perft_server.client
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="another", prompt="a")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="my-adapter", prompt="a", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="maximum"):
        client.completions.create(model="my-adapter", prompt=[7] * 300)
    assert perft_server.completions("my-adapter", [[7]], 1)


def test_stopped_in_the_middle_of_an_answer_it_ends_and_leaves_nothing_behind(perft_server: Server) -> None:
    """Last, as there is no server afterwards."""
    endless = {"max_tokens": 200, "temperature": 0, "extra_body": {"ignore_eos": True}}
    stream = perft_server.client.completions.create(model="my-adapter", prompt=[7], stream=True, **endless)
    assert next(iter(stream))
    perft_server.stop()
    with pytest.raises((openai.APIError, openai.APIConnectionError, AssertionError)):
        parts = list(stream)
        assert len(parts) == 200
    assert not list(perft_server.scratch.glob("moe-serve-*"))


def test_two_processes_that_share_the_base_model(perft: PeftModel, tmp_path: Path) -> None:
    with serving(folder_of(perft), *OPTIONS, "--tensor-parallel-size", "2", work=tmp_path) as server:
        few = prompts()[:4]
        assert server.completions("my-adapter", few, NEW_TOKENS) == generated(perft, few)
