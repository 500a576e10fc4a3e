"""Batches at the edge: one token, a row of padding alone, more experts than tokens, no supervised token."""

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig, TTLoraMoeConfig
from tests.tiny_models import PAD, random_ids, tiny_model
from tests.tt_lora_moe.pools import save_experts

MANY = 32  # experts: more than any batch here has tokens
ADAPTERS = {
    "perft": lambda _: PerftConfig(
        num_experts=MANY, rank=4, init="paper", router_aux_loss_coef=0.1, router_z_loss_coef=0.1
    ),
    "perft embedded": lambda _: PerftConfig(variant="embedded", rank=4, init="paper", base_router_aux_loss_coef=0.1),
    "perft dense": lambda _: PerftConfig(variant="dense", num_experts=3, rank=4, init="paper"),
    "tt_lora": lambda _: TTLoraConfig(alpha=100),
    "tt_lora_moe": lambda folder: TTLoraMoeConfig(experts=save_experts(folder, "mixtral"), router_noise=False),
    "pt_moe": lambda _: PTMoeConfig(
        num_virtual_tokens=3, num_experts=MANY, rank=3, router_aux_loss_coef=0.1, router_noise_std=0.0
    ),
}
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
pytestmark = pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")


def adapted(adapter: str, folder: Path) -> PeftModel:
    config = ADAPTERS[adapter](folder)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model("mixtral"), config).train()


def step(model: PeftModel, ids: torch.Tensor, supervised: int, **kwargs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a training step whose last `supervised` tokens have labels."""
    labels = ids.clone()
    labels[:, : ids.shape[1] - supervised] = -100
    if "attention_mask" in kwargs:
        labels[kwargs["attention_mask"] == 0] = -100
    if "TT_LORA_MOE" in str(model.peft_type):
        kwargs["expert_labels"] = torch.zeros(len(ids), 1, dtype=torch.long)
    out = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(max(supervised, 1)), **kwargs)
    assert out.loss.isfinite(), out.loss
    model.zero_grad()
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    # a parameter without a gradient is one that DDP waits for
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    return gradients


@pytest.mark.matrix("batches: of one token", "{adapter}")
@every_adapter
def test_a_batch_of_one_token_trains_and_is_computed(adapter, tmp_path):
    model = adapted(adapter, tmp_path)
    step(model, random_ids(1, 1), supervised=0)
    with torch.no_grad():
        assert model.eval()(input_ids=random_ids(1, 1)).logits.isfinite().all()


@pytest.mark.matrix("batches: with more experts than tokens", "{adapter}")
@every_adapter
def test_experts_without_tokens_have_gradients_of_zero(adapter, tmp_path):
    gradients = step(adapted(adapter, tmp_path), random_ids(1, 4), supervised=2)
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.matrix("batches: with a row of padding alone", "{adapter}")
@every_adapter
def test_a_row_of_padding_alone_changes_nothing(adapter, tmp_path):
    model = adapted(adapter, tmp_path)
    ids = random_ids(2, 8)
    ids[1] = PAD
    mask = torch.ones_like(ids)
    mask[1] = 0
    alone = step(model, ids[:1], supervised=3)
    beside = step(model, ids, supervised=3, attention_mask=mask)
    for name, gradient in alone.items():
        # float32 sums in another order
        torch.testing.assert_close(beside[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.matrix("batches: without a supervised token", "{adapter}")
@every_adapter
def test_a_batch_without_supervised_tokens_gives_no_nan(adapter, tmp_path):
    step(adapted(adapter, tmp_path), random_ids(2, 6), supervised=0)
