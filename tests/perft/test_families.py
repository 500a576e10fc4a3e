"""PERFT on every MoE family of transformers: what holds for all of them, and what a family refuses."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.aria.modeling_aria import AriaExperts

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer, moe_families
from axolotl_moe_peft.perft.probe import embedded_sizes
from axolotl_moe_peft.perft.selection import select_blocks
from tests.moe_families import FAMILIES, tiny_family_config, tiny_family_model
from tests.tiny_models import PAD, random_ids, randomise_adapters, tiny_model

VARIANTS = {"routed": {"num_experts": 3, "num_experts_per_tok": 2}, "embedded": {}}

# Families whose base router scores its experts by a sigmoid; the others take a softmax. The reasons name the rest.
SIGMOID = (
    "afmoe axk1 axk2 deepseek_v3 deepseek_v32 dots1 exaone_moe glm4_moe glm4_moe_lite glm_moe_dsa hy_v3 inkling_text "
    "laguna lfm2_moe llama4_text mimo_v2_flash minimax_m2 minimax_m3_vl_text nemotron_h solar_open "
    "bailing_hybrid beam dots3_note_text flint hy_v4 inkling2_loop_text inkling2_text kimi_linear kolibri1 sarvam_mla "
    "sarvam_moe"
).split()
NO_EXPERTS = "also chooses among outputs that are no experts"
NEITHER = "are not the softmax or the sigmoid of its logits"
NO_BASE_LOSS = {
    "longcat_flash": NO_EXPERTS,
    "zaya": NO_EXPERTS,
    "deepseek_v4": NEITHER,  # sqrt(softplus)
    "gemma4_text": NEITHER,  # it returns probabilities
    "phimoe": NEITHER,  # SparseMixer
}
NO_BASE_WEIGHTS = {"longcat_flash": NO_EXPERTS, "zaya": NO_EXPERTS, "llama4_text": "scale what goes into the experts"}
# a token's weights do not sum to one (or to one common factor), whatever other families do by default
NOT_NORMALISED = "deepseek_v2 dots1 flex_olmo inkling_text jamba llama4_text longcat_flash olmoe phimoe".split()
NOT_NORMALISED += "kolibri1 qwen2_moe qwen3_moe zaya".split()
# their experts are not called with indices and weights: the embedded adapters act on the block's output
AT_BLOCK = ["jetmoe", "llama4_text"]
if hasattr(AriaExperts, "route_tokens_to_experts"):  # until transformers 5.18
    AT_BLOCK.append("aria_text")

each_family = pytest.mark.parametrize("family", FAMILIES)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def config(variant: str, **kwargs) -> PerftConfig:
    return PerftConfig(variant=variant, task_type="CAUSAL_LM", **{"rank": 4, **VARIANTS[variant], **kwargs})


def perft(family: str, variant: str, **kwargs) -> PeftModel:
    model = get_peft_model(tiny_family_model(family), config(variant, **kwargs)).eval()
    randomise_adapters(model)
    return model


def layers_of(model: nn.Module) -> list[PerftLayer]:
    return [m for m in model.modules() if isinstance(m, PerftLayer)]


def logits_of(output: Tensor | tuple) -> Tensor:
    return output if isinstance(output, Tensor) else output[-1]


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    ids = random_ids(4, 24)
    model.zero_grad()
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@each_variant
@each_family
def test_step_0_equals_the_base_exactly(family, variant):
    base, ids = tiny_family_model(family), random_ids(2, 9)
    expected = base(ids).logits
    assert torch.equal(get_peft_model(base, config(variant))(ids).logits, expected)


@each_family
def test_the_layers_with_moe_blocks_are_adapted_and_no_others(family):
    model = perft(family, "routed")
    assert model.base_model.adapted_layers == FAMILIES[family][1]
    layers = layers_of(model)
    assert [layer.norm_topk_prob["default"] for layer in layers] == [family not in NOT_NORMALISED] * len(layers)
    assert all(layer.perft_down["default"].shape == (3, 4, 32) for layer in layers)


@each_family
def test_embedded_has_one_adapter_for_each_expert(family):
    for layer in layers_of(perft(family, "embedded")):
        width = 16 if family == "nemotron_h" else 32  # its experts work in a latent space
        assert layer.perft_down["default"].shape == (4, 4, width)
        assert layer.perft_up["default"].shape == (4, width, 4)
        assert layer.num_active_experts["default"] == (1 if family == "zaya" else 2)


@each_variant
@each_family
def test_gradients_reach_every_adapter(family, variant):
    for name, gradient in adapter_gradients(perft(family, variant)).items():
        assert (gradient.flatten(1).abs().sum(1) > 0).all(), name


@each_variant
@each_family
def test_reentrant_checkpointing_has_the_same_gradients(family, variant):
    coef = {} if family in NO_BASE_LOSS else {"base_router_aux_loss_coef": 0.5}
    plain, checkpointed = (perft(family, variant, **coef) for _ in range(2))
    if not checkpointed.get_base_model().supports_gradient_checkpointing:  # JetMoe, until transformers 5.24
        with pytest.raises(ValueError, match="does not support (gradient|activation) checkpointing"):
            checkpointed.gradient_checkpointing_enable({"use_reentrant": True})
        return
    calls: dict[str, int] = {"plain": 0, "checkpointed": 0}

    def count(name: str) -> None:
        calls[name] += 1

    for name, model in (("plain", plain), ("checkpointed", checkpointed)):
        for layer in layers_of(model):
            layer.register_forward_hook(lambda m, args, out, name=name: count(name))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": True})
    checkpointed.enable_input_require_grads()
    expected = adapter_gradients(plain)
    for name, gradient in adapter_gradients(checkpointed).items():
        # the same operations in the same order
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)
    assert calls["checkpointed"] == 2 * calls["plain"] > 0


@each_family
def test_padding_counts_in_no_statistic(family):
    model = perft(family, "routed", num_experts=5).train()
    ids = random_ids(2, 12)
    figures = []
    for pad in (0, 5):
        padded = torch.nn.functional.pad(ids, (pad, 0), value=PAD)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (pad, 0))
        labels = padded.masked_fill(mask == 0, -100)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        counted: dict[str, Tensor] = {}
        model.base_model.statistics.of("default").record_usage = counted.__setitem__
        model(input_ids=padded, attention_mask=mask, position_ids=positions, labels=labels, use_cache=False)
        figures.append(counted)
    assert len(figures[0]) == len(FAMILIES[family][1])
    for name, counts in figures[0].items():
        assert counts.sum() == 2 * 12 * 2
        assert torch.equal(figures[1][name], counts)


@each_variant
@each_family
def test_saved_and_loaded_logits_are_bit_equal(tmp_path, family, variant):
    model, ids = perft(family, variant), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_family_model(family), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@each_variant
@each_family
def test_a_training_step_changes_every_adapter_tensor_and_nothing_else(family, variant):
    model = perft(family, variant)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    adapter_gradients(model)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == trainable
    assert all("perft_" in name for name in trainable)


# ------------------------------------------------------------------------------- the base router's weights and losses


def own_reading(
    family: str, layer: PerftLayer, hidden_TD: Tensor, call: tuple
) -> list[list[tuple[int, Tensor, Tensor]]]:
    """For each token the experts that the base chose, with the weights on their inputs and on their outputs."""
    block, one = layer.base_layer, torch.ones(())
    if family == "llama4_text":
        logits_TE = hidden_TD @ block.router.weight.T
        return [[(e.item(), logits[e].sigmoid(), one) for e in logits.topk(2).indices] for logits in logits_TE]
    if family in AT_BLOCK:
        weight = block.router.weight if family == "aria_text" else block.router.layer.weight
        chosen = [logits.topk(2) for logits in hidden_TD @ weight.T]
        return [[(e.item(), one, w) for e, w in zip(c.indices, c.values.softmax(-1), strict=True)] for c in chosen]
    _, indices, weights = call
    rows = [list(zip(i.tolist(), [one] * len(i), w, strict=True)) for i, w in zip(indices, weights, strict=True)]
    return [[choice for choice in row if choice[0] < 4] for row in rows]  # LongCat's zero experts come after


@each_family
def test_embedded_adapters_are_weighted_as_the_base_weighs_its_experts(family):
    model = perft(family, "embedded", expert_type="parallel_adapter", hidden_act="gelu")
    layer, seen = layers_of(model)[-1], {}
    if family in AT_BLOCK:
        layer.base_layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], call=(), before=out))
        layer.register_forward_hook(lambda m, args, out: seen.update(after=out))
    else:
        experts = layer.block.experts

        def note(m, args, out):
            seen.update(x=args[0], call=args, before=out.clone())

        experts.register_forward_hook(note, prepend=True)  # before the adapters add to it
        experts.register_forward_hook(lambda m, args, out: seen.update(after=out))
    with torch.no_grad():
        model(random_ids(2, 9))
    before, after = (o[0] if isinstance(o, tuple) else o for o in (seen["before"], seen["after"]))
    hidden_TD = seen["x"].flatten(0, -2)
    down, up = layer.perft_down["default"], layer.perft_up["default"]
    expected = torch.zeros_like(hidden_TD)
    for t, choices in enumerate(own_reading(family, layer, hidden_TD, seen["call"])):
        for e, on_input, on_output in choices:
            bottleneck = torch.nn.functional.gelu(down[e] @ (on_input * hidden_TD[t]))
            expected[t] += on_output * (up[e] @ bottleneck)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(after - before, expected.view_as(after), rtol=1e-4, atol=1e-5)


@each_family
def test_the_base_routers_balance_loss_is_right_or_refused_with_the_reason(family):
    if family in NO_BASE_LOSS:
        with pytest.raises(ValueError, match=f"perft.base_router_aux_loss_coef.*{NO_BASE_LOSS[family]}"):
            perft(family, "routed", base_router_aux_loss_coef=0.5)
        return
    model = perft(family, "routed", base_router_aux_loss_coef=0.5)
    routings = []
    for i, layer in enumerate(layers_of(model)):
        layer.block.router.register_forward_hook(lambda m, args, out, i=i: routings.append((i, out)))
    adapter_gradients(model)
    expected: dict[int, list[Tensor]] = {}  # of each run of each layer
    for i, output in routings:
        tensors = [output] if isinstance(output, Tensor) else [t for t in output if isinstance(t, Tensor)]
        logits = [t for t in tensors if t.dim() == 2 and t.shape[1] == 4][-1].float()
        scores = logits.sigmoid() if family in SIGMOID else logits.softmax(-1)
        integers = [t for t in tensors if t.dim() == 2 and t.dtype == torch.int64]
        chosen = integers[0] if integers else logits.topk(2).indices
        shares = torch.stack([(chosen == e).any(1).float().mean() for e in range(4)])
        loss = 4 * (shares * (scores / scores.sum(1, keepdim=True)).mean(0)).sum()
        expected.setdefault(i, []).append(loss)
    by_layer = torch.stack([torch.stack(runs).mean() for runs in expected.values()])
    figure = model.base_model.statistics.pop()["base_router_aux_loss"]
    assert figure == pytest.approx(by_layer.mean().item(), rel=1e-5)


@each_family
def test_gate_weights_base_takes_them_by_rank_or_is_refused_with_the_reason(family):
    if family in NO_BASE_WEIGHTS:
        with pytest.raises(ValueError, match=f"perft.gate_weights: base.*{NO_BASE_WEIGHTS[family]}"):
            perft(family, "routed", gate_weights="base", num_experts_per_tok=1)
        return
    model = perft(family, "routed", gate_weights="base", num_experts_per_tok=1)
    layer, seen = layers_of(model)[-1], {}
    adapter = layer.adapter("default")
    units = SimpleNamespace(
        config=adapter.config, routed=lambda x, weights, indices: seen.update(weights=weights) or torch.zeros_like(x)
    )
    layer.adapter = lambda name: adapter._replace(units=units)
    if family in AT_BLOCK:
        layer.block.router.register_forward_hook(lambda m, args, out: seen.update(logits=logits_of(out)))
    else:
        layer.block.experts.register_forward_hook(lambda m, args, out: seen.update(given=args[2]))
    with torch.no_grad():
        model(random_ids(1, 6))
    given = seen["given"] if "given" in seen else seen["logits"].topk(2).values.softmax(-1)
    torch.testing.assert_close(seen["weights"], given.amax(1, keepdim=True).float(), check_dtype=False)


# ----------------------------------------------------------------------------------------------- blocks of other kinds


def test_the_table_names_blocks_that_exist_and_few():
    blocks = {type(layer.base_layer).__name__ for f in FAMILIES for layer in layers_of(perft(f, "routed"))}
    assert set(moe_families.FAMILIES) < blocks
    assert len(moe_families.FAMILIES) <= 10


@each_variant
@each_family
def test_a_bf16_base_with_float32_gates_trains_in_mixed_precision(family, variant):
    base = tiny_family_model(family).to(torch.bfloat16)
    for name, module in base.named_modules():
        if name.endswith(".gate"):  # what Axolotl does to the base before it attaches an adapter
            module.float()
    coef = {} if family in NO_BASE_LOSS else {"base_router_aux_loss_coef": 0.5}
    model = get_peft_model(base, config(variant, **coef))
    randomise_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = adapter_gradients(model)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"jetmoe"}))  # its router counts on the CPU
def test_a_base_on_the_meta_device_gets_adapters_of_the_same_shapes(family):
    shapes = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        base = tiny_family_model(family).to(device)
        model = get_peft_model(base, config("embedded"))
        shapes.append({n: p.shape for n, p in model.named_parameters() if p.requires_grad})
    assert shapes[0] == shapes[1]


def test_a_base_that_arrives_on_the_meta_device_finds_its_routers_scores_later():
    coef = {"base_router_aux_loss_coef": 0.5}
    expected = perft("deepseek_v3", "routed", **coef)
    late = get_peft_model(tiny_family_model("deepseek_v3").to("meta"), config("routed", **coef)).to_empty(device="cpu")
    late.load_state_dict(expected.state_dict())
    for theirs, buffer in zip(late.buffers(), expected.buffers(), strict=True):  # rotary frequencies are not saved
        theirs.copy_(buffer)
    gradients = adapter_gradients(expected)
    for name, gradient in adapter_gradients(late).items():
        assert torch.equal(gradient, gradients[name])


def test_looking_at_a_base_in_training_draws_no_random_number():
    base = tiny_family_model("phimoe", router_jitter_noise=0.1, input_jitter_noise=0.1).train()
    state = torch.get_rng_state()
    for block in select_blocks(base):
        assert embedded_sizes(block) == (4, 2, 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in base.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_gemma_4_wraps_the_experts_and_not_the_decoder_layer():
    model = perft("gemma4_text", "routed")
    assert model.targeted_module_names == ["model.layers.0.experts", "model.layers.1.experts"]
    assert model.unload().model.layers[0].experts.__class__.__name__ == "Gemma4TextExperts"


class ReversedRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = hidden_TD @ self.weight.T
        weights_TK, indices_TK = logits_TE.softmax(-1).topk(2)
        return indices_TK, weights_TK, logits_TE


class NewFamilysBlock(nn.Module):
    """Named as no family's block, calls its experts with keywords, and returns a flat tensor in a tuple."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = ReversedRouter(), experts

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x_TD = x.flatten(0, 1)
        indices_TK, weights_TK, _ = self.router(x_TD)
        return self.experts(hidden_states=x_TD, top_k_weights=weights_TK, top_k_index=indices_TK), None


@each_variant
def test_a_new_family_needs_no_line_of_code(variant):
    base = tiny_model("mixtral", num_hidden_layers=1)
    base.model.layers[0].mlp = NewFamilysBlock(base.model.layers[0].mlp.experts)
    model = get_peft_model(base, config(variant, base_router_aux_loss_coef=0.1))
    layer, hidden = layers_of(model)[0], torch.randn(2, 5, 32)
    plain = layer.base_layer(hidden)[0]
    assert torch.equal(layer(hidden)[0], plain)
    randomise_adapters(model)
    out = layer(hidden)[0]
    assert out.shape == (10, 32) and (out - plain).abs().max() > 1e-3


class LegacyBlock(nn.Module):
    """Experts in a list that the block walks through, as remote code of older models has it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 4), nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


@pytest.mark.parametrize(
    ("variant", "kwargs"),
    [("embedded", {}), ("routed", {"gate_weights": "base"}), ("routed", {"base_router_aux_loss_coef": 0.1})],
)
def test_experts_that_are_not_one_module_are_refused_where_they_are_needed(variant, kwargs):
    base = tiny_model("mixtral", num_hidden_layers=1)
    base.model.layers[0].mlp = LegacyBlock()
    with pytest.raises(ValueError, match=r"LegacyBlock \(model.layers.0.mlp\): its experts are not called as one"):
        get_peft_model(base, config(variant, **kwargs))
    assert not layers_of(base)
    assert get_peft_model(base, config("routed")).base_model.adapted_layers == [0]


def test_families_of_the_table_of_tests_have_real_configurations():
    assert len(FAMILIES) >= 48
    for family in FAMILIES:
        assert tiny_family_config(family).model_type == family
