"""Figures are means over layers and micro-batches, and every adapter's are its own."""

import pytest
import torch
from peft import get_peft_model

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.shared.statistics import RouterStatistics
from tests.tiny_models import random_ids, tiny_model


def test_a_layer_that_runs_twice_has_no_more_weight_than_another():
    statistics = RouterStatistics()
    figures = statistics.of("default")
    for layer, value in (("0", 1.0), ("1", 2.0), ("1", 4.0)):
        figures.record("router_aux_loss", layer, torch.tensor(value))
    assert statistics.pop() == {"router_aux_loss": 2.0}
    assert statistics.pop() == {}


def test_a_micro_batch_without_tokens_is_left_out_but_does_not_leave_other_processes_waiting():
    statistics, reduced = RouterStatistics(), []
    statistics.of("default").record("router_aux_loss", "0", torch.tensor(0.0), torch.tensor(False))
    assert statistics.pop(lambda tensor: (reduced.append(tensor), tensor)[1]) == {}
    assert len(reduced) == 1


def test_experts_that_are_added_meet_no_other_shapes():
    statistics = RouterStatistics()
    figures = statistics.of("default")
    figures.record_usage("0", torch.tensor([3.0, 1.0]))
    figures.record_by_expert("router_loss", torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), ["a", "b"])
    figures.record_usage("0", torch.tensor([0.0, 0.0, 4.0]))
    figures.record_by_expert("router_loss", torch.tensor([5.0]), torch.tensor([2]), ["a", "b", "c"])
    read = statistics.pop()
    assert read["expert_max_share"] == 0.5
    assert [read[f"router_loss{name}"] for name in ("", "/a", "/b", "/c")] == [3.0, 1.0, 3.0, 5.0]


def test_adapters_that_take_turns_have_figures_of_their_own():
    config = {"task_type": "CAUSAL_LM", "rank": 4, "num_experts_per_tok": 1}
    model = get_peft_model(tiny_model("mixtral"), PerftConfig(num_experts=3, **config), adapter_name="a")
    model.add_adapter("b", PerftConfig(num_experts=5, **config))
    ids = random_ids(1, 9)
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        model.train()(input_ids=ids, labels=ids)
        alone[name] = model.base_model.statistics.pop()
    for name in ("a", "b"):
        model.set_adapter(name)
        model.train()(input_ids=ids, labels=ids)
    both = model.base_model.statistics.pop()
    assert both == {f"{key}/{name}": pytest.approx(v) for name, own in alone.items() for key, v in own.items()}


def test_a_deleted_adapter_leaves_no_figures_to_one_of_its_name():
    config = {"task_type": "CAUSAL_LM", "rank": 4, "num_experts_per_tok": 1}
    ids = random_ids(1, 9)
    model = get_peft_model(tiny_model("mixtral"), PerftConfig(num_experts=3, **config), adapter_name="a")
    model.add_adapter("b", PerftConfig(num_experts=5, **config))
    model.set_adapter("b")
    model.train()(input_ids=ids, labels=ids)
    model.delete_adapter("b")
    assert model.base_model.statistics.pop() == {}
