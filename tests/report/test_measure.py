"""What a pass counts of the routers, against loops over single rows that compute the choices themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from axolotl_moe_peft.perft.layer import PerftLayer
from axolotl_moe_peft.report.measure import Processes, Row, measure
from axolotl_moe_peft.shared.choice_counts import divergence, typical_words
from tests.tiny_adapters import trained
from tests.tiny_models import random_ids, tiny_model
from tests.tt_lora_moe.pools import save_experts

DATASETS = ("maths", "law")
LENGTHS = (9, 17, 5, 12, 30, 7, 21)


def some_rows() -> list[Row]:
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = random_ids(1, length, seed=i)[0].tolist()
        prompt = length // 2
        rows.append(Row(ids, [-100] * prompt + ids[prompt:], i % 2, i % 2))
    return rows


def report(model: PeftModel, rows: list[Row], tokens_per_batch: int = 64, **settings: Any) -> dict[str, Any]:
    return measure(model, rows, DATASETS, str, tokens_per_batch=tokens_per_batch, **settings)


def of(found: dict[str, Any], whose: str) -> dict[str, Any]:
    (router,) = [router for router in found["routers"] if router["of"] == whose]
    return router


def choices(router: dict[str, Any]) -> Tensor:
    """(layers, datasets, experts)."""
    return torch.tensor([layer["choices"] for layer in router["layers"]])


def count(by_layer: dict[str, list[Tensor]], rows: list[Row], num_experts: int) -> Tensor:
    """The same from each row's indices (T, K), in one list a layer."""
    counts = torch.zeros(len(by_layer), len(DATASETS), num_experts, dtype=torch.int64)
    for layer, indices in enumerate(by_layer.values()):
        for row, indices_TK in zip(rows, indices, strict=True):
            for expert in indices_TK.flatten().tolist():
                counts[layer, row.dataset, expert] += 1
    return counts


def watch(module: torch.nn.Module, router: Tensor, top_k: int) -> list[Tensor]:
    """The choices by which softmax and top-k route what goes into a module."""
    seen: list[Tensor] = []

    def note(module: torch.nn.Module, args: tuple) -> None:
        x_TD = args[0].flatten(0, -2)
        seen.append((x_TD @ router.T).softmax(-1).topk(top_k).indices)

    module.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("kind", ["perft", "perft embedded", "perft dense"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_perft(kind: str, family: str) -> None:
    base = tiny_model(family)
    gates = {name: module for name, module in base.named_modules() if name.endswith(".gate")}
    model, rows = trained(kind, base, []), some_rows()
    found = report(model, rows)
    assert found["hidden"] == []
    own = {name: m for name, m in model.named_modules() if isinstance(m, PerftLayer)}
    seen = {name: watch(m, m.perft_router["default"], 2) for name, m in own.items() if "default" in m.perft_router}
    of_base = {name: watch(gate, gate.weight, 2) for name, gate in gates.items()}
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row.input_ids]))
    num_experts = next(iter(gates.values())).weight.shape[0]
    assert torch.equal(choices(of(found, "base")), count(of_base, rows, num_experts))
    assert of(found, "base")["layers"][1]["block"] == "model.layers.1.mlp"
    assert [layer["layer"] for layer in of(found, "base")["layers"]] == [0, 1]
    assert [router["of"] for router in found["routers"]] == (["adapter", "base"] if seen else ["base"])
    typical = of(found, "adapter" if seen else "base")["layers"][0]["typical_tokens"]
    assert len(typical) == (8 if seen else num_experts)
    if seen:
        assert torch.equal(choices(of(found, "adapter")), count(seen, rows, 8))
        first = next(iter(seen.values()))
        for expert, tokens in enumerate(typical):
            for entry in tokens:
                tokens_and_choices = [pair for row, i in zip(rows, first) for pair in zip(row.input_ids, i)]
                of_token = [k.tolist() for token, k in tokens_and_choices if str([token]) == entry["token"]]
                assert entry["count"] == sum(k.count(expert) for k in of_token)
                assert entry["share"] == pytest.approx(entry["count"] / (2 * len(of_token)), abs=1e-6)
    assert found["datasets"] == [
        {"name": name, "rows": len(LENGTHS[i::2]), "tokens": sum(LENGTHS[i::2])} for i, name in enumerate(DATASETS)
    ]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("kind", ["pt_moe", "pt_moe top 2"])
def test_pt_moe(kind: str, family: str) -> None:
    model, rows = trained(kind, tiny_model(family), []), some_rows()
    found = report(model, rows)
    layer = model.get_base_model().get_decoder().soft_prompt
    top_k = layer.ptmoe_config["default"].top_k
    chosen, probabilities = [], torch.zeros(2, 3)
    for row in rows:
        prompt = torch.tensor(row.input_ids[: len(row.input_ids) // 2])
        mean = model.get_input_embeddings()(prompt).mean(0)
        weights = (layer.ptmoe_router_weight["default"] @ mean + layer.ptmoe_router_bias["default"]).softmax(-1)
        chosen.append(weights.topk(top_k).indices.unsqueeze(0))
        probabilities[row.dataset] += weights.detach()
    router = of(found, "adapter")
    assert torch.equal(choices(router), count({"prompt": chosen}, rows, 3))
    rows_of = torch.tensor([[4.0], [3.0]])
    torch.testing.assert_close(torch.tensor(router["probabilities"]), probabilities / rows_of, atol=1e-5, rtol=0)
    assert router["unit"] == "prompt"
    for expert, prompts in enumerate(router["typical_prompts"]):
        sent = [i for i, indices in enumerate(chosen) if indices[0, 0] == expert]
        assert len(prompts) == min(len(sent), 5)
        texts = {str(rows[i].input_ids[: len(rows[i].input_ids) // 2])[:200] for i in sent}
        assert {prompt["text"] for prompt in prompts} <= texts
    if family == "mixtral":  # the base's routers see the prompt's positions, which are no tokens of a dataset
        gates = {name: m for name, m in model.named_modules() if name.endswith(".gate")}
        of_base = {name: watch(gate, gate.weight, 2) for name, gate in gates.items()}
        with torch.no_grad():
            for row in rows:
                model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels]))
        count_of_prompt = layer.ptmoe_config["default"].num_virtual_tokens
        of_text = {name: [indices[count_of_prompt:] for indices in seen] for name, seen in of_base.items()}
        assert torch.equal(choices(of(found, "base")), count(of_text, rows, 4))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_tt_lora_moe(family: str, tmp_path: Path) -> None:
    base, experts = tiny_model(family), save_experts(tmp_path, family, "ab")
    model, rows = trained("tt_lora_moe", base, experts), some_rows()
    found = report(model, rows)
    router, weight = of(found, "adapter"), base.prompt_router.ttmoe_weight["default"]
    confusion, confidence = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 10, dtype=torch.int64)
    with torch.no_grad(), model.disable_adapter():
        for row in rows:
            prompt = torch.tensor([row.input_ids[: len(row.input_ids) // 2]])
            probabilities = (weight @ base.model(prompt).last_hidden_state[0, -1]).softmax(-1)
            confusion[row.expert, probabilities.argmax()] += 1
            confidence[row.dataset, min(int(probabilities.max() * 10), 9)] += 1
    assert router["experts"] == ["a", "b"]
    assert router["confusion"] == confusion.tolist() == choices(router)[0].tolist()
    assert router["confidence"] == confidence.tolist()


def test_padding_batches_and_processes_change_nothing() -> None:
    model, rows = trained("perft", tiny_model("olmoe"), []).train(), some_rows()
    whole = report(model, rows, tokens_per_batch=10_000)
    assert whole == report(model, rows, tokens_per_batch=1)
    assert model.training


@pytest.mark.parametrize(
    "tokens_per_batch", [64, 1]
)  # with one row a batch one process has a call for the other's sake
@pytest.mark.parametrize("kind", ["perft", "pt_moe"])
def test_two_processes_have_together_what_one_has(kind: str, tokens_per_batch: int) -> None:
    model, rows = trained(kind, tiny_model("mixtral"), []), some_rows()
    tensors: list[Tensor] = []  # of the first process, then added to the second's
    decisions: list[Any] = []
    settings = {"tokens_per_batch": tokens_per_batch}
    first = Processes(0, 2, lambda t: tensors.append(t) or t, lambda d: decisions.extend(d) or d)
    second = Processes(1, 2, lambda t: t + tensors.pop(0), lambda d: decisions + d)
    whole, part = report(model, rows, **settings), report(model, rows, **settings, processes=first)
    assert report(model, rows, **settings, processes=second) == whole != part


def test_each_process_calls_as_often_as_the_others() -> None:
    model, rows, calls = trained("perft", tiny_model("olmoe"), []), some_rows()[:3], [0, 0]
    for index in range(2):

        def call(**batch: Tensor) -> None:
            calls[index] += 1
            model(**batch)

        report(model, rows, tokens_per_batch=1, call=call, processes=Processes(index, 2))
    assert calls == [2, 2]


def test_compiled_models_run_eagerly() -> None:
    model, rows = trained("perft", tiny_model("olmoe"), []), some_rows()
    compiled = torch.compile(model, backend="eager")
    compiled(random_ids(2, 8))
    assert report(model, rows, call=compiled) == report(model, rows)


def test_without_any_router() -> None:
    model = trained("pt_moe one prompt", tiny_model("llama"), [])
    with pytest.raises(ValueError, match="neither the adapter nor the base model has a router"):
        report(model, some_rows())
    with pytest.raises(ValueError, match="no rows"):
        report(model, [])


def test_what_all_prompts_begin_with_is_left_out() -> None:
    model = trained("pt_moe", tiny_model("llama"), [])
    system, answer = [7, 8], [9]
    rows = [Row(system + [10 + i] + answer, [-100] * 3 + answer, 0) for i in range(3)]
    texts = [p["text"] for prompts in of(report(model, rows), "adapter")["typical_prompts"] for p in prompts]
    assert sorted(texts) == ["[10]", "[11]", "[12]"]
    texts = [p["text"] for prompts in of(report(model, rows[:1]), "adapter")["typical_prompts"] for p in prompts]
    assert texts == ["[7, 8, 10]"]


def test_divergence() -> None:
    assert divergence(torch.tensor([[5, 0], [0, 1]])) == 1
    assert divergence(torch.tensor([[5, 1], [10, 2]])) == pytest.approx(0, abs=1e-12)
    assert divergence(torch.tensor([[3, 1], [0, 0]])) == 0
    p, q = (0.75, 0.25), (0.25, 0.75)
    entropy = -sum(x * math.log(x) for x in p)
    assert divergence(torch.tensor([[3, 1], [1, 3]])) == pytest.approx((math.log(2) - entropy) / math.log(2))
    assert sum(q) == 1


def test_typical_words() -> None:
    # of 20 choices 10 were of expert 0: row 1 went there alone, row 0 mostly, row 2 as all do, row 3 never
    counts = torch.tensor([[6, 2], [2, 0], [2, 2], [0, 6]])
    found = typical_words(counts, 0, 3)
    assert found == [(0, 6, 0.75), (1, 2, 1.0)]
    assert typical_words(counts, 0, 1) == found[:1]
