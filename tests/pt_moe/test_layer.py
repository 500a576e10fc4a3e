"""Prompts in padded, packed and plain batches against a loop over sequences; routing; gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from axolotl_moe_peft.shared.routing import load_balancing_loss
from tests.pt_moe.prompts import (
    FAMILIES,
    SETTINGS,
    T,
    adapter_tensors,
    config,
    layer_of,
    pt_moe,
    reference_logits,
    reference_loss,
    reference_prompt,
)
from tests.tiny_models import PAD, VOCAB_SIZE, random_ids, tiny_model

# (length, of that prompt): ids of a sample are random_ids(1, length, seed=length)
LENGTHS = ((7, 3), (11, 6), (5, 1), (9, 8))
# float32 with the attention in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def samples() -> list[tuple[Tensor, int]]:
    return [(random_ids(1, length, seed=length)[0], prompt) for length, prompt in LENGTHS]


def row(parts: list[tuple[Tensor, int]], length: int, pad_first: bool = False) -> dict[str, Tensor]:
    """One packed row: positions restart, the filling is a segment of its own."""
    fill = length - sum(len(ids) for ids, _ in parts)
    filling = (torch.full((fill,), PAD), fill)
    parts = [filling, *parts] if pad_first else [*parts, filling]
    columns = {
        "input_ids": torch.cat([ids for ids, _ in parts]),
        "labels": torch.cat([torch.where(torch.arange(len(ids)) < n, -100, ids) for ids, n in parts]),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in parts]),
        "attention_mask": torch.cat([torch.full((len(ids),), i + 1) for i, (ids, _) in enumerate(parts)]),
    }
    columns["attention_mask"][columns["input_ids"] == PAD] = 0
    return columns


def batch(kind: str) -> dict[str, Tensor]:
    """The samples as one batch."""
    a, b, c, d = samples()
    if kind in ("left", "right"):
        rows = [row([s], 12, pad_first=kind == "left") for s in (a, b, c, d)]
        keys = ("input_ids", "labels", "attention_mask")
        made = {k: torch.stack([r[k] for r in rows]) for k in keys}
        made["attention_mask"] = (made["attention_mask"] > 0).long()
        return made
    rows = [row([a, b, c], 25), row([d], 25, pad_first=True)]
    keys = {"packed": ("input_ids", "labels", "position_ids"), "numbered": ("input_ids", "labels", "attention_mask")}
    return {k: torch.stack([r[k] for r in rows]) for k in keys[kind]}


def split(kind: str, values: Tensor) -> list[Tensor]:
    """The samples' parts of (B, S, ...), in their order."""
    (la, lb, lc, ld) = (n for n, _ in LENGTHS)
    if kind == "left":
        return [v[-n:] for v, (n, _) in zip(values, LENGTHS, strict=True)]
    if kind == "right":
        return [v[:n] for v, (n, _) in zip(values, LENGTHS, strict=True)]
    first, second = values
    return [*first[: la + lb + lc].split([la, lb, lc]), second[-ld:]]


KINDS = ("left", "right", "packed", "numbered")


# -------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_and_packed_logits_equal_a_loop_over_sequences(family, kind, setting):
    model, bare = pt_moe(family, setting), tiny_model(family)
    found = split(kind, model(**batch(kind)).logits)
    for logits, (ids, prompt_length) in zip(found, samples(), strict=True):
        expected = reference_logits(bare, adapter_tensors(model), config(setting), ids, prompt_length)
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", ["pt_moe", "top_2", "smop", "dpt"])
def test_padded_and_packed_loss_and_gradients_equal_a_loop_over_sequences(setting, kind):
    model, bare = pt_moe("mixtral", setting).train(), tiny_model("mixtral")
    tensors = adapter_tensors(model)
    loss = model(**batch(kind)).loss
    loss.backward()
    expected = reference_loss(bare, tensors, config(setting), samples())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, tensor in tensors.items():
        found = getattr(layer_of(model), f"ptmoe_{name}")["default"].grad
        assert tensor.grad.abs().sum() > 0
        torch.testing.assert_close(found, tensor.grad, **CLOSE)


def test_the_samples_choose_different_experts():
    """Else the tests above could not see a prompt given to the wrong sequence."""
    model = pt_moe()
    embed, tensors = model.get_input_embeddings(), adapter_tensors(model)
    chosen = [reference_prompt(tensors, config(), embed(ids)[:n])[1][0] for ids, n in samples()]
    assert len(set(chosen)) == 3


def test_sdpa_equals_eager():
    logits = []
    for implementation in ("sdpa", "eager"):
        base = tiny_model("llama")
        base.set_attn_implementation(implementation)
        logits.append(torch.cat(split("packed", pt_moe(base=base)(**batch("packed")).logits)))
    torch.testing.assert_close(*logits, **CLOSE)


def test_logits_have_the_shape_of_the_input_and_hidden_states_too():
    out = pt_moe("mixtral")(**batch("left"), output_hidden_states=True, output_router_logits=True)
    assert out.logits.shape[:2] == (4, 12)
    assert {h.shape for h in out.hidden_states} == {(4, 12, 32)}
    assert {r.shape for r in out.router_logits} == {(4 * 12, 4)}


def test_a_base_routers_balance_loss_does_not_count_the_prompt():
    out = pt_moe("mixtral")(**batch("right"), output_router_logits=True)
    real = batch("right")["attention_mask"].flatten().bool()
    expected = load_balancing_loss(out.router_logits, 2, real)
    torch.testing.assert_close(out.aux_loss, expected)


def test_embeddings_may_be_given_instead_of_tokens():
    model, ids = pt_moe(), random_ids(2, 6)
    embeds = tiny_model("llama").get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_arguments_by_position_are_understood():
    model, padded = pt_moe(), batch("right")
    by_name = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    inner = model.get_base_model()
    assert torch.equal(inner(padded["input_ids"], padded["attention_mask"]).logits, by_name)
    decoder = inner.model(padded["input_ids"], padded["attention_mask"], return_dict=False)
    assert torch.equal(inner.lm_head(decoder[0]), by_name)


def test_a_packed_row_stays_isolated_where_a_cache_would_be_made():
    base = tiny_model("llama")
    base.config.use_cache = True
    found = split("packed", pt_moe(base=base)(**batch("packed"), use_cache=True).logits)
    torch.testing.assert_close(found, split("left", pt_moe()(**batch("left")).logits), **CLOSE)


def packed_without_filling() -> dict[str, Tensor]:
    return {k: v[None] for k, v in row(samples()[:3], 23).items() if k != "attention_mask"}


def test_cumulative_lengths_of_flash_attention_tell_segments_too():
    model, packed = pt_moe(), packed_without_filling()
    expected = model(**packed).logits
    del packed["position_ids"]
    ends = torch.tensor([0, 7, 18, 23], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11}
    assert torch.equal(model(**packed, **lengths).logits, expected)


def test_flash_attention_finds_prompt_and_segment_together():
    model, seen = pt_moe(), {}
    decoder_layer = model.get_base_model().model.layers[0]
    decoder_layer.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    model(**packed_without_filling(), cu_seq_lens_q=torch.tensor([0, 7, 18, 23], dtype=torch.int32))
    assert "cu_seq_lens_q" not in seen  # those of the row without prompts
    assert _is_packed_sequence(seen["position_ids"], batch_size=1)
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(seen["position_ids"])
    assert ends.tolist() == [0, 7 + T, 18 + 2 * T, 23 + 3 * T]
    assert longest == 11 + T


# ------------------------------------------------------------------------------------------------------------ routing


def chosen(model, **call) -> dict[str, float]:
    """What the router's statistics say of one training step."""
    model.train()(**call)
    return model.base_model.auxiliary.statistics.pop()


def prompts_of(model, call: dict[str, Tensor]) -> Tensor:
    """The prompts that went into the decoder: its first layer's input where the rows of a full batch have them."""
    seen = {}
    handle = model.get_base_model().model.layers[0].register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    model(**call)
    handle.remove()
    return seen["x"][:, :T].detach()


def test_the_answer_has_no_influence_on_the_prompt_in_training():
    model, ids = pt_moe().train(), random_ids(3, 10)
    labels = torch.where(torch.arange(10) < 4, -100, ids)
    before = prompts_of(model, {"input_ids": ids, "labels": labels})
    changed = torch.cat([ids[:, :4], random_ids(3, 6, seed=9)], 1)
    after = prompts_of(model, {"input_ids": changed, "labels": torch.where(labels == -100, -100, changed)})
    assert torch.equal(before, after)
    other_prompt = torch.cat([random_ids(3, 4, seed=9), ids[:, 4:]], 1)
    assert not torch.allclose(before, prompts_of(model, {"input_ids": other_prompt, "labels": labels}))


def test_a_prompt_alone_chooses_as_it_does_before_its_answer():
    model, ids = pt_moe(), random_ids(3, 10)
    labels = torch.where(torch.arange(10) < 4, -100, ids)
    expected = prompts_of(model, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(prompts_of(model, {"input_ids": ids[:, :4]}), expected)


def test_router_input_sequence_reads_the_answer():
    model, ids = pt_moe(router_input="sequence"), random_ids(3, 10)
    expected = prompts_of(model, {"input_ids": ids})
    assert torch.equal(prompts_of(model, {"input_ids": ids, "labels": ids}), expected)


def test_noise_is_for_training_only_and_multiplies_each_logit():
    model = pt_moe(router_noise_std=0.5)
    layer, x = layer_of(model), torch.randn(4000, 32) * 0.02
    quiet, _ = layer._route("default", x, learns=False)
    assert torch.equal(layer._route("default", x, learns=False)[0], quiet)
    noisy, _ = layer._route("default", x, learns=True)
    assert 0.01 < ((noisy > 0) != (quiet > 0)).any(1).float().mean() < 0.9
    with torch.no_grad():
        layer.ptmoe_router_weight["default"].zero_()
        layer.ptmoe_router_bias["default"].copy_(torch.tensor([3.0, 0.0, 0.0]))
    torch.manual_seed(0)
    weights, _ = layer._route("default", x, learns=True)
    logit = (2 * weights[:, 0] / (1 - weights[:, 0])).log()[weights[:, 0] > 0]  # exp(l) / (exp(l) + 2) = w
    # 3 (1 + 0.5 eps), and zeros stay zeros; the rest are the cases where another expert won
    assert logit.mean().item() == pytest.approx(3, abs=0.1)
    assert logit.std().item() == pytest.approx(1.5, abs=0.1)


def test_the_router_loss_is_that_of_the_reference_and_reaches_only_the_router():
    plain, balanced = (pt_moe(router_aux_loss_coef=c).train() for c in (0.0, 0.3))
    tensors, embed = adapter_tensors(plain), plain.get_input_embeddings()
    for model in (plain, balanced):
        model(**batch("packed")).loss.backward()
    means = torch.stack([embed(ids)[:n].mean(0) for ids, n in samples()])
    logits = means @ tensors["router_weight"].T + tensors["router_bias"]
    expected = load_balancing_loss([logits], 1)
    (0.3 * expected).backward()
    figures = balanced.base_model.auxiliary.statistics.pop()
    assert figures["router_aux_loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, tensor in tensors.items():
        on, off = (getattr(layer_of(m), f"ptmoe_{name}")["default"].grad for m in (balanced, plain))
        added = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(on - off, added, **CLOSE)


def test_figures_count_sequences_and_leave_the_filling_out():
    model = pt_moe()
    figures = chosen(model, **batch("packed"))  # 4 sequences choose 3 experts
    assert figures["expert_used_fraction"] == 1.0
    assert figures["expert_max_share"] == 0.5
    assert "router_aux_loss" not in figures


def test_coefficient_zero_runs_no_router_loss(monkeypatch):
    monkeypatch.delattr("axolotl_moe_peft.shared.routing.balance_loss")
    chosen(pt_moe(), **batch("packed"))


def test_one_expert_has_no_router_and_no_figures():
    model = pt_moe(setting="pt")
    assert chosen(model, input_ids=random_ids(1, 5)) == {}  # and needs no labels
    assert [n for n, p in model.named_parameters() if p.requires_grad and "router" in n] == []


# ---------------------------------------------------------------------------------------------------------- gradients


def gradients(checkpointing: dict | None, **kwargs) -> dict[str, Tensor]:
    model = pt_moe("mixtral", router_aux_loss_coef=0.5, router_noise_std=0.3, **kwargs)
    model.enable_input_require_grads()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    torch.manual_seed(0)
    model.train()(**batch("packed")).loss.backward()
    return {n: p.grad for n, p in layer_of(model).named_parameters()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    expected, found = gradients(None), gradients({"use_reentrant": use_reentrant})
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)  # the same operations again


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_parameter_gets_a_gradient_whatever_is_chosen(setting):
    """DDP waits for the gradients of all, also of a row of nothing but padding."""
    for call in (batch("packed"), {k: v[:1] for k, v in batch("right").items()}, padding_only()):
        model = pt_moe("llama", setting).train()
        stand_in = model(**call).logits.sum()  # the loss of padding is nan
        model.base_model.auxiliary.follow(stand_in)
        stand_in.backward()
        trained = [p for name, p in layer_of(model).named_parameters() if "router_mean" not in name]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def padding_only() -> dict[str, Tensor]:
    ids = torch.full((1, 6), PAD)
    return {"input_ids": ids, "labels": torch.full((1, 6), -100), "position_ids": torch.arange(6)[None]}


def test_bfloat16_base_and_float32_adapter_train():
    model = pt_moe(base=tiny_model("llama").bfloat16()).train()
    assert {p.dtype for p in layer_of(model).parameters()} == {torch.float32}
    out = model(**batch("packed"))
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    exact = pt_moe().train()
    exact(**batch("packed")).loss.backward()
    for (name, p), q in zip(layer_of(model).named_parameters(), layer_of(exact).parameters(), strict=True):
        cosine = torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0)
        assert cosine > 0.99, name  # bfloat16 has 8 bits


# ------------------------------------------------------------------------------------------------------------ refusals


def test_training_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"training mode was called without labels.*`rl:`.*model\.eval\(\)"):
        pt_moe().train()(random_ids(1, 5))


def test_completion_data_is_refused_where_there_is_a_router_that_reads_prompts():
    ids = random_ids(1, 5)
    with pytest.raises(ValueError, match="train_on_inputs: false.*router_input: sequence"):
        pt_moe().train()(input_ids=ids, labels=ids)
    pt_moe(router_input="sequence").train()(input_ids=ids, labels=ids)
    pt_moe(setting="pt").train()(input_ids=ids, labels=ids)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_that_exceeds_the_models_positions_is_refused(family):
    model = pt_moe(base=tiny_model(family, max_position_embeddings=16))
    model(random_ids(1, 11))
    with pytest.raises(ValueError, match="12 tokens and its prompt of 5 take 17 positions, but the model has 16"):
        model(random_ids(1, 12))


def test_packed_rows_are_as_long_as_they_like():
    model = pt_moe(base=tiny_model("llama", max_position_embeddings=16))
    assert model(**batch("packed")).logits.shape[1] == 25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, r"attention mask of shape \(1, 1, 5, 5\)"),
        ({"position_ids": torch.arange(5).expand(3, 1, 5)}, r"position_ids of shape \(3, 1, 5\)"),
        ({"token_type_ids": torch.zeros(1, 5)}, "`token_type_ids` is not supported"),
    ],
)
def test_arguments_without_room_for_the_prompt_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        pt_moe()(input_ids=random_ids(1, 5), **call)


def test_a_decoder_without_positions_takes_padded_rows_and_refuses_packed_ones():
    torch.manual_seed(0)
    bare = BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4)).eval()
    model = pt_moe(base=copy.deepcopy(bare))
    for kind in ("left", "right"):
        for logits, (ids, n) in zip(split(kind, model(**batch(kind)).logits), samples(), strict=True):
            torch.testing.assert_close(
                logits, reference_logits(bare, adapter_tensors(model), config(), ids, n), **CLOSE
            )
    with pytest.raises(ValueError, match="BloomModel takes no position_ids.*Pad the rows"):
        model(**batch("packed"))


def test_packed_rows_that_flash_attention_would_mix_are_refused():
    model = pt_moe()
    model.get_base_model().model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention keeps the segments of one packed row apart, not of 2"):
        model(**batch("packed"))


def test_a_failed_call_leaves_no_trace():
    model, ids = pt_moe(), random_ids(1, 5)
    expected = model(ids).logits
    with pytest.raises(ValueError):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 5, 5), labels=ids)
    with pytest.raises(IndexError):
        model(input_ids=ids + 1000)
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)
