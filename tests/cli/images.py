"""A tiny vision-language base with its processor, and rows with images, as they are on a user's disk."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PaddleOCRVLProcessor, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from tests.multimodal_models import IMAGE, tiny_multimodal_model
from tests.tiny_models import BOS, EOS, PAD

_SPECIAL = {PAD: "<pad>", EOS: "<eos>", BOS: "<bos>", 5: "<unk>", IMAGE: "<|image_pad|>"}
# by the markers of this processor's own template the host knows what to train on
_TEMPLATE = (
    "{% for m in messages %}{{ 'User: ' if m['role'] == 'user' else 'Assistant:\n' }}{% for part in m['content'] %}"
    "{{ '<|image_pad|>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '\n' if m['role'] == 'user' else '<eos>' }}{% endfor %}"
)


def save_multimodal_base(folder: Path) -> None:
    """A tiny Qwen3-VL-MoE and a processor of its kind of images, one without videos.

    Commands that load it import `pil_images.py`.
    """
    tiny_multimodal_model("qwen3_vl_moe").save_pretrained(folder)
    vocabulary = _SPECIAL | {i: chr(i) for i in (10, *range(32, 127))}
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in vocabulary.items()}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": _SPECIAL[IMAGE]},
        chat_template=_TEMPLATE,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 256}
    )
    PaddleOCRVLProcessor(image_processor=images, tokenizer=fast, chat_template=_TEMPLATE).save_pretrained(folder)


def write_image_rows(folder: Path) -> Path:
    """Rows with images of one colour, every other one of text alone."""
    lines = []
    for i, colour in enumerate(("red", "blue") * 4):
        Image.new("RGB", (16, 16), colour).save(folder / f"{colour}.png")
        question = [{"type": "image", "path": str(folder / f"{colour}.png")}] if i < 6 and i % 3 else []
        question.append({"type": "text", "text": "which colour?"})
        answer = [{"type": "text", "text": colour}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"
