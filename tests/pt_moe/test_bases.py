"""Bases that a prompt cannot be put into are refused before they are changed; others are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForMaskedLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.moe_families import tiny_family_model
from tests.pt_moe.prompts import adapter_tensors, config, pt_moe, reference_logits
from tests.tiny_models import random_ids

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class NotAsAWhole(OPTForCausalLM):
    """A head that calls the layers of its decoder."""

    def forward(self, input_ids=None, **kwargs):
        return self.model.decoder.layers[0](self.get_input_embeddings()(input_ids))


def opt(model_class: type = OPTForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, pad_token_id=0)).eval()


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "encoder": (lambda: BertForSequenceClassification(BertConfig(**SMALL)), "BertModel is an encoder"),
    "encoder with offset": (lambda: RobertaForMaskedLM(RobertaConfig(**SMALL)), "RobertaModel is an encoder"),
    "positions with offset": (
        lambda: RobertaForCausalLM(RobertaConfig(**SMALL, is_decoder=True)),
        "RobertaModel does not count a text's positions 0, 1, 2",
    ),
    "no whole decoder": (lambda: opt(NotAsAWhole), "does not call its OPTDecoder as a whole"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_base_that_no_prompt_fits_is_refused_and_stays_as_it_was(kind):
    make, message = REFUSED[kind]
    base = make()
    modules, modes = dict(base.named_modules()), [m.training for m in base.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config())
    assert dict(base.named_modules()) == modules
    assert [m.training for m in base.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert "generate" not in vars(base)


def test_a_decoder_inside_a_wrapper_with_narrow_embeddings_gets_the_prompt():
    """OPT-350m's embeddings are half as wide as its hidden states, and its head calls the inner decoder."""
    model, ids = pt_moe(base=opt()), random_ids(2, 7)
    tensors = adapter_tensors(model)
    assert tensors["shared"].shape == (4, 16)
    for row, logits in zip(ids, model(ids).logits, strict=True):
        torch.testing.assert_close(logits, reference_logits(opt(), tensors, config(), row), rtol=1e-4, atol=1e-5)


def test_a_model_whose_base_model_is_itself_trains():
    model, ids = pt_moe(base=tiny_family_model("llama4_text"), setting="dpt"), random_ids(2, 8)
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        logits = model(ids).logits
    loss = model.train()(input_ids=ids, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decoder_that_sees_what_follows_where_there_is_no_mask_is_refused(dtype):
    """As Doge of transformers 5.16 under sdpa, whose rows without padding then are others than with it."""

    def decoder(implementation: str) -> PreTrainedModel:
        base = tiny_family_model("qwen3_moe", attn_implementation=implementation).to(dtype)
        for layer in base.model.layers:
            layer.mlp.gate.float()  # as Axolotl leaves it
            layer.self_attn.is_causal = False
        return base

    with pytest.raises(ValueError, match="`attn_implementation: sdpa` a token of Qwen3MoeModel sees those behind it"):
        get_peft_model(decoder("sdpa"), config())
    get_peft_model(decoder("eager"), config())


@pytest.mark.parametrize("family", ["gpt_oss", "afmoe", "qwen3_next", "lfm2_moe"])
def test_packed_rows_are_refused_where_the_base_mixes_their_segments(family):
    """Their masks are made without positions, or their layers have states."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    base, ids = tiny_family_model(family), random_ids(1, 6)
    with torch.no_grad():
        packed = base(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 3:]
        alone = base(input_ids=ids[:, 3:], use_cache=False).logits
    if torch.allclose(packed, alone, atol=1e-5):
        return  # this version of transformers keeps them apart
    with pytest.raises(ValueError, match="keep the segments of a packed row apart.*Pad the rows"):
        pt_moe(base=base, setting="dpt")(input_ids=ids, position_ids=positions)


@pytest.fixture
def sdpa_without_masks() -> Iterator[Callable[[bool], None]]:
    """Let sdpa get no masks for packed rows, as Axolotl 0.21 does, and look at positions itself, or not."""
    attention, mask = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def register(looks: bool) -> None:
        def forward(module, query, key, value, attention_mask, position_ids=None, **kwargs):
            if looks and attention_mask is None:
                segment = (position_ids == 0).cumsum(-1)
                attention_mask = (segment[:, None, :, None] == segment[:, None, None, :]).tril()
            return attention(module, query, key, value, attention_mask, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register("sdpa", forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", lambda *args, **kwargs: None)

    yield register
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", mask)


def test_attention_that_looks_at_positions_keeps_segments_apart_without_a_mask(sdpa_without_masks):
    ids, positions = random_ids(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])

    def packed() -> torch.Tensor:
        base = tiny_family_model("qwen3_moe", attn_implementation="sdpa")
        return pt_moe(base=base, setting="dpt")(input_ids=ids, position_ids=positions).logits

    expected = packed()
    sdpa_without_masks(True)
    torch.testing.assert_close(packed(), expected, rtol=1e-5, atol=1e-5)
    sdpa_without_masks(False)
    with pytest.raises(ValueError, match="keep the segments of a packed row apart.*Pad the rows"):
        packed()
