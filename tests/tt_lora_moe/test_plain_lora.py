"""Plain LoRAs of PEFT in a pool: each computes what it does alone, beside TT-LoRAs and LoRAs of other layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from axolotl_moe_peft import TTLoraMoeConfig
from tests.tiny_models import PAD, random_ids, tiny_config, tiny_model
from tests.tt_lora_moe.pools import expert_model, pool_of, save_experts, save_lora

# rank, scale and layers each their own
LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16},
    "of_more_layers": {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
    "of_one_layer": {"r": 3, "target_modules": ["o_proj"], "layers_to_transform": [1]},
    "of_several_ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    "of_scales_not_above_0": {"lora_alpha": -4, "alpha_pattern": {"layers.0.self_attn.q_proj": 0}},
}
CONV1D: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "both_c_proj": {"target_modules": ["c_proj"], "fan_in_fan_out": True},
}
# float32, products of other shapes: each sequence alone, or beside others
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def save_pool(folder: Path, family: str = "llama") -> list[dict[str, str]]:
    """Two TT-LoRAs, and the LoRAs of that family."""
    loras, keys = (CONV1D, {"target_modules": ["c_attn"]}) if family == "gpt2" else (LORAS, {})
    entries = save_experts(folder, family, ("a", "b"), **keys)
    return entries + [save_lora(folder, name, family, **settings) for name, settings in loras.items()]


def choosing(model: peft.PeftModel, experts: list[int]) -> peft.PeftModel:
    """The pool with a router that chooses these experts for the rows of a batch, whatever is in them."""
    logits = nn.functional.one_hot(torch.tensor(experts), len(model.peft_config["default"].experts)).float()
    model.base_model.model.prompt_router.forward = lambda features, adapter_name: logits
    return model


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@torch.no_grad()
def test_losses_through_the_pool_are_those_of_each_adapter_alone(family, tmp_path):
    entries = save_pool(tmp_path, family)
    ids = random_ids(len(entries), 9)
    labels = torch.where(torch.arange(9) < 4, -100, ids)
    rows = [*range(len(entries))]
    model = choosing(pool_of(entries, family), rows)
    together = model(input_ids=ids, labels=labels).logits
    base = tiny_model(family)(input_ids=ids).logits
    for row, entry in enumerate(entries):
        batch = {"input_ids": ids[row : row + 1], "labels": labels[row : row + 1]}
        alone = expert_model(entry, family)(**batch)
        torch.testing.assert_close(together[row : row + 1], alone.logits, **TOLERANCE)
        assert (alone.logits - base[row : row + 1]).abs().max() > 0.01
        single = choosing(model, [row])(**batch)
        torch.testing.assert_close(single.loss, alone.loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(single.logits, alone.logits, **TOLERANCE)


def test_the_cores_are_a_and_b_bit_by_bit_and_their_number_is_the_loras(tmp_path):
    entry = save_lora(tmp_path, r=4)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    model = pool_of([entry])
    key = "base_model.model.model.layers.1.self_attn.v_proj"
    cores = model.base_model.model.model.layers[1].self_attn.v_proj.ttmoe_cores["default"]
    a_RI, b_OR = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
    assert torch.equal(cores, torch.cat([a_RI.T.flatten(), b_OR.T.flatten()]))
    assert cores.numel() == 4 * (32 + 16)
    total = sum(p.numel() for name, p in model.named_parameters() if "ttmoe_cores" in name)
    assert total == sum(t.numel() for t in tensors.values()) == 2 * 4 * (32 + 32 + 32 + 16)


def test_a_saved_pool_needs_the_folders_no_more(tmp_path):
    model = pool_of(save_pool(tmp_path))
    model.save_pretrained(tmp_path / "pool")
    for name in ("a", "b", *LORAS):
        shutil.rmtree(tmp_path / name)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "pool")
    ids = random_ids(6, 8)
    rows = [*range(6)]
    with torch.no_grad():
        assert torch.equal(choosing(model, rows)(input_ids=ids).logits, choosing(loaded, rows)(input_ids=ids).logits)
    again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "pool", is_trainable=True)
    assert all("prompt_router" in name for name, p in again.named_parameters() if p.requires_grad)


def test_a_trained_pool_takes_loras_of_layers_that_it_has_not_adapted(tmp_path):
    entries = save_pool(tmp_path)
    pool_of(entries[:2]).save_pretrained(tmp_path / "pool")
    before = load_file(tmp_path / "pool" / "adapter_model.safetensors")
    grown = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "pool", is_trainable=True)
    for entry in entries[2:]:
        grown.base_model.add_expert(**entry)
    grown.save_pretrained(tmp_path / "grown")
    after = load_file(tmp_path / "grown" / "adapter_model.safetensors")
    assert set(before) < set(after)
    for key, tensor in before.items():
        assert torch.equal(after[key][: len(tensor)], tensor), key
    at_once = pool_of(entries)
    at_once.base_model.model.prompt_router.load_state_dict(grown.base_model.model.prompt_router.state_dict())
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "grown")
    ids, rows = random_ids(6, 8), [*range(6)]
    with torch.no_grad():
        expected = choosing(at_once, rows)(input_ids=ids).logits
        assert torch.equal(choosing(grown.eval(), rows)(input_ids=ids).logits, expected)
        assert torch.equal(choosing(loaded, rows)(input_ids=ids).logits, expected)
        assert torch.equal(grown.unload()(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits)


@torch.no_grad()
def test_a_lora_of_a_classifier_brings_its_head(tmp_path):
    def base(num_labels: int, seed: int = 0) -> nn.Module:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=3))
        torch.manual_seed(seed)
        model.score = nn.Linear(32, num_labels, bias=False)
        model.config.num_labels = num_labels
        return model.eval()

    entries = []
    for name, classes in (("two", 2), ("three", 3)):
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(base(classes, seed=classes), config)
        model.save_pretrained(tmp_path / name)
        entries.append({"name": name, "path": str(tmp_path / name)})
    model = peft.get_peft_model(base(3), TTLoraMoeConfig(experts=entries, task_type="SEQ_CLS")).eval()
    ids = random_ids(2, 7)
    logits = choosing(model, [0, 1])(input_ids=ids).logits
    for row, (entry, classes) in enumerate(zip(entries, (2, 3))):
        alone = peft.PeftModel.from_pretrained(base(classes, seed=9), entry["path"]).eval()
        expected = alone(input_ids=ids[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row, :classes], expected, **TOLERANCE)


@torch.no_grad()
def test_padding_and_packing_change_nothing(tmp_path):
    model = pool_of(save_pool(tmp_path)[1:5])
    rows, experts = [random_ids(1, n, seed=n)[0] for n in (5, 8, 6, 7)], [0, 1, 2, 3]
    alone = [choosing(model, [e])(input_ids=row[None]).logits[0] for row, e in zip(rows, experts)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = choosing(model, experts)(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed.logits[0], torch.cat(alone), **TOLERANCE)
    ids = torch.stack([nn.functional.pad(row, (0, 8 - len(row)), value=PAD) for row in rows])
    padded = choosing(model, experts)(input_ids=ids, attention_mask=(ids != PAD).long()).logits
    for row, expected in zip(padded, alone):
        torch.testing.assert_close(row[: len(expected)], expected, **TOLERANCE)


def test_a_lora_of_all_linear_layers_of_a_dense_base(tmp_path):
    entry = save_lora(tmp_path, target_modules="all-linear")
    model, ids = pool_of([entry]), random_ids(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expert_model(entry)(input_ids=ids).logits, **TOLERANCE)
    assert len(model.base_model._chooser.layers) == 2 * 7


def _without(key: str) -> Any:
    return lambda tensors: {name: t for name, t in tensors.items() if key not in name}


# what is done to the settings, or to the tensors of the file, and what the error says
REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "DoRA": ({"use_dora": True}, None, "its use_dora: True makes it more than a plain LoRA"),
    "biases of the base": ({"bias": "lora_only"}, None, "its bias: 'lora_only' makes it more"),
    "biases of its own": ({"lora_bias": True}, None, "its lora_bias: True makes it more"),
    "tokens": ({"trainable_token_indices": [5]}, None, r"its trainable_token_indices: \[5\] makes it more"),
    "PiSSA": ({"init_lora_weights": "pissa"}, None, "init_lora_weights: 'pissa' has changed the base .* Save it as"),
    "embeddings": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        None,
        r"lora_embedding_A; a pool takes whole LoRAs of linear layers",
    ),
    "a module of the base": (
        {"modules_to_save": ["norm"]},
        lambda ts: {k: t + 1 for k, t in ts.items()},
        "of its own",
    ),
    "half of a pair": ({}, _without("layers.1.self_attn.q_proj.lora_B"), "q_proj.lora_B.weight is missing"),
    "the other half": ({}, _without("layers.1.self_attn.q_proj.lora_A"), "q_proj.lora_B.weight; a pool takes whole"),
    "another rank": (
        {},
        lambda tensors: {name: t[:2] if "lora_A" in name else t for name, t in tensors.items()},
        r"q_proj.lora_A.weight is \(2, 32\), this base model and the LoRA's rank need \(4, 32\)",
    ),
    "nothing": ({}, _without("lora_"), "it has no lora_A.weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_plain_lora_is_refused_with_the_reason(what, tmp_path):
    settings, change, message = REFUSED[what]
    entry = save_lora(tmp_path, **settings)
    if change:
        file = tmp_path / "lora" / "adapter_model.safetensors"
        tensors: dict[str, Tensor] = {name: t.clone() for name, t in change(load_file(file)).items()}
        save_file(tensors, file)
    base = tiny_model("llama")
    expected = base(input_ids=random_ids(1, 4)).logits
    with pytest.raises(ValueError, match=f"tt_lora_moe.experts: lora .*{message}"):
        peft.get_peft_model(base, TTLoraMoeConfig(experts=[entry]))
    assert torch.equal(base(input_ids=random_ids(1, 4)).logits, expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 1}, "no place for base_model.model.model.layers.1.self_attn.q_proj"),
        ({"hidden_size": 64}, r"q_proj.lora_A.weight is \(4, 32\), .* need \(4, 64\)"),
    ],
)
def test_a_lora_of_another_base_is_refused_with_the_difference(sizes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(tiny_model("llama", **sizes), TTLoraMoeConfig(experts=[save_lora(tmp_path)]))


def test_a_lora_of_a_base_of_another_name_is_refused(tmp_path):
    entry = save_lora(tmp_path)
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/another"}))
    base = tiny_model("llama")
    base.name_or_path = "org/this"
    with pytest.raises(ValueError, match="trained on the base model 'org/another', not 'org/this'"):
        peft.get_peft_model(base, TTLoraMoeConfig(experts=[entry]))
