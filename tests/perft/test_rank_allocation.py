"""Ranks that move between experts: where they go, what stays the same, and what a Trainer and its checkpoints keep."""

import random

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer
from axolotl_moe_peft.perft.rank_allocation import active_slots, new_ranks
from axolotl_moe_peft.shared.model_card import describe
from tests.tiny_models import PAD, random_ids, tiny_model

PLAN = {"score": "gate", "max_rank": 6, "warmup_steps": 1, "every_steps": 1, "decay": 0.5}
SCORES = ("gate", "saliency")


def perft(family: str = "olmoe", plan: dict | None = None, **keys) -> PeftModel:
    settings = {"variant": "embedded", "rank": 3, "task_type": "CAUSAL_LM", **keys}
    torch.manual_seed(0)
    return get_peft_model(
        tiny_model(family), PerftConfig(rank_allocation={**PLAN, **(plan or {})}, **settings)
    ).train()


def layers_of(model) -> list[PerftLayer]:
    return [module for module in model.modules() if isinstance(module, PerftLayer)]


def stacks(layer: PerftLayer) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.perft_down["default"].detach().clone(), layer.perft_up["default"].detach().clone()


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def make_step(model, optimizer, allocation, number: int, seed: int = 0) -> bool:
    ids = random_ids(2, 12, seed)
    model(input_ids=ids, labels=ids).loss.backward()
    allocation.note_gradients()
    optimizer.step()
    optimizer.zero_grad()
    return allocation.step(number, optimizer)


# ------------------------------------------------------------------------------------------------------ where ranks go


@pytest.mark.parametrize(
    ("importance", "ranks", "max_rank", "expected"),
    [
        ([1, 2, 3, 4, 5], [2, 2, 2, 2, 2], 4, [0, 2, 2, 2, 4]),
        ([5, 4, 3, 2, 1], [2, 2, 2, 2, 2], 4, [4, 2, 2, 2, 0]),
        ([1, 2, 3, 4, 5], [2, 2, 2, 2, 2], 3, [1, 2, 2, 2, 3]),  # no room for more
        ([1, 2, 3, 4, 5], [0, 2, 2, 2, 4], 6, [0, 0, 2, 2, 6]),  # the least important that has some
        ([1, 2, 3, 4, 5], [0, 2, 2, 2, 4], 4, [0, 2, 2, 2, 4]),  # the most important is full
        ([1, 1, 1, 1, 1], [2, 2, 2, 2, 2], 4, [2, 2, 2, 2, 2]),  # nothing tells them apart
        (list(range(10)), [1] * 10, 2, [0, 0, *[1] * 6, 2, 2]),  # two of ten give and take
        ([1, 2], [3, 3], 6, [0, 6]),
    ],
)
def test_slots_go_from_the_least_to_the_most_important(importance, ranks, max_rank, expected):
    assert new_ranks(importance, ranks, max_rank, 0.2, 0.2) == expected


def test_no_move_changes_the_sum_or_leaves_the_bounds():
    rng = random.Random(0)
    for _ in range(500):
        count, max_rank = rng.randint(1, 12), rng.randint(1, 5)
        ranks = [rng.randint(0, max_rank) for _ in range(count)]
        importance = [rng.choice([0.0, 0.5, rng.random()]) for _ in range(count)]
        new = new_ranks(importance, ranks, max_rank, rng.choice([0.1, 0.5]), rng.choice([0.1, 0.5]))
        assert sum(new) == sum(ranks) and all(0 <= rank <= max_rank for rank in new)


# ----------------------------------------------------------------------------------------------------- how it computes


def test_a_new_adapter_is_that_of_the_rank_in_a_stack_with_room():
    model = perft()
    for layer in layers_of(model):
        down, up = stacks(layer)
        assert down.shape == (8, 6, 32) and up.shape == (8, 32, 6)
        assert active_slots(down).tolist() == [[True] * 3 + [False] * 3] * 8
        layer.perft_up["default"].data[..., :3].normal_()
    small = perft(plan={"max_rank": 4})
    for layer, other in zip(layers_of(small), layers_of(model)):
        layer.perft_down["default"].data[:, :3] = other.perft_down["default"].data[:, :3]
        layer.perft_up["default"].data[..., :3] = other.perft_up["default"].data[..., :3]
    ids = random_ids(2, 9)
    torch.testing.assert_close(small(ids).logits, model(ids).logits)  # the scale is that of the rank


@pytest.mark.parametrize("score", SCORES)
def test_slots_move_with_the_budget_and_in_new_directions(score):
    model = perft(plan={"score": score, "warmup_steps": 2})
    optimizer, allocation = optimizer_of(model), model.base_model.rank_allocation()
    assert not any(make_step(model, optimizer, allocation, number) for number in (1, 2))  # warm-up
    before = [stacks(layer) for layer in layers_of(model)]
    taken = [optimizer.state[layer.perft_down["default"]]["exp_avg"].clone() for layer in layers_of(model)]
    assert allocation.step(3, optimizer)
    for layer, (old_down, old_up), momentum in zip(layers_of(model), before, taken):
        down, up = stacks(layer)
        was, now = active_slots(old_down), active_slots(down)
        assert now.sum() == was.sum() == 8 * 3 and not torch.equal(was, now)
        assert now.sum(-1).max() <= 6
        importance = allocation.importance(layer.block.name)
        assert (importance[now.sum(-1) > 3].min() > importance[now.sum(-1) < 3].max()).item()
        freed, new = was & ~now, now & ~was
        assert (down[freed] == 0).all() and (up.transpose(1, 2)[freed | new] == 0).all()
        assert torch.equal(down[was & now], old_down[was & now])
        for expert in new.any(-1).nonzero().flatten().tolist():
            rows = down[expert, now[expert]]
            products = rows @ rows.T
            of_new = new[expert, now[expert]]
            others = products[of_new] - torch.diag_embed(products.diagonal())[of_new]
            assert others.abs().max() < 1e-5 < products.diagonal().min()
        for parameter, where in (
            ("perft_down", (freed | new).unsqueeze(-1)),
            ("perft_up", (freed | new).unsqueeze(1)),
        ):
            for name in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state[getattr(layer, parameter)["default"]][name]
                assert (state.masked_select(where) == 0).all()
        kept = (was & now).unsqueeze(-1)
        state = optimizer.state[layer.perft_down["default"]]["exp_avg"]
        assert torch.equal(state.masked_select(kept), momentum.masked_select(kept))


def test_what_is_not_active_stays_zero_and_what_is_new_learns():
    model = perft()
    optimizer, allocation = optimizer_of(model), model.base_model.rank_allocation()
    for number in (1, 2):
        make_step(model, optimizer, allocation, number)
    active = [active_slots(stacks(layer)[0]) for layer in layers_of(model)]
    for seed in range(3):
        ids = random_ids(2, 12, seed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, active_NR in zip(layers_of(model), active):
        down, up = stacks(layer)
        assert torch.equal(active_slots(down), active_NR)
        assert (up.transpose(1, 2)[~active_NR] == 0).all()
        grown = active_NR.sum(-1) > 3
        assert grown.any() and (up.transpose(1, 2)[grown][active_NR[grown]].abs().sum(-1) > 0).all()


def test_growing_changes_no_output():
    model, ids = perft(), random_ids(2, 12)
    optimizer, allocation = optimizer_of(model), model.base_model.rank_allocation()
    make_step(model, optimizer, allocation, 1)
    expected = model(ids).logits
    up = [stacks(layer)[1] for layer in layers_of(model)]
    allocation.step(2, optimizer)
    lost = 0
    for layer, old_up in zip(layers_of(model), up):  # give back what pruning took away
        down, new_up = stacks(layer)
        gone = (old_up != 0).any(1) & ~active_slots(down)
        lost += gone.sum()
        assert torch.equal(new_up.transpose(1, 2)[~gone], old_up.transpose(1, 2)[~gone])
    assert lost and not torch.equal(model(ids).logits, expected)  # hard pruning is seen


@pytest.mark.parametrize("expert_ids", [None, {f"model.layers.{i}.mlp": [6, 1, 4] for i in range(2)}])
def test_use_is_the_sum_of_the_base_routers_weights_of_real_tokens_with_decay(expert_ids):
    model = perft(expert_ids=expert_ids)
    allocation = model.base_model.rank_allocation()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    model.base_model.model.enable_input_require_grads()
    expected = [torch.zeros(8) for _ in range(2)]
    for number in (1, 2):
        expected = [0.5 * use for use in expected]
        for seed in (10 * number, 10 * number + 1):  # accumulated
            ids = random_ids(2, 12, seed)
            mask = torch.ones_like(ids)
            mask[0, 7:] = 0
            ids = ids.where(mask > 0, PAD)
            model(input_ids=ids, attention_mask=mask, labels=ids.where(mask > 0, -100)).loss.backward()
            with torch.no_grad(), model.disable_adapter():
                logits = model.base_model.model(ids, attention_mask=mask, output_router_logits=True).router_logits
            for use, layer_logits in zip(expected, logits):
                weights, chosen = layer_logits.softmax(-1).topk(2)
                for t in mask.flatten().nonzero().flatten().tolist():
                    for weight, expert in zip(weights[t], chosen[t]):
                        use[expert] += weight
        allocation.note_gradients()
        allocation.step(number, optimizer)
    units = (expert_ids or {}).get("model.layers.0.mlp", list(range(8)))
    for i, use in enumerate(expected):
        torch.testing.assert_close(allocation.importance(f"model.layers.{i}.mlp"), use[units], rtol=1e-4, atol=1e-5)


def test_saliency_is_use_times_the_mean_of_gradient_times_weight():
    model = perft(plan={"score": "saliency", "warmup_steps": 9})
    for layer in layers_of(model):
        layer.perft_up["default"].data[..., :3].normal_()
    allocation, optimizer = model.base_model.rank_allocation(), optimizer_of(model)
    ids = random_ids(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = []
    for layer in layers_of(model):
        (down, up), use = stacks(layer), layer._use["default"].clone()
        down_grad, up_grad = layer.perft_down["default"].grad, layer.perft_up["default"].grad
        of_slots = torch.zeros(8, 3)
        for expert in range(8):
            for slot in range(3):
                of_slots[expert, slot] += (down[expert, slot] * down_grad[expert, slot]).abs().sum()
                of_slots[expert, slot] += (up[expert, :, slot] * up_grad[expert, :, slot]).abs().sum()
        expected.append(use * of_slots.mean(-1))
    allocation.note_gradients()
    allocation.step(1, optimizer)
    for layer, importance in zip(layers_of(model), expected):
        assert importance.max() > 0
        torch.testing.assert_close(allocation.importance(layer.block.name), importance)


# -------------------------------------------------------------------------------------------- Trainers and checkpoints


def trainer(model, folder, steps: int, **arguments) -> Trainer:
    rows = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_ids(16, 10)])
    settings = {"max_steps": steps, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    settings |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True}
    return Trainer(model=model, args=TrainingArguments(str(folder), **settings | arguments), train_dataset=rows)


@pytest.mark.parametrize("score", SCORES)
def test_a_trainer_moves_them_and_goes_on_from_its_checkpoint_exactly(score, tmp_path):
    straight = perft(plan={"score": score, "every_steps": 2})
    trainer(straight, tmp_path / "straight", 6).train()
    assert any(active_slots(stacks(layer)[0]).sum(-1).max() > 3 for layer in layers_of(straight))
    resumed = perft(plan={"score": score, "every_steps": 2})
    trainer(resumed, tmp_path / "resumed", 6).train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    for layer, other in zip(layers_of(resumed), layers_of(straight)):
        for tensor, expected in zip(stacks(layer), stacks(other)):
            assert torch.equal(tensor, expected)


def test_an_optimiser_without_states_of_single_weights_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="the optimiser's state exp_avg_sq_row has the shape .* starts? anew"):
        trainer(perft(), tmp_path, 2, optim="adafactor").train()


def test_the_saved_adapter_has_its_ranks(tmp_path):
    model = perft()
    optimizer, allocation = optimizer_of(model), model.base_model.rank_allocation()
    for number in (1, 2):
        make_step(model, optimizer, allocation, number)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path)
    ids = random_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert "rank: 3 on average, up to 6" in describe(loaded)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variant": "single"}, "rank_allocation: .* means nothing with variant: single"),
        ({"expert_type": "parallel_adapter"}, "means nothing with expert_type: parallel_adapter"),
        ({"rank_allocation": {"scores": "gate"}}, "'scores' is no key of it; the keys are score, prune"),
        ({"rank_allocation": "gate"}, "'gate' is not allowed; it is a block like {score: gate}"),
        ({"rank_allocation": {"score": "norm"}}, "score: 'norm' is not known; use gate or saliency"),
        ({"rank_allocation": {"prune": 0}}, "prune: 0 is not allowed"),
        ({"rank_allocation": {"grow": 0.6}}, "grow: 0.6 is not allowed"),
        ({"rank_allocation": {"decay": 1.5}}, "decay: 1.5 is not allowed"),
        ({"rank_allocation": {"max_rank": 3}}, "max_rank: 3 is not allowed; it is an integer of at least 4"),
        ({"rank_allocation": {"every_steps": 0}}, "every_steps: 0 is not allowed"),
        ({"rank_allocation": {"until": 0}}, "until: 0 is not allowed"),
        ({"rank_allocation": {"max_rank": 33}}, "33 directions cannot be orthogonal in model.layers.0.mlp"),
    ],
)
def test_what_cannot_be_right_is_refused(keys, message):
    settings = {"variant": "embedded", "rank": 3, "rank_allocation": {"score": "gate"}, "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_model("olmoe"), PerftConfig(**settings | keys))


def test_steps_before_and_after_the_span_move_nothing():
    model = perft(plan={"warmup_steps": 2, "every_steps": 2, "until": 6})
    optimizer, allocation = optimizer_of(model), model.base_model.rank_allocation()
    moved = [number for number in range(1, 10) if make_step(model, optimizer, allocation, number, seed=number)]
    assert moved and set(moved) <= {4, 6}
