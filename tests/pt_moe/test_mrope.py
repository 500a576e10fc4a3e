"""A prompt before rows with images, whose positions are of several kinds: as text in front, of which the base knows.

The reference is the bare model with the prompt's vectors as embeddings of tokens of their own, put before the text:
what it makes of their positions, and of those behind them, is its own.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from tests.multimodal_models import IMAGE, MROPE, MULTIMODAL, VISION, tiny_multimodal_model
from tests.pt_moe.prompts import T, adapter_tensors, pt_moe, reference_prompt
from tests.tiny_models import PAD, random_ids

TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    **MROPE,
}
GLM_VISION = VISION | {"out_hidden_size": 32, "hidden_size": 32, "image_size": 16}
# beside those of multimodal_models: the configuration of text, of the vision tower, and what they need
DENSE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (TEXT, {**VISION, "window_size": 8, "fullatt_block_indexes": [0]}, {}),
    "glm4v_moe": (
        TEXT
        | {
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "head_dim": 16,  # of which it turns half
        },
        GLM_VISION,
        {"image_start_token_id": 8, "image_end_token_id": 9},
    ),
}
IDS = {"image_token_id": IMAGE, "video_token_id": 7, "vision_start_token_id": 8, "vision_end_token_id": 9}
FAMILIES = (*sorted({"qwen3_vl_moe", "qwen3_5_moe", "ernie4_5_vl_moe"} & set(MULTIMODAL)), *DENSE)
CLOSE = {"rtol": 2e-3, "atol": 2e-4}
FREE = 100  # the first of the tokens that are no text here
GREEDY = {
    "max_new_tokens": 4,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "suppress_tokens": [IMAGE, *range(FREE, FREE + T)],
}
IMAGE_AT = 3
OF_IMAGES = ("pixel_values", "image_grid_thw")
every_family = pytest.mark.parametrize("family", FAMILIES)


def base_of(family: str) -> PreTrainedModel:
    if family in MULTIMODAL:
        return tiny_multimodal_model(family)
    text, vision, more = DENSE[family]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](text_config=text, vision_config=vision, **IDS, **more)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_(std=0.2)
    return model.eval()


def text(length: int, seed: int) -> Tensor:
    return random_ids(1, length, seed)[0].clamp(min=12, max=FREE - 1)


def with_image(length: int, seed: int) -> Tensor:
    """Text with an image of 2 x 2 tokens in it, which count as two positions."""
    ids = text(length, seed)
    ids[IMAGE_AT - 1], ids[IMAGE_AT : IMAGE_AT + 4], ids[IMAGE_AT + 4] = 8, IMAGE, 9
    return ids


def batch_of(model: PreTrainedModel, rows: list[Tensor], side: str = "right") -> dict[str, Tensor]:
    width = max(map(len, rows))
    pads = [(width - len(r), 0) if side == "left" else (0, width - len(r)) for r in rows]
    ids = torch.stack([F.pad(row, pad, value=PAD) for row, pad in zip(rows, pads)])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads)]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    if "ernie" in model.config.model_type:
        batch["moe_mm_token_type_ids"] = ((ids == IMAGE) | (ids == 8) | (ids == 9)).int()
    images = sum(IMAGE in row for row in rows)
    if images:
        vision = model.config.vision_config
        numbers = 3 * getattr(vision, "temporal_patch_size", 1) * 4 * 4
        if "ernie" in model.config.model_type:
            numbers = 3 * 4 * 4
        pixels = torch.randn(16, numbers, generator=torch.Generator().manual_seed(0))
        batch["pixel_values"] = pixels.repeat(images, 1)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * images)
    return batch


def with_tokens_for(bare: PreTrainedModel, prompt: Tensor) -> Tensor:
    """Ids that stand for the prompt in the bare model."""
    with torch.no_grad():
        head = bare.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())  # its own where it was shared
        bare.get_input_embeddings().weight[FREE : FREE + T] = prompt
    return torch.arange(FREE, FREE + T)


@pytest.fixture(params=FAMILIES)
def pair(request) -> tuple[PeftModel, PreTrainedModel, Tensor]:
    """A model with a prompt, the bare one, and the ids that stand for the prompt there."""
    model, bare = pt_moe(base=base_of(request.param), setting="pt"), base_of(request.param)
    return model, bare, with_tokens_for(bare, adapter_tensors(model)["experts"][0])


ROWS = [with_image(13, seed=1), text(9, seed=2), with_image(11, seed=3)]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_with_images_and_of_text_alone_are_as_with_text_in_front(pair, side):
    model, bare, prompt = pair
    found = model(**batch_of(bare, ROWS, side)).logits
    for row, logits in zip(ROWS, found, strict=True):
        expected = bare(**batch_of(bare, [torch.cat([prompt, row])])).logits[0, T:]
        torch.testing.assert_close(logits[-len(row) :] if side == "left" else logits[: len(row)], expected, **CLOSE)


def test_the_loss_of_rows_with_images_is_that_of_the_tokens_after_the_prompt(pair):
    model, bare, prompt = pair
    batch = batch_of(bare, ROWS)
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE), -100)
    labels[:, : IMAGE_AT + 5] = -100
    loss = model.train()(**batch, labels=labels).loss
    losses = []
    for row, own in zip(ROWS, labels):
        logits = bare(**batch_of(bare, [torch.cat([prompt, row])])).logits[0, T:]
        losses.append(F.cross_entropy(logits[:-1], own[1 : len(row)], reduction="none", ignore_index=-100))
    supervised = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(loss, torch.cat(losses).sum() / supervised, rtol=1e-3, atol=1e-4)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_after_images_goes_on_from_their_positions(pair, use_cache):
    model, bare, prompt = pair
    if not use_cache and "ernie" in bare.config.model_type:
        return  # generates after images with a cache only
    found = model.generate(**batch_of(bare, ROWS, "left"), **GREEDY, use_cache=use_cache)[:, -4:]
    for row, tokens in zip(ROWS, found, strict=True):
        batch = batch_of(bare, [torch.cat([prompt, row])])
        assert torch.equal(bare.generate(**batch, **GREEDY)[0, -4:], tokens)


@torch.no_grad()
def test_a_cache_knows_how_far_its_rows_positions_are(pair):
    """Its rows may be moved, and other rows be read in between."""
    model, bare, prompt = pair
    more = torch.stack([text(3, seed=7)] * 3)
    for side, order in (("left", [2, 0, 1]), ("none", [1, 0])):
        rows = ROWS if side == "left" else [ROWS[0], with_image(13, seed=5)]
        batch = batch_of(bare, rows, "left")
        cache = model(**batch, use_cache=True).past_key_values
        model(**batch_of(bare, rows[::-1], "left"))
        cache.reorder_cache(torch.tensor(order))
        call = {"input_ids": more[: len(rows)], "past_key_values": cache}
        if side == "left":
            call["attention_mask"] = F.pad(batch["attention_mask"][order], (0, 3), value=1)
        else:
            del batch["attention_mask"]
        found = model(**call).logits
        for index, logits in zip(order, found, strict=True):
            expected = bare(**batch_of(bare, [torch.cat([prompt, rows[index], more[0]])])).logits[0, -3:]
            torch.testing.assert_close(logits, expected, **CLOSE)


@torch.no_grad()
@every_family
def test_the_router_chooses_by_images_and_text(family):
    model, bare = pt_moe(base=base_of(family), setting="unscaled"), base_of(family)
    tensors, settings = adapter_tensors(model), model.peft_config["default"]
    seen: list[Tensor] = []
    inner = bare.model.language_model
    handle = inner.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"][0]), with_kwargs=True)
    for row in ROWS:
        bare(**batch_of(bare, [row]))
    handle.remove()
    found = model(**batch_of(bare, ROWS)).logits
    for row, embeds, logits in zip(ROWS, seen, found, strict=True):
        vectors, _ = reference_prompt(tensors, settings, embeds)
        prompt = with_tokens_for(bare, vectors)
        expected = bare(**batch_of(bare, [torch.cat([prompt, row])])).logits[0, T:]
        torch.testing.assert_close(logits[: len(row)], expected, **CLOSE)


@torch.no_grad()
def test_packed_rows_with_images_are_as_alone_or_refused(pair):
    """With a text's own count before the three kinds; of three alone the bare models mix the segments."""
    model, bare, prompt = pair
    alone = [batch_of(bare, [row]) for row in ROWS]
    packed = {name: torch.cat([b[name] for b in alone if name in b], int(name not in OF_IMAGES)) for name in alone[0]}
    del packed["attention_mask"]
    kinds = [positions_of(bare, b) for b in alone]
    own = [torch.arange(len(row)).view(1, 1, -1) for row in ROWS]
    three, four = torch.cat(kinds, -1), torch.cat([torch.cat(own, -1), torch.cat(kinds, -1)])
    for positions in (three, four):
        try:
            found = model(**packed, position_ids=positions, use_cache=False).logits[0]
        except ValueError as error:
            assert "keep the segments of a packed row apart" in str(error)
            mixed = bare(**packed, position_ids=positions, use_cache=False).logits[0, len(ROWS[0]) :]
            assert not torch.allclose(mixed[: len(ROWS[1])], bare(**alone[1]).logits[0], **CLOSE)
            continue
        for row, logits in zip(ROWS, found.split([len(row) for row in ROWS]), strict=True):
            expected = bare(**batch_of(bare, [torch.cat([prompt, row])])).logits[0, T:]
            torch.testing.assert_close(logits, expected, **CLOSE)


def positions_of(bare: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    if "image_grid_thw" not in batch:
        return batch["attention_mask"].cumsum(1).sub(1).expand(3, -1, -1)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return bare.model.get_rope_index(**{name: batch[name] for name in names})[0]


@torch.no_grad()
@every_family
def test_a_base_that_has_read_images_stays_as_it_was(family):
    base = base_of(family)
    base(**batch_of(base, ROWS))
    before = copy.deepcopy(base.model.rope_deltas)
    model = pt_moe(base=base, setting="pt")
    assert torch.equal(base.model.rope_deltas, before)
    with model.disable_adapter():
        assert torch.equal(model(**batch_of(base, ROWS)).logits, base_of(family)(**batch_of(base, ROWS)).logits)
