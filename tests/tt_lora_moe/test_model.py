"""TT-LoRA MoE in a model: each sequence gets its expert, and the router learns from prompts alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from axolotl_moe_peft import PerftConfig, TTLoraConfig, TTLoraMoeConfig
from axolotl_moe_peft.tt_lora_moe import TTLoraPoolLinear
from tests.tiny_models import PAD, random_ids, tiny_model
from tests.tt_lora_moe.pools import EXPERTS, expert_model, pool_of, save_experts

ROUTERS = ("base_hidden", "embedding_linear", "embedding_mlp")
# float32, products of other shapes: each sequence alone, or beside others
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return save_experts(tmp_path_factory.mktemp("experts"))


def supervised(ids: Tensor, prompt_length: int) -> Tensor:
    labels = ids.clone()
    labels[:, :prompt_length] = -100
    return labels


def chosen(model: peft.PeftModel, adapter_name: str = "default") -> list[int]:
    return model.base_model.chosen_experts[adapter_name].tolist()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@torch.no_grad()
def test_every_sequence_is_computed_by_its_own_expert(family, router, tmp_path):
    keys = {"target_modules": ["c_attn"]} if family == "gpt2" else {}
    names = ("a", "b", "c")
    entries = save_experts(tmp_path, family, names, rank=4, **keys)
    model = pool_of(entries, family, router=router)
    ids = random_ids(8, 9)
    logits = model(input_ids=ids).logits
    assert len(set(chosen(model))) > 1
    for row, expert in enumerate(chosen(model)):
        own = expert_model(entries[expert], family)(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(logits[row : row + 1], own, **TOLERANCE)
        alone = model(input_ids=ids[row : row + 1]).logits
        assert chosen(model) == [expert]
        torch.testing.assert_close(alone, own, **TOLERANCE)


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_left_padding_right_padding_and_single_rows_agree(router, entries):
    model = pool_of(entries, router=router)
    rows = [random_ids(1, length, seed=length)[0] for length in (4, 9, 6, 7, 5)]
    width = max(map(len, rows))
    right = torch.stack([F.pad(row, (0, width - len(row)), value=PAD) for row in rows])
    left = torch.stack([F.pad(row, (width - len(row), 0), value=PAD) for row in rows])
    for ids in (right, left):
        mask = torch.stack([F.pad(torch.ones(len(row)), (0, width - len(row))) for row in rows]).long()
        mask = mask if ids is right else mask.flip(1)
        # as generate does: positions count real tokens
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        picked = chosen(model)
        for row, (alone, expert) in enumerate(zip(rows, picked)):
            own = model(input_ids=alone[None]).logits[0]
            assert chosen(model) == [expert]
            torch.testing.assert_close(logits[row][mask[row].bool()], own, **TOLERANCE)
    assert len(set(picked)) > 1


def pack(rows: list[Tensor], prompt_lengths: list[int], filling: int) -> dict[str, Tensor]:
    """One packed row as the host lays it out: positions restart, padding is a segment of its own at the end."""
    lengths = [*map(len, rows), filling]
    labels = [torch.cat([torch.full((p,), -100), row[p:]]) for row, p in zip(rows, prompt_lengths)]
    return {
        "input_ids": torch.cat([*rows, torch.full((filling,), PAD)])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "labels": torch.cat([*labels, torch.full((filling,), -100)])[None],
    }


@pytest.mark.parametrize("router", ROUTERS)
def test_packed_equals_unpacked_in_loss_gradient_and_logits(router, entries):
    model = pool_of(entries, router=router, router_noise=False)
    rows, prompts = [random_ids(1, n, seed=n)[0] for n in (6, 9, 5, 7, 8)], [3, 4, 2, 6, 5]
    targets = [0, 1, 2, 1, 0]
    packed = pack(rows, prompts, filling=4)
    with torch.no_grad():
        logits = model(**packed, use_cache=False).logits[0]
        picked = chosen(model)
        start = 0
        for row, prompt, expert in zip(rows, prompts, picked):
            own = model(input_ids=row[None], labels=supervised(row[None], prompt)).logits[0]
            assert chosen(model) == [expert]
            torch.testing.assert_close(logits[start : start + len(row)], own, **TOLERANCE)
            start += len(row)
    assert len(set(picked)) > 1
    model.train()
    per_token = torch.cat([torch.full((len(row),), t) for row, t in zip(rows, targets)] + [torch.full((4,), -100)])
    loss = model(**packed, expert_labels=per_token[None]).loss
    loss.backward()
    packed_gradients = gradients_of(model)
    model.zero_grad()
    singles = [
        model(input_ids=row[None], labels=supervised(row[None], p), expert_labels=torch.tensor([t])).loss
        for row, p, t in zip(rows, prompts, targets)
    ]
    mean = torch.stack(singles).mean()
    mean.backward()
    torch.testing.assert_close(loss, mean, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-5, rtol=1e-4)


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_the_answer_does_not_change_the_routing(router, entries):
    model = pool_of(entries, router=router, router_noise=False)
    ids, other = random_ids(6, 10), random_ids(6, 10, seed=1)
    other[:, :5] = ids[:, :5]
    targets = torch.arange(6) % 3
    model(input_ids=ids, labels=supervised(ids, 5))
    expected = chosen(model)
    model(input_ids=other, labels=supervised(other, 5))
    assert chosen(model) == expected
    model(input_ids=ids[:, :5])  # what inference sees
    assert chosen(model) == expected
    losses = [model.train()(input_ids=x, labels=supervised(x, 5), expert_labels=targets).loss for x in (ids, other)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    whole = pool_of(entries, router=router, router_noise=False, router_input="sequence").train()
    losses = [whole(input_ids=x, labels=x, expert_labels=targets).loss for x in (ids, other)]
    assert (losses[0] - losses[1]).abs() > 1e-4


@pytest.mark.parametrize("noise", [False, True])
def test_the_loss_is_the_cross_entropy_of_the_router_on_frozen_features(noise, entries):
    model = pool_of(entries, router_noise=noise).train()
    ids, targets = random_ids(5, 8), torch.tensor([0, 1, 2, 2, 0])
    torch.manual_seed(3)
    output = model(input_ids=ids, labels=supervised(ids, 4), expert_labels=targets)
    output.loss.backward()

    base = tiny_model("llama")
    with torch.no_grad():
        hidden = base.model(ids).last_hidden_state
    router = model.base_model.model.prompt_router
    weight = router.ttmoe_weight["default"].detach().clone().requires_grad_()
    logits = hidden[:, 3] @ weight.T
    if noise:
        mean = hidden[:, :4].mean(1)
        std = F.softplus(mean @ router.ttmoe_noise_weight["default"].T + router.ttmoe_noise_bias["default"])
        torch.manual_seed(3)
        logits = logits + torch.randn(5, 3) * std.detach()
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(router.ttmoe_weight["default"].grad, weight.grad, atol=1e-5, rtol=1e-4)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(gradients_of(model))
    assert all("prompt_router" in name for name in gradients_of(model))


def test_a_training_step_is_one_pass_of_the_frozen_decoder_without_experts_or_lm_head(entries):
    model = pool_of(entries).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    base, calls = model.base_model.model, []
    base.model.register_forward_hook(lambda *args: calls.append(("decoder", torch.is_grad_enabled())))
    base.lm_head.register_forward_hook(lambda *args: calls.append(("lm_head", None)))
    for layer in base.modules():
        if isinstance(layer, TTLoraPoolLinear):
            layer._delta = lambda *args: pytest.fail("an expert ran in a training step")
    ids = random_ids(2, 6)
    model(input_ids=ids, labels=supervised(ids, 3), expert_labels=torch.tensor([0, 1])).loss.backward()
    assert calls == [("decoder", False)]
    assert not base.training


def test_noise_is_for_training_only_and_embedding_routers_need_no_pass_at_all(entries):
    ids, targets = random_ids(3, 6), torch.tensor([0, 1, 2])
    batch = {"input_ids": ids, "labels": supervised(ids, 3), "expert_labels": targets}
    model = pool_of(entries)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        assert model.train()(**batch).loss != model(**batch).loss
    quiet = pool_of(entries, router_noise=False).train()
    assert torch.equal(quiet(**batch).loss, quiet(**batch).loss)
    assert not any("noise" in name for name, _ in quiet.named_parameters())
    embedding = pool_of(entries, router="embedding_linear").train()
    embedding.base_model.model.model.layers[0].register_forward_hook(lambda *args: pytest.fail("a layer ran"))
    embedding(**batch).loss.backward()


def test_figures_are_those_of_all_sequences_and_of_each_expert(entries):
    model = pool_of(entries, router_noise=False)
    ids, targets = random_ids(6, 6), torch.tensor([0, 0, 1, 1, 1, -100])
    for mode, statistics in ((True, "statistics"), (False, "eval_statistics")):
        model.train(mode)
        with torch.no_grad():
            for part in (slice(0, 2), slice(2, 6)):  # two micro-batches of other sizes
                batch = {"input_ids": ids[part], "labels": supervised(ids[part], 3)}
                model(**batch, expert_labels=targets[part])
            figures = getattr(model.base_model, statistics).pop()
            model.eval()(input_ids=ids[:, :3])
        right = [p == t for p, t in zip(chosen(model), targets.tolist())]
        assert figures["router_accuracy"] == pytest.approx(sum(right[:5]) / 5)
        assert figures["router_accuracy/gsm8k"] == pytest.approx(sum(right[:2]) / 2)
        assert figures["router_accuracy/boolq"] == pytest.approx(sum(right[2:5]) / 3)
        assert "router_accuracy/rte" not in figures
        mean = 2 / 5 * figures["router_loss/gsm8k"] + 3 / 5 * figures["router_loss/boolq"]
        assert figures["router_loss"] == pytest.approx(mean)
        assert getattr(model.base_model, statistics).pop() == {}


@pytest.mark.parametrize("missing", ["labels", "expert_labels"])
def test_training_without_labels_says_what_is_missing(missing, entries):
    ids = random_ids(2, 6)
    batch = {"input_ids": ids, "labels": supervised(ids, 3), "expert_labels": torch.tensor([0, 1])}
    del batch[missing]
    with pytest.raises(ValueError, match=f"there are no `{missing}`.*`expert:`"):
        pool_of(entries).train()(**batch)


def test_an_empty_batch_gives_no_nan(entries):
    model = pool_of(entries).train()
    ids = torch.full((2, 4), PAD)
    loss = model(
        input_ids=ids,
        attention_mask=torch.zeros_like(ids),
        labels=torch.full_like(ids, -100),
        expert_labels=torch.tensor([0, 1]),
    ).loss
    loss.backward()
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients_of(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_saved_pool_is_complete_and_gives_the_same_bits(router, dtype, entries, tmp_path):
    folder = tmp_path / "pool"
    copies = [{"name": e["name"], "path": str(shutil.copytree(e["path"], tmp_path / e["name"]))} for e in entries]
    model = pool_of(copies, base=tiny_model("llama").to(dtype), router=router)
    model.save_pretrained(folder)
    for entry in copies:
        shutil.rmtree(entry["path"])
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama").to(dtype), folder)
    ids = random_ids(6, 8)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert len(set(chosen(loaded))) > 1
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    prefix = "base_model.model.model.layers.0.self_attn"
    counts = [counted(EXPERTS[name], "q_proj") for name in EXPERTS]
    assert tensors[f"{prefix}.q_proj.ttmoe_cores"].shape == (sum(counts),)
    width = 1024 if router == "embedding_mlp" else 32
    assert tensors["base_model.model.prompt_router.ttmoe_weight"].shape == (3, width)
    assert [e["name"] for e in json.loads((folder / "adapter_config.json").read_text())["experts"]] == list(EXPERTS)


def counted(keys: dict, module: str) -> int:
    """Parameters of one expert's module, counted on its own adapter."""
    model = peft.get_peft_model(tiny_model("llama"), TTLoraConfig(**keys, task_type="CAUSAL_LM"))
    layer = f"layers.0.self_attn.{module}.ttcore"
    return sum(p.numel() for name, p in model.named_parameters() if layer in name)


def test_the_config_of_a_saved_pool_alone_is_no_pool(entries, tmp_path):
    pool_of(entries).save_pretrained(tmp_path)
    model = peft.get_peft_model(tiny_model("llama"), TTLoraMoeConfig.from_pretrained(tmp_path)).eval()
    with pytest.raises(RuntimeError, match="were not loaded.*from_pretrained"):
        model(input_ids=random_ids(1, 4))


def test_adding_an_expert_keeps_the_others_and_the_trained_router(entries, tmp_path):
    whole = pool_of(entries[:2])
    with torch.no_grad():
        for p in whole.base_model.model.prompt_router.parameters():
            p.add_(torch.randn_like(p))  # trained
    whole.save_pretrained(tmp_path)
    before = load_file(tmp_path / "adapter_model.safetensors")
    grown = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    grown.base_model.add_expert(entries[2]["name"], entries[2]["path"])
    assert grown.peft_config["default"].expert_names == list(EXPERTS)
    trainable = {name for name, p in grown.named_parameters() if p.requires_grad}
    assert trainable and all("prompt_router" in name for name in trainable)
    grown.save_pretrained(tmp_path / "grown")
    after = load_file(tmp_path / "grown" / "adapter_model.safetensors")
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert torch.equal(after[key][: len(tensor)], tensor), key
    # the same pool as one that had all three from the start
    at_once = pool_of(entries)
    at_once.base_model.model.prompt_router.load_state_dict(grown.base_model.model.prompt_router.state_dict())
    ids = random_ids(8, 8)
    with torch.no_grad():
        assert torch.equal(at_once(input_ids=ids).logits, grown.eval()(input_ids=ids).logits)
    with pytest.raises(ValueError, match="has an expert 'rte' already"):
        grown.base_model.add_expert(entries[2]["name"], entries[2]["path"])


def test_merging_is_refused_with_the_reason(entries):
    model = pool_of(entries)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged: which expert acts is chosen for each sequence"):
            merge()


GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("how", GENERATION)
def test_cached_generation_equals_uncached_and_keeps_each_prompts_expert(how, entries):
    model = pool_of(entries)
    rows = [random_ids(1, length, seed=length)[0] for length in (4, 9, 6, 7)]
    ids = torch.stack([F.pad(row, (9 - len(row), 0), value=PAD) for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}

    def generate(**keys) -> Tensor:
        torch.manual_seed(5)
        return model.generate(**keys, **GENERATION[how], max_new_tokens=8, eos_token_id=-1)

    with torch.no_grad():
        cached, uncached = generate(**batch), generate(**batch, use_cache=False)
        assert torch.equal(cached, uncached)
        assert len(set(chosen(model))) > 1
        if how != "sampling":  # a batch draws other numbers
            for row, text in zip(rows, cached):
                assert torch.equal(generate(input_ids=row[None])[0, len(row) :], text[9:])


@torch.no_grad()
def test_interleaved_generations_keep_their_own_experts(entries):
    model = pool_of(entries)
    prompts = [random_ids(1, 6, seed=seed) for seed in range(8)]
    states = [model(input_ids=prompt, use_cache=True) for prompt in prompts]
    experts = []
    for prompt in prompts:
        model(input_ids=prompt)
        experts += chosen(model)
    assert len(set(experts)) > 1
    token = torch.tensor([[9]])
    for prompt, state, expert in zip(prompts, states, experts):
        logits = model(input_ids=token, past_key_values=state.past_key_values).logits
        whole = expert_model(entries[expert])(input_ids=torch.cat([prompt, token], 1)).logits[:, -1:]
        torch.testing.assert_close(logits, whole, **TOLERANCE)


@torch.no_grad()
def test_a_cache_without_known_experts_and_prompts_in_chunks_are_errors(entries):
    model = pool_of(entries)
    with model.disable_adapter():
        cache = model(input_ids=random_ids(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled with no experts, but now it is the experts of adapter"):
        model(input_ids=random_ids(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(input_ids=random_ids(1, 8), prefill_chunk_size=4, max_new_tokens=2)


def test_experts_that_do_not_fit_are_named_with_the_difference(entries, tmp_path):
    def attach(entry: dict, base=None) -> None:
        peft.get_peft_model(base or tiny_model("llama"), TTLoraMoeConfig(experts=[entries[0], entry]))

    def entry(name: str) -> dict:
        return {"name": name, "path": str(tmp_path / name)}

    with pytest.raises(ValueError, match=r"nowhere .*holds no adapter_config.json; give the folder"):
        attach(entry("nowhere"))
    peft.get_peft_model(tiny_model("mixtral"), PerftConfig()).save_pretrained(tmp_path / "perft")
    with pytest.raises(ValueError, match="perft .*type PERFT, not TT_LORA or LORA"):
        attach(entry("perft"))
    save_experts(tmp_path, names=["cut"])
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut .*cannot be taken as an expert"):
        attach(entry("cut"))
    file.unlink()
    with pytest.raises(ValueError, match="cut .*holds no adapter_model.safetensors"):
        attach(entry("cut"))
    wide = peft.get_peft_model(tiny_model("llama", hidden_size=48), TTLoraConfig(task_type="CAUSAL_LM"))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"wide .*q_proj.ttcore_in_\d is \(.*\), this base model needs \("):
        attach(entry("wide"))
    deep = peft.get_peft_model(tiny_model("llama", num_hidden_layers=3), TTLoraConfig(task_type="CAUSAL_LM"))
    deep.save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"deep .*has no place for base_model.model.model.layers.2"):
        attach(entry("deep"))
    config = Path(entries[1]["path"]) / "adapter_config.json"
    shutil.copytree(entries[1]["path"], tmp_path / "foreign")
    changed = json.loads(config.read_text()) | {"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (tmp_path / "foreign" / "adapter_config.json").write_text(json.dumps(changed))
    base = tiny_model("llama")
    base.name_or_path = "HuggingFaceTB/SmolLM2-135M"
    with pytest.raises(ValueError, match="foreign .*trained on the base model 'meta-llama/Llama-3.2-1B', not 'Hug"):
        attach(entry("foreign"), base)


@pytest.mark.parametrize(
    ("router", "per_expert", "fixed"),
    [("base_hidden", 4097, 0), ("embedding_linear", 4098, 0), ("embedding_mlp", 3074, 2_098_176)],
)
def test_router_counts_are_the_authors(router, per_expert, fixed, tmp_path):
    """At the width of Llama-3.2-1B, 17 experts: 69,649, 69,666 and 2,150,434."""
    config = LlamaConfig(hidden_size=2048, intermediate_size=8, num_hidden_layers=1, vocab_size=8)
    peft.get_peft_model(LlamaForCausalLM(config), TTLoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    entries = [{"name": f"e{e}", "path": str(tmp_path)} for e in range(17)]
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    model = peft.get_peft_model(base, TTLoraMoeConfig(experts=entries, router=router))
    assert model.get_nb_trainable_parameters()[0] == 17 * per_expert + fixed
    rows = {row.part: row.parameters for row in model.base_model.parameter_rows()}
    assert rows == {"router": 17 * per_expert + fixed, "other": 0}
    assert 17 * per_expert + fixed in (69_649, 69_666, 2_150_434)


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.ids, self.targets = random_ids(count, 8), torch.arange(count) % 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[i],
            "labels": supervised(self.ids[i : i + 1], 4)[0],
            "expert_labels": self.targets[i],
        }


def test_the_router_learns_in_transformers_trainer_and_accumulation_does_not_matter(entries, tmp_path):
    weights, base_state = [], tiny_model("llama").state_dict()
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = pool_of(entries, router_noise=False)
        torch.nn.init.zeros_(model.base_model.model.prompt_router.ttmoe_weight["default"])
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=30,
            learning_rate=0.3,
            lr_scheduler_type="constant",
            optim="sgd",  # Adam would not notice a wrong scale
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            max_grad_norm=0.0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(12))
        trainer.train()
        optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        trained = model.base_model.model.prompt_router.ttmoe_weight["default"]
        assert len(optimised) == 1 and optimised[0] is trained
        weights.append(trained.detach())
        model.base_model.statistics.pop()
        with torch.no_grad():
            rows = Rows(12)
            model.eval()(input_ids=rows.ids[:, :4])
        assert chosen(model) == rows.targets.tolist()
        state = model.unload().state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in base_state.items())
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-4)  # float32, other sums
