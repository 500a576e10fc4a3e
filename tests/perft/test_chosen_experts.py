"""PERFT-E inside the experts that the base router chooses most: which these are, and what the others get."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from axolotl_moe_peft import PerftConfig, calibrate_experts
from axolotl_moe_peft.perft import PerftLayer, dispatch, units
from axolotl_moe_peft.perft.calibration import count_choices, first_experts
from axolotl_moe_peft.perft.dispatch import BlockedSlots, GroupedSlots, HostSlots
from axolotl_moe_peft.perft.selection import select_blocks
from axolotl_moe_peft.shared.model_card import describe
from tests.moe_families import FAMILIES as ALL_FAMILIES
from tests.moe_families import tiny_family_model
from tests.tiny_models import FAMILIES, PAD, random_ids, randomise_adapters, tiny_model

WAYS = {"gated": None, "host": HostSlots, "grouped": GroupedSlots, "blocked": BlockedSlots}
KINDS = {
    "lora": {},
    "parallel_adapter": {"expert_type": "parallel_adapter", "hidden_act": "sigmoid"},  # which is not 0 at 0
    "of aligned rank": {"rank": 8},
}


def perft(base, expert_ids=None, **keys) -> PeftModel:
    settings = {"variant": "embedded", "rank": 4, "task_type": "CAUSAL_LM", **keys}
    return get_peft_model(base, PerftConfig(expert_ids=expert_ids, **settings))


def layers_of(model) -> list[PerftLayer]:
    return [module for module in model.modules() if isinstance(module, PerftLayer)]


def choices(base, ids, attention_mask=None) -> dict[str, torch.Tensor]:
    """Each block's chosen experts (T, 2), from the logits of its router, by transformers' own interface."""
    logits = base(ids, attention_mask=attention_mask, output_router_logits=True).router_logits
    return {f"model.layers.{i}.mlp": x.topk(2, -1).indices for i, x in enumerate(logits)}


def with_zeros_elsewhere(base, model: PeftModel, **keys) -> PeftModel:
    """PERFT-E in all experts with the same numbers, and zeros in those that `model` leaves alone."""
    whole = perft(base, **keys)
    for layer, part in zip(layers_of(whole), layers_of(model), strict=True):
        chosen = part.perft_config["default"].expert_ids[part.block.name]
        with torch.no_grad():
            for name in ("perft_down", "perft_up"):
                getattr(layer, name)["default"].zero_()[chosen] = getattr(part, name)["default"]
    return whole


# ------------------------------------------------------------------------------------------------------ which they are


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.6, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_chosen_experts_are_counted_by_hand(family, keep):
    base, ids = tiny_model(family), random_ids(3, 40)
    expected = {}
    for name, indices in choices(base, ids).items():
        num_experts = base.config.get_text_config().num_local_experts if family == "mixtral" else 8
        uses = [(indices == expert).sum().item() for expert in range(num_experts)]
        ranking = sorted(range(num_experts), key=lambda expert: (-uses[expert], expert))
        expected[name] = sorted(ranking[: -(-int(keep * 100) * num_experts // 100)])
    found = calibrate_experts(base, [{"input_ids": ids}], keep)
    assert found == expected
    assert found == calibrate_experts(base, ({"input_ids": row.unsqueeze(0)} for row in ids), keep)
    assert calibrate_experts(base, [{"input_ids": ids}], keep, layers_to_transform=1) == {
        "model.layers.1.mlp": expected["model.layers.1.mlp"]
    }


def test_padding_does_not_count():
    base, ids = tiny_model("olmoe"), random_ids(2, 6)
    expected = calibrate_experts(base, [{"input_ids": ids}], 0.25)
    for left, right in ((0, 50), (50, 0)):
        padded = F.pad(ids, (left, right), value=PAD)
        mask = F.pad(torch.ones_like(ids), (left, right))
        given = {"input_ids": padded, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        assert calibrate_experts(base, [given | {"attention_mask": mask, "labels": padded}], 0.25) == expected
        assert calibrate_experts(base, [given], 0.25) != expected  # it would, without the mask


def test_choices_of_what_is_no_expert_do_not_count():
    base, ids, counted = tiny_family_model("longcat_flash"), random_ids(4, 24), {}
    blocks = select_blocks(base)
    for block in blocks:
        block.router.register_forward_hook(
            lambda router, args, output, name=block.name: counted.update(
                {name: next(t for t in output if t.dtype == torch.int64).flatten()}
            )
        )
    counts = count_choices(base, [{"input_ids": ids}], blocks)
    for name, chosen in counted.items():
        assert (chosen >= 4).any()
        assert counts[name].tolist() == [(chosen == expert).sum().item() for expert in range(4)]


def test_the_base_is_left_as_it_was(caplog):
    base = tiny_model("olmoe").train()
    base.model.layers[0].eval()
    before, modes = copy.deepcopy(base.state_dict()), [module.training for module in base.modules()]
    with caplog.at_level(logging.INFO, "axolotl_moe_peft"):
        ids = calibrate_experts(base, [{"input_ids": random_ids(2, 9)}], 0.25)
    assert [module.training for module in base.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    shares = []
    for name, indices in choices(base.eval(), random_ids(2, 9)).items():
        shares.append(100 * sum((indices == expert).sum().item() for expert in ids[name]) / indices.numel())
    assert f"{sum(shares) / 2:.1f} % of the base router's choices on average, {min(shares):.1f} % in" in caplog.text


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match="no token has reached model.layers.0.mlp in calibration"):
        calibrate_experts(tiny_model("olmoe"), [], 0.25)
    with pytest.raises(ValueError, match="keep: 0 is not allowed"):
        calibrate_experts(tiny_model("olmoe"), [{"input_ids": random_ids(1, 4)}], 0)


# --------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("family", FAMILIES)
def test_block_output_is_that_of_a_loop_over_tokens(family):
    base, ids = tiny_model(family), random_ids(2, 9)
    expert_ids = calibrate_experts(base, [{"input_ids": ids}], 0.5)
    model = perft(base, expert_ids)
    randomise_adapters(model)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    for layer in layers_of(model):
        chosen = expert_ids[layer.block.name]
        down, up = layer.perft_down["default"], layer.perft_up["default"]
        assert down.shape == (len(chosen), 4, 32)
        _, weights, indices = layer.base_layer.gate(hidden.flatten(0, 1))
        layer.enable_adapters(False)
        expected = layer(hidden).flatten(0, 1)
        layer.enable_adapters(True)
        adapted = 0
        for t, x in enumerate(hidden.flatten(0, 1)):
            for weight, expert in zip(weights[t], indices[t].tolist()):
                if expert in chosen:
                    unit = chosen.index(expert)
                    expected[t] = expected[t] + weight * 32 / 4 * up[unit] @ (down[unit] @ x)
                    adapted += 1
        assert 0 < adapted < indices.numel()
        torch.testing.assert_close(layer(hidden).flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_an_adapter_in_all_experts_with_zeros_in_the_others(way, kind, monkeypatch):
    if way == "grouped":
        monkeypatch.setattr(dispatch.F, "grouped_mm", _grouped_mm_with_garbage)
    keys, sizes = KINDS[kind], {"hidden_size": 64}
    expert_ids = {"model.layers.0.mlp": [5, 0, 6], "model.layers.1.mlp": [2]}  # units in any order
    part = perft(tiny_model("qwen3_moe", **sizes), expert_ids, **keys)
    randomise_adapters(part)
    whole = with_zeros_elsewhere(tiny_model("qwen3_moe", **sizes), part, **keys)
    if kind == "parallel_adapter":  # up is 0 there, and so is what it adds
        assert all((layer.perft_up["default"][1:2] == 0).all() for layer in layers_of(whole))
    ids = random_ids(2, 40)
    losses = []
    for model in (part, whole):
        model.base_model.model.enable_input_require_grads()
        monkeypatch.setattr(units, "slots_for", lambda *_, model=model: WAYS[way] if model is part else HostSlots)
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for layer, other in zip(layers_of(part), layers_of(whole)):
        chosen = expert_ids[layer.block.name]
        for name in ("perft_down", "perft_up"):
            gradient = getattr(layer, name)["default"].grad
            assert gradient.abs().sum() > 0
            torch.testing.assert_close(gradient, getattr(other, name)["default"].grad[chosen], rtol=1e-4, atol=1e-6)


def _grouped_mm_with_garbage(a, b, offs):
    """`F.grouped_mm` as a kernel computes it that leaves rows behind the last group as its memory was."""
    out = _GROUPED_MM(a, b, offs=offs)
    if b.dim() == 3:
        out[int(offs[-1]) :] = float("nan")
    return out


_GROUPED_MM = F.grouped_mm


def test_no_row_is_made_for_what_unadapted_experts_get():
    indices = torch.tensor([[0, 3], [3, 1], [3, 3]])  # of 3 units; 3 is none
    assert HostSlots.of(indices, 3, partial=True).choice_S.tolist() == [0, 3]
    assert GroupedSlots.of(indices, 3, partial=True).ends_N.tolist() == [1, 2, 2]
    blocked = BlockedSlots.of(indices, 3, partial=True)
    assert sorted(blocked.choice_S.unique().tolist()) == [0, 3, 6]  # 6 is padding


def test_tokens_of_unadapted_experts_alone_train_nothing():
    base = tiny_model("olmoe")
    ids = random_ids(1, 1)
    unused = {
        name: sorted(set(range(8)) - set(indices.flatten().tolist())) for name, indices in choices(base, ids).items()
    }
    model = perft(base, unused)
    randomise_adapters(model)
    with model.disable_adapter():
        expected = model(ids).logits
    logits = model(ids).logits
    assert torch.equal(logits, expected)
    logits.sum().backward()
    for name, parameter in model.named_parameters():  # there, as DDP asks, and 0
        assert not parameter.requires_grad or (parameter.grad == 0).all(), name


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_counts_and_adapts_its_experts(family):
    base, ids = tiny_family_model(family), random_ids(4, 24)
    expert_ids = calibrate_experts(base, [{"input_ids": ids}], 0.5)
    assert {len(chosen) for chosen in expert_ids.values()} == {2}
    assert first_experts(base, 0.5) == dict.fromkeys(expert_ids, [0, 1])
    part = perft(base, expert_ids)
    randomise_adapters(part)
    whole = with_zeros_elsewhere(tiny_family_model(family), part)
    gradients = []
    for model in (part, whole):
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(
            [getattr(layer, n)["default"].grad for layer in layers_of(model) for n in ("perft_down", "perft_up")]
        )
    names = [layer.block.name for layer in layers_of(part) for _ in range(2)]
    for name, gradient, expected in zip(names, *gradients, strict=True):
        # counted at first, and then reached: an expert that nobody counted would have none
        assert (gradient.flatten(1).abs().sum(1) > 0).all(), name
        torch.testing.assert_close(gradient, expected[expert_ids[name]], rtol=1e-3, atol=1e-6)


def test_every_expert_chosen_is_the_adapter_without_the_key():
    every = {f"model.layers.{i}.mlp": list(range(8)) for i in range(2)}
    assert not layers_of(perft(tiny_model("olmoe"), every))[0].unit_of_expert
    assert perft(tiny_model("olmoe"), every, experts={"keep": 1.0}).base_model.adapted_layers == [0, 1]


def test_a_base_from_the_meta_device_computes_the_same():
    expert_ids = {"model.layers.0.mlp": [5, 0], "model.layers.1.mlp": [2, 3]}
    expected = perft(tiny_model("olmoe"), expert_ids)
    randomise_adapters(expected)
    late = perft(tiny_model("olmoe").to("meta"), expert_ids).to_empty(device="cpu")
    late.load_state_dict(expected.state_dict())
    for theirs, buffer in zip(late.buffers(), expected.buffers(), strict=True):  # rotary frequencies are not saved
        theirs.copy_(buffer)
    ids = random_ids(2, 9)
    assert torch.equal(late.eval()(ids).logits, expected.eval()(ids).logits)


# --------------------------------------------------------------------------------------------- saved, counted, refused


def test_the_saved_adapter_says_which_and_loads_without_calibration(tmp_path):
    base, ids = tiny_model("olmoe"), random_ids(2, 9)
    config = PerftConfig(variant="embedded", rank=4, experts={"keep": 0.25}, task_type="CAUSAL_LM")
    assert config.calibration_rows == 128
    config = config.calibrated(base, [{"input_ids": ids}])
    assert config.calibration_rows == 0
    model = get_peft_model(base, config)
    randomise_adapters(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)
    assert loaded.active_peft_config.expert_ids == config.expert_ids
    assert loaded.active_peft_config.experts == {"calibrate": 128, "keep": 0.25}
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert "PERFT (embedded, inside 2 experts of a block, rank: 4)" in describe(loaded)
    with pytest.raises(ValueError, match="[Hh]otswapping"):
        hotswap_adapter(loaded, tmp_path, adapter_name="default")


def test_adapters_in_other_experts_of_one_model_do_not_mix(tmp_path):
    model, ids = perft(tiny_model("olmoe"), {f"model.layers.{i}.mlp": [0, 1, 2] for i in range(2)}), random_ids(2, 9)
    other = PerftConfig(
        variant="embedded",
        rank=2,
        expert_ids={f"model.layers.{i}.mlp": [7, 1] for i in range(2)},
        task_type="CAUSAL_LM",
    )
    model.add_adapter("other", other)
    randomise_adapters(model)
    model.set_adapter("other")
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    alone = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path / "other")
    assert torch.equal(alone(ids).logits, logits)
    model.delete_adapter("default")
    assert torch.equal(model(ids).logits, logits)
    assert all("default" not in layer.unit_of_expert for layer in layers_of(model))


def test_a_token_passes_through_no_more_adapters_than_there_are():
    model = perft(tiny_model("olmoe"), {f"model.layers.{i}.mlp": [3] for i in range(2)})
    row = model.base_model.parameter_rows()[0]
    assert row.parameters == row.activated == 2 * 2 * 4 * 32  # of the token's two experts one at most
    row = perft(
        tiny_model("olmoe"), {f"model.layers.{i}.mlp": [3, 5, 7] for i in range(2)}
    ).base_model.parameter_rows()[0]
    assert (row.parameters, row.activated) == (3 * 2 * 2 * 4 * 32, 2 * 2 * 2 * 4 * 32)


IDS = {"model.layers.0.mlp": [0], "model.layers.1.mlp": [1]}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variant": "routed", "experts": {"keep": 0.5}}, "perft.experts: .* means nothing with variant routed"),
        ({"variant": "single", "expert_ids": IDS}, "perft.expert_ids: .* means nothing with variant single"),
        ({"experts": 0.25}, "perft.experts: 0.25 is not allowed; it is a block like {keep: 0.25, calibrate: 128}"),
        ({"experts": {}}, "perft.experts: {} is not allowed"),
        ({"experts": {"calibrate": 4}}, "perft.experts: `keep` is missing"),
        ({"experts": {"keep": 0.5, "kalibrate": 4}}, "perft.experts: 'kalibrate' is no key of it"),
        *(
            ({"experts": {"keep": keep}}, rf"keep: {keep} is not allowed; .* above 0 and up to 1")
            for keep in (0, 1.5, -1)
        ),
        ({"experts": {"keep": "half"}}, "keep: 'half' is not allowed"),
        *(({"experts": {"keep": 1, "calibrate": n}}, f"calibrate: {n} is not allowed") for n in (0, -3, True, 1.5)),
        ({"expert_ids": {"model.layers.0.mlp": []}}, r"expert_ids: \[\] of model.layers.0.mlp is not allowed"),
        ({"expert_ids": {"model.layers.0.mlp": [1, 1]}}, r"\[1, 1\] of .* list of different experts"),
        ({"expert_ids": {"model.layers.0.mlp": [-1]}}, "counted from 0"),
        (
            {"expert_ids": IDS | {"model.layers.1.mlp": [8]}},
            "8 is no expert of model.layers.1.mlp, which has 8: 0 to 7",
        ),
        (
            {"expert_ids": {"model.layers.0.mlp": [0]}},
            "has no experts of model.layers.1.mlp, only of model.layers.0.mlp",
        ),
        ({"expert_ids": IDS | {"model.layers.2.mlp": [0]}}, "model.layers.2.mlp is not adapted, or not in this model"),
        ({"expert_ids": IDS, "layers_to_transform": 0}, "model.layers.1.mlp is not adapted"),
        ({"expert_ids": IDS, "experts": {"keep": 0.25}}, "1 experts of .*, of whose 8 `experts.keep: 0.25` keeps 2"),
        ({"experts": {"keep": 0.25}}, "says how many experts are adapted and not which.*calibrate_experts"),
        ({"experts": {"keep": 0.25}, "target_modules": "mlp"}, "perft.variant: embedded does not go with"),
    ],
)
def test_what_cannot_be_right_is_refused(keys, message):
    base = tiny_model("olmoe")
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, PerftConfig(**{"variant": "embedded", "task_type": "CAUSAL_LM", **keys}))
    assert not layers_of(base)
