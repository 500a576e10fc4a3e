"""The router losses' gradient is that of `(loss + coef * aux).backward()`, in every mode of training.

The reference is the same model with coefficients 0: hooks collect what the adapted blocks read, the router losses are
computed from it with plain formulas, added to the main loss, and differentiated by autograd alone.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, PreTrainedModel

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer
from axolotl_moe_peft.shared import auxiliary, routing
from tests.moe_families import tiny_family_model
from tests.tiny_models import FAMILIES, PAD, random_ids, randomise_adapters, tiny_model

COEFS = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.05, "base_router_aux_loss_coef": 0.2}
CHECKPOINTING = {"off": None, "reentrant": {"use_reentrant": True}, "non_reentrant": {"use_reentrant": False}}
# float32 sums in another order; the gradients' entries are of order 1e-3 to 1
TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}


def perft(family: str = "mixtral", checkpointing: str = "off", **kwargs) -> PeftModel:
    settings = {"num_experts": 5, "num_experts_per_tok": 2, "rank": 4, **COEFS, **kwargs}
    model = get_peft_model(tiny_model(family), PerftConfig(task_type="CAUSAL_LM", **settings))
    randomise_adapters(model)
    model.enable_input_require_grads()
    if CHECKPOINTING[checkpointing]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing])
    return model.train()


def batch(seed: int, padding: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    ids = random_ids(2, 9, seed)
    mask = torch.ones_like(ids)
    if padding:
        padded = slice(-padding, None) if side == "right" else slice(None, padding)
        ids[0, padded], mask[0, padded] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def plain_balance_loss(logits: torch.Tensor, k: int, mask: torch.Tensor) -> torch.Tensor:
    probs = logits.softmax(-1)[mask]
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(k).indices, 1.0)
    return logits.shape[1] * (chosen.mean(0) * probs.mean(0)).sum()


def reference_objective(model: PeftModel, inputs: dict[str, torch.Tensor], coefs: dict[str, float]) -> torch.Tensor:
    layers = [m for m in model.modules() if isinstance(m, PerftLayer)]
    seen: list[torch.Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    objective = model(**inputs).loss
    for handle in handles:
        handle.remove()
    mask = inputs["attention_mask"].bool().flatten()
    for layer, hidden in zip(layers, seen, strict=True):
        x = hidden.reshape(-1, hidden.shape[-1])
        if "default" in layer.perft_router:
            logits = x @ layer.perft_router["default"].T
            objective = objective + coefs["router_aux_loss_coef"] / len(layers) * plain_balance_loss(logits, 2, mask)
            z = logits.exp().sum(-1).log().square()[mask].mean()
            objective = objective + coefs["router_z_loss_coef"] / len(layers) * z
        base_logits = x @ layer.base_layer.gate.weight.T
        base = plain_balance_loss(base_logits, 2, mask)
        objective = objective + coefs["base_router_aux_loss_coef"] / len(layers) * base
    return objective


def reference_gradients(batches, weights, family="mixtral", coefs=COEFS, **kwargs) -> dict[str, torch.Tensor]:
    model = perft(family, **{**dict.fromkeys(COEFS, 0.0), **kwargs})
    sum(w * reference_objective(model, b, coefs) for b, w in zip(batches, weights, strict=True)).backward()
    return gradients(model)


def assert_same(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == reference.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, reference[name], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_the_explicit_sum(family, checkpointing):
    inputs = batch(0, padding=3)
    model = perft(family, checkpointing)
    model(**inputs).loss.backward()
    assert_same(gradients(model), reference_gradients([inputs], [1.0], family))


@pytest.mark.parametrize("variant", ["embedded", "dense", "single"])
def test_base_routers_loss_reaches_adapters_of_earlier_layers(variant):
    coefs = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "base_router_aux_loss_coef": 0.7}
    settings = {"variant": variant, "num_experts": 3 if variant == "dense" else None, "num_experts_per_tok": None}
    inputs = batch(0)
    model = perft(checkpointing="reentrant", **coefs, **settings)
    model(**inputs).loss.backward()
    assert_same(gradients(model), reference_gradients([inputs], [1.0], coefs=coefs, **settings))


def test_gate_weights_base_trains_its_router_by_the_router_losses_alone():
    model = perft("olmoe", "reentrant", gate_weights="base")
    model(**batch(0)).loss.backward()
    routers = [p.grad for n, p in model.named_parameters() if "perft_router" in n]
    assert all(g.abs().sum() > 0 for g in routers)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_two_forwards_before_one_backward_keep_their_own_mask_and_scale(checkpointing):
    first, second = batch(0, padding=4), batch(1, padding=2, side="left")
    model = perft(checkpointing=checkpointing)
    losses = [model(**first).loss, model(**second).loss]
    (0.25 * losses[0] + 3.0 * losses[1]).backward()
    assert_same(gradients(model), reference_gradients([first, second], [0.25, 3.0]))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_an_evaluation_between_forward_and_backward_does_no_harm(checkpointing):
    inputs = batch(0, padding=4)
    model = perft(checkpointing=checkpointing)
    loss = model(**inputs).loss
    model.eval()
    with torch.no_grad():
        model(**batch(5))
    model.train()
    loss.backward()
    assert_same(gradients(model), reference_gradients([inputs], [1.0]))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_the_scale_follows_the_main_loss(checkpointing):
    """Gradient accumulation and the fp16 scaler multiply the loss before backward."""
    batches = [batch(seed) for seed in range(3)]
    model = perft(checkpointing=checkpointing)
    for inputs in batches:
        (model(**inputs).loss / 3 * 1024).backward()
    assert_same({n: g / 1024 for n, g in gradients(model).items()}, reference_gradients(batches, [1 / 3] * 3))


def test_num_items_in_batch_weighs_a_micro_batch_by_its_share():
    """transformers' Trainer divides a micro-batch's summed loss by the tokens of all of them, and by nothing else."""
    batches = [batch(0, padding=5), batch(1)]
    counts = [(b["labels"][:, 1:] != -100).sum() for b in batches]
    model = perft()
    for inputs in batches:
        model(**inputs, num_items_in_batch=sum(counts)).loss.backward()
    assert_same(gradients(model), reference_gradients(batches, [(c / sum(counts)).item() for c in counts]))


def test_z_loss_of_accumulated_micro_batches_equals_that_of_the_whole_batch():
    whole = batch(0)
    coefs = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.5, "base_router_aux_loss_coef": 0.0}
    one, two = perft(**coefs), perft(**coefs)
    one(**whole).loss.backward()
    for row in range(2):
        (two(**{k: v[row : row + 1] for k, v in whole.items()}).loss / 2).backward()
    assert_same(gradients(two), gradients(one))


def test_tuples_instead_of_model_outputs_scale_as_well():
    inputs = batch(0)
    model = perft(checkpointing="reentrant")
    (model(**inputs, return_dict=False)[0] * 0.5).backward()
    assert_same(gradients(model), reference_gradients([inputs], [0.5]))


def outside_loss(model: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss, computed by somebody else from its logits."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_loss_computed_outside_gives_its_scale_if_it_is_followed(checkpointing):
    """Accumulation, and the factor of an fp16 scaler."""
    batches = [batch(seed) for seed in range(2)]
    model = perft(checkpointing=checkpointing)
    for inputs in batches:
        loss = outside_loss(model, inputs)
        model.base_model.auxiliary.follow(loss)
        (loss / 2 * 1024).backward()
    assert_same({n: g / 1024 for n, g in gradients(model).items()}, reference_gradients(batches, [0.5] * 2))


def test_two_forwards_of_one_followed_loss_have_its_scale():
    batches = [batch(0), batch(1)]
    model = perft(checkpointing="reentrant")
    loss = sum(outside_loss(model, inputs) for inputs in batches)
    model.base_model.auxiliary.follow(loss)
    (0.25 * loss).backward()
    assert_same(gradients(model), reference_gradients(batches, [0.25, 0.25]))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_an_unknown_scale_is_an_error(checkpointing):
    loss = outside_loss(perft(checkpointing=checkpointing), batch(0))
    with pytest.raises(RuntimeError, match=r"auxiliary\.follow\(loss\).*coefficients"):
        loss.backward()


def test_a_loss_from_hidden_states_past_the_model_counts():
    """Fused losses call the decoder and read lm_head's weight."""
    inputs = batch(0, padding=3)
    model = perft(checkpointing="reentrant")
    base = model.get_base_model()
    hidden = base.model(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state
    logits = hidden @ base.lm_head.weight.T
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    model.base_model.auxiliary.follow(loss)
    (0.5 * loss).backward()
    assert_same(gradients(model), reference_gradients([inputs], [0.5]))


def test_a_model_trained_in_evaluation_mode_has_its_router_losses():
    inputs = batch(0, padding=3)
    model = perft().eval()
    model(**inputs).loss.backward()
    assert_same(gradients(model), reference_gradients([inputs], [1.0]))


def test_gradients_of_something_else_in_evaluation_mode_have_no_router_losses_and_say_so():
    inputs = batch(0)
    del inputs["labels"]
    with pytest.warns(UserWarning, match="have no part in them"):
        model = perft().eval()
        model(**inputs).logits.sum().backward()
    plain = perft(**dict.fromkeys(COEFS, 0.0)).eval()
    plain(**inputs).logits.sum().backward()
    assert_same(gradients(model), gradients(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_losses_under_autocast_and_a_scaler_are_those_of_float32(dtype):
    """The routers alone: with up-projections of 0 their gradient is the losses', of inputs that autocast rounds."""
    inputs = batch(0, padding=3)
    model, scale = perft(gate_weights="base"), 2.0**16 if dtype == torch.float16 else 1.0
    seen: dict[PerftLayer, torch.Tensor] = {}
    for layer in (m for m in model.modules() if isinstance(m, PerftLayer)):
        layer.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0].detach().float()))
    with torch.autocast("cpu", dtype):
        loss = model(**inputs).loss
    (loss * scale).backward()
    mask = inputs["attention_mask"].bool().flatten()
    for layer, hidden in seen.items():
        router = layer.perft_router["default"].detach().clone().requires_grad_()
        logits = hidden.flatten(0, 1) @ router.T
        expected = COEFS["router_aux_loss_coef"] * plain_balance_loss(logits, 2, mask)
        expected = expected + COEFS["router_z_loss_coef"] * logits.logsumexp(-1).square()[mask].mean()
        (expected / len(seen)).backward()
        torch.testing.assert_close(layer.perft_router["default"].grad / scale, router.grad, rtol=1e-4, atol=1e-7)


def packed(rows: list[torch.Tensor], filler: int) -> dict[str, torch.Tensor]:
    """As Axolotl packs: no attention mask, positions restart, filler is a segment of its own."""
    segments = [*rows, torch.full((filler,), PAD)]
    ids = torch.cat(segments)
    labels = torch.cat(
        [r.clone().index_fill_(0, torch.tensor([0]), -100) for r in rows] + [torch.full((filler,), -100)]
    )
    positions = torch.cat([torch.arange(len(s)) for s in segments])
    return {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None], "use_cache": False}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_padding_never_counts_whatever_its_side_and_packed_equals_unpacked(checkpointing):
    rows = [random_ids(1, n, seed=n)[0] for n in (6, 9)]
    results = []
    for layout in ("right", "left", "packed", "tight"):
        if layout in ("packed", "tight"):
            inputs = packed(rows, filler=7 if layout == "packed" else 0)
        else:
            inputs = batch(0, padding=3, side=layout)
            real = inputs["attention_mask"].bool()
            inputs["input_ids"][real] = torch.cat(rows)
            inputs["labels"] = inputs["input_ids"].masked_fill(~real, -100)
            inputs["labels"][0, 3 if layout == "left" else 0] = -100
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model = perft(checkpointing=checkpointing)
        model(**inputs).loss.backward()
        results.append((gradients(model), model.base_model.auxiliary.statistics.pop()))
    for other, figures in results[1:]:
        assert_same(other, results[0][0])
        assert figures == pytest.approx(results[0][1], rel=1e-4)


def looped(family: str) -> PreTrainedModel:
    """A model of which one layer runs twice in each forward pass."""
    if family == "inkling2_loop_text":
        return tiny_family_model(family)
    model = tiny_model(family)
    model.model.layers.append(model.model.layers[-1])
    model.config.num_hidden_layers += 1
    return model


# the family itself came with transformers 5.24
@pytest.mark.parametrize("family", ["mixtral", *(f for f in ("inkling2_loop_text",) if f in CONFIG_MAPPING)])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_layers_that_run_twice_in_a_pass_count_once(family, checkpointing):
    """A layer's loss, and its figure, are the mean over its runs."""
    inputs = {**batch(0, padding=3), "use_cache": False}
    gradients_by_coef, figures, seen = {}, {}, {}
    for coef in (1.0, 0.0):
        torch.manual_seed(0)
        config = PerftConfig(task_type="CAUSAL_LM", num_experts=4, rank=4, router_aux_loss_coef=coef)
        model = get_peft_model(looped(family), config).train()
        randomise_adapters(model)
        model.enable_input_require_grads()
        layers = {n: m for n, m in model.named_modules() if isinstance(m, PerftLayer)}
        if coef:
            if CHECKPOINTING[checkpointing]:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing])
            model(**inputs).loss.backward()
        else:
            for name, layer in layers.items():
                layer.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, []).append(args[0]))
            loss, mask = model(**inputs).loss, inputs["attention_mask"].bool().flatten()
            losses = [
                [plain_balance_loss(x.flatten(0, 1) @ layers[n].perft_router["default"].T, 2, mask) for x in runs]
                for n, runs in seen.items()
            ]
            assert sorted(map(len, losses))[-2:] == [1, 2]
            means = [sum(runs) / len(runs) for runs in losses]
            (loss + sum(means) / len(means)).backward()
            figures[coef] = (sum(means) / len(means)).item()
        if coef:
            figures[coef] = model.base_model.statistics.pop()["router_aux_loss"]
        gradients_by_coef[coef] = gradients(model)
    assert_same(gradients_by_coef[1.0], gradients_by_coef[0.0])
    assert figures[1.0] == pytest.approx(figures[0.0], rel=1e-4)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_statistics_are_means_over_layers_and_micro_batches_and_ignore_recomputation(checkpointing):
    batches = [batch(0, padding=3), batch(1)]
    model = perft(checkpointing=checkpointing)
    seen: list[torch.Tensor] = []
    masks = [b["attention_mask"].bool().flatten() for b in batches for _ in range(2)]
    for layer in (m for m in model.modules() if isinstance(m, PerftLayer)):
        layer.register_forward_pre_hook(
            lambda m, args: seen.append(args[0].reshape(-1, 32) @ m.perft_router["default"].T)
        )
    losses = [model(**inputs).loss for inputs in batches]
    logits = [x.detach() for x in seen]  # a copy: recomputation goes on appending
    sum(losses).backward()
    figures = model.base_model.auxiliary.statistics.pop()
    balance = [plain_balance_loss(x, 2, m) for x, m in zip(logits, masks, strict=True)]
    z = [x.logsumexp(-1).square()[m].mean() for x, m in zip(logits, masks, strict=True)]
    assert figures["router_aux_loss"] == pytest.approx(sum(balance).item() / 4, rel=1e-4)
    assert figures["router_z_loss"] == pytest.approx(sum(z).item() / 4, rel=1e-4)
    shares = []
    for first, second in ((0, 2), (1, 3)):
        chosen = torch.cat([logits[i][masks[i]].topk(2).indices.flatten() for i in (first, second)])
        shares.append(torch.bincount(chosen, minlength=5) / len(chosen))
    assert figures["expert_max_share"] == pytest.approx(sum(s.max().item() for s in shares) / 2, rel=1e-4)
    assert model.base_model.auxiliary.statistics.pop() == {}


def test_coefficient_0_runs_no_auxiliary_code(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("auxiliary code ran")

    for name in ("balance_loss", "router_z_loss", "add_auxiliary_loss"):
        monkeypatch.setattr(auxiliary if name == "add_auxiliary_loss" else routing, name, fail)
    model = perft(**dict.fromkeys(COEFS, 0.0))
    model(**batch(0)).loss.backward()
    off = gradients(model)
    reference = reference_gradients([batch(0)], [1.0], coefs=dict.fromkeys(COEFS, 0.0))
    assert all(torch.equal(off[n], reference[n]) for n in off)


def test_losses_are_the_hosts_own_in_training_and_evaluation():
    inputs = batch(0)
    model, plain = perft(), perft(**dict.fromkeys(COEFS, 0.0))
    assert torch.equal(model(**inputs).loss, plain(**inputs).loss)
    assert torch.equal(model.eval()(**inputs).loss, plain.eval()(**inputs).loss)


def test_a_row_of_padding_gives_neither_nan_nor_gradient():
    inputs = batch(0, padding=9)
    model = perft()
    model(**inputs).loss.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_a_sequence_split_inside_the_model_is_refused():
    model = perft()
    layer = next(m for m in model.modules() if isinstance(m, PerftLayer))
    model.base_model.auxiliary.current = auxiliary.ForwardPass(torch.ones(1, 8, dtype=torch.bool), 1.0, 1.0)
    with pytest.raises(RuntimeError, match="context or sequence parallelism"):
        layer(torch.randn(1, 4, 32))


def test_the_injected_gradient_is_exactly_the_scale():
    x, logits = torch.randn(3, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    forward_pass = auxiliary.ForwardPass(None, 1.0, 0.5)
    loss = routing.router_z_loss(logits)
    out = auxiliary.add_auxiliary_loss(x, loss, forward_pass)
    assert torch.equal(out, x)
    out.sum().backward()
    again = logits.detach().clone().requires_grad_()
    (0.5 * routing.router_z_loss(again)).backward()
    assert torch.equal(logits.grad, again.grad)
    assert torch.equal(x.grad, torch.ones(3))
