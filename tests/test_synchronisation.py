"""No step waits for an accelerator: on the meta device, which has no elements to wait for, and counted on a CPU."""

import pytest
import torch
from peft import get_peft_model

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig, TTLoraMoeConfig
from axolotl_moe_peft.perft import units
from axolotl_moe_peft.perft.dispatch import BlockedSlots, GroupedSlots
from tests.synchronisation import host_reads
from tests.tiny_models import random_ids, tiny_config, tiny_model
from tests.tt_lora_moe.pools import save_experts

WIDTH = 256
# of a micro-batch, whatever the number of layers: how many sequences and prompts there are and where, which experts
MOST_A_BATCH = {"pt_moe": 4, "tt_lora_moe": 5}
WAYS = {"gated": None, "grouped": GroupedSlots, "blocked": BlockedSlots}
PERFT = {
    "routed": {"num_experts": 8, "num_experts_per_tok": 2, "router_z_loss_coef": 0.1},
    "embedded": {},
    "embedded in some experts": {
        "variant": "embedded",
        "expert_ids": {f"model.layers.{i}.mlp": [0, 3, 5] for i in range(2)},
    },
    "embedded with ranks that move": {"variant": "embedded", "rank_allocation": {"score": "gate"}},
    "dense": {"num_experts": 3},
    "single": {"expert_type": "parallel_adapter"},
}
CHOOSING = ("routed", "embedded", "embedded in some experts", "embedded with ranks that move")


def reads_of_a_step(family, config):
    """What would wait in a step on an accelerator, beyond what does in one of the base."""
    found = []
    for adapted in (False, True):
        with torch.device("meta"):
            base = type(tiny_model(family))._from_config(
                tiny_config(family, hidden_size=WIDTH),
                dtype=torch.bfloat16,
                attn_implementation="eager",  # the others look whether the mask has padding
                **({} if family == "llama" else {"experts_implementation": "batched_mm"}),
            )
        base.requires_grad_(False).enable_input_require_grads()
        model = (get_peft_model(base, config) if adapted else base).train()
        ids = torch.zeros(2, 16, dtype=torch.int64, device="meta")
        with host_reads("meta") as reads:
            for mask in (None, torch.ones_like(ids)):
                model(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        found.append(reads.found)
    return found[1] - found[0]


@pytest.mark.parametrize(
    ("variant", "dropout", "way"),
    [
        *((variant, dropout, way) for variant in CHOOSING for dropout in (0.0, 0.1) for way in WAYS),
        *((variant, dropout, "gated") for variant in ("dense", "single") for dropout in (0.0, 0.1)),
    ],
)
def test_perft_never_waits(monkeypatch, variant, dropout, way):
    """Nor are there strides or alignments of operands that a grouped product would refuse."""
    if way == "gated" and dropout and variant in CHOOSING:
        return  # never chosen
    monkeypatch.setattr(units, "slots_for", lambda *_: WAYS[way])
    keys = {"variant": variant, **PERFT[variant]}
    config = PerftConfig(rank=5, dropout=dropout, task_type="CAUSAL_LM", **keys)
    assert not reads_of_a_step("olmoe", config)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_tt_lora_never_waits(dropout):
    config = TTLoraConfig(rank=5, target_modules="all-linear", dropout=dropout, task_type="CAUSAL_LM")
    assert not reads_of_a_step("llama", config)


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("method", MOST_A_BATCH)
def test_what_chooses_for_a_sequence_waits_a_few_times_a_batch_and_in_no_layer(method, evaluation, tmp_path):
    ids, counts = random_ids(4, 12), []
    labels = ids.clone()
    labels[:, :5] = -100
    for num_layers in (2, 4):
        base = tiny_model("llama", num_hidden_layers=num_layers)
        if method == "pt_moe":
            config = PTMoeConfig(num_virtual_tokens=4, num_experts=3, rank=3, task_type="CAUSAL_LM")
            model, batch = get_peft_model(base, config), {}
        else:
            experts = save_experts(tmp_path / str(num_layers), "llama", num_hidden_layers=num_layers)
            model = get_peft_model(base, TTLoraMoeConfig(experts=experts, task_type="CAUSAL_LM"))
            batch = {"expert_labels": torch.tensor([0, 1, 0, 1])}
        model.train(not evaluation)
        model(input_ids=ids, labels=labels, **batch)  # what is looked at once in a model's life
        with host_reads("cpu") as bare:
            base_model = tiny_model("llama", num_hidden_layers=num_layers).train(not evaluation)
            base_model(input_ids=ids, labels=labels)
        with host_reads("cpu") as reads:
            loss = model(input_ids=ids, labels=labels, **batch).loss
            if not evaluation:
                loss.backward()
        counts.append((reads.found - bare.found).total())
    assert counts[0] == counts[1] <= MOST_A_BATCH[method], reads.found
