"""A router that reads what prompts do not have in common: what is subtracted, and what that makes of prompts."""

import os

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard

from axolotl_moe_peft.pt_moe.layer import MEAN_OF
from tests.pt_moe.prompts import config, layer_of
from tests.tiny_models import random_ids, tiny_model

PROMPT = 4


def new(**kwargs) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), config("centered", **kwargs))
    layer_of(model).without_text.clear()
    return model.train()


def batch(seed: int, rows: int = 2) -> dict[str, torch.Tensor]:
    ids = random_ids(rows, 9, seed)
    return {"input_ids": ids, "labels": torch.where(torch.arange(9) < PROMPT, -100, ids)}


def plain_mean(model: PeftModel, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    ids = torch.cat([b["input_ids"][:, :PROMPT] for b in batches])
    return model.get_input_embeddings()(ids).mean((0, 1)).detach()


def mean_of(model: PeftModel) -> torch.Tensor:
    return layer_of(model).ptmoe_router_mean["default"]


def test_without_data_the_first_prompts_of_training_are_measured():
    model, batches = new(), [batch(seed, rows=64) for seed in range(6)]
    for i, call in enumerate(batches):
        model(**call)
        torch.testing.assert_close(mean_of(model), plain_mean(model, batches[: min(i + 1, MEAN_OF // 64)]))


@pytest.mark.parametrize("how", ["evaluation", "no gradients", "frozen"])
def test_nothing_is_measured_where_nothing_is_learnt(how):
    model = new()
    if how == "evaluation":
        model.eval()
    if how == "frozen":
        model.requires_grad_(False)
    with torch.set_grad_enabled(how != "no gradients"):
        model(**batch(0))
    assert not mean_of(model).any() and not layer_of(model).ptmoe_router_mean_count["default"].any()


def test_what_is_measured_before_stays():
    model, batches = new(), [batch(seed) for seed in range(3)]
    model.base_model.measure_on(batches)
    expected = plain_mean(model, batches)
    torch.testing.assert_close(mean_of(model), expected)
    model(**batch(7))
    model.base_model.measure_on([batch(8)])
    torch.testing.assert_close(mean_of(model), expected)


def test_an_interrupted_measurement_goes_on(tmp_path):
    straight, batches = new(), [batch(seed) for seed in range(3)]
    for call in batches:
        straight(**call)
    first = new()
    first(**batches[0])
    first.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True).train()
    for call in batches[1:]:
        resumed(**call)
    torch.testing.assert_close(mean_of(resumed), mean_of(straight), rtol=0, atol=0)


def test_unlike_prompts_start_with_unlike_experts_and_alike_ones_with_the_same():
    """Embeddings that are nearly the same for all prompts, as those of chats are."""
    shares = {}
    for center in (True, False):
        model = new(center_router_input=center)
        embeddings = model.get_input_embeddings().weight.data
        common = torch.randn(embeddings.shape[1], generator=torch.Generator().manual_seed(1))
        embeddings.copy_(0.1 * torch.nn.functional.normalize(embeddings, dim=-1) + common)
        call = batch(0, rows=32)
        call["input_ids"][:16, :PROMPT], call["input_ids"][16:, :PROMPT] = 5, 6
        model(**call)
        figures = model.base_model.statistics.pop()
        shares[center] = figures["expert_max_share"]
    assert shares == {True: 0.5, False: 1.0}


def measure_in_process(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = new()
    model(**batch(rank, rows=1 + 2 * rank))
    torch.save(mean_of(model).detach(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_prompts_of_all_processes_are_measured_on_the_way(tmp_path):
    torch.multiprocessing.spawn(measure_in_process, (str(tmp_path),), nprocs=2)
    expected = plain_mean(new(), [batch(0, rows=1), batch(1, rows=3)])
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


def sharded(model: PeftModel) -> PeftModel:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def test_a_sharded_model_has_to_be_measured_before(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = sharded(new())
        with pytest.raises(RuntimeError, match=r"measure_on\(batches\).*center_router_input: false"):
            model(**batch(0))
        measured = new()
        measured.base_model.measure_on([batch(0)])
        assert sharded(measured)(**batch(0)).loss.isfinite()
    finally:
        dist.destroy_process_group()
