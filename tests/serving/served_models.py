"""Tiny models of the sizes that vLLM's kernels for CPUs take, adapters beside them, requests, and PEFT's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.moe_families import tiny_family_model
from tests.tiny_adapters import randomised
from tests.tiny_models import BOS, EOS, PAD, VOCAB_SIZE, tiny_model

SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 64}
NEW_TOKENS, LONGEST = 8, 90
# what every test's engine has: prompts come in chunks, and their beginnings from earlier ones
ENGINE = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "disable_log_stats": True,
}


def prompts(count: int = 32, seed: int = 3) -> list[list[int]]:
    """Token ids of prompts of 1 to LONGEST tokens, every other one with a beginning that they share."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    shared = draw(LONGEST // 2)
    lengths = torch.randint(1, LONGEST + 1, (count,), generator=generator).tolist()
    return [(shared + draw(length))[:length] if i % 2 else draw(length) for i, length in enumerate(lengths)]


def save_base(family: str, folder: Path, **sizes: Any) -> PreTrainedModel:
    """A tiny model, saved and loaded, with weights that are large enough for greedy tokens that differ.

    Args:
        family: of MoE models, or llama or mistral. An engine in this process makes the family's classes those of vLLM,
            so files of tests, which may share a process, have families of their own.
        folder: where it is saved.
        sizes: of its configuration.
    """
    if family == "llama":
        model = tiny_model(family, hidden_size=sizes["hidden_size"])
    elif family == "mistral":
        shared = {"hidden_size": sizes["hidden_size"], "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = MistralConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=512, **shared, **heads)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = tiny_family_model(family, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_adapter(base: PreTrainedModel, config: PeftConfig, folder: Path, seed: int = 1) -> PeftModel:
    """The base with an adapter whose parameters all act, saved."""
    model = randomised(get_peft_model(base, config).eval(), seed)
    model.save_pretrained(folder)
    return model


def generated(model: torch.nn.Module, of: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """The greedy tokens of `generate`, a prompt at a time."""
    answers = []
    for prompt in of:
        ids = torch.tensor([prompt])
        greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens}
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy)
        answers.append(whole[0, len(prompt) :].tolist())
    return answers


def save_tokenizer(folder: Path) -> None:
    """A token for each printable character, and one for every other id, with a chat template."""
    special = {PAD: "<pad>", EOS: "<eos>", BOS: "<bos>", 3: "<|user|>", 4: "<|assistant|>", 5: "<unk>"}
    vocabulary = {i: chr(i) if 32 <= i < 127 else chr(0x100 + i) for i in range(VOCAB_SIZE)} | special
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in vocabulary.items()}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fast.save_pretrained(folder)
