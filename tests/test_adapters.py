"""What every adapter of every method does alike: saving, loading, switching, leaving, batches and generation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tiny_adapters import BLOCKS, METHODS, config_of, families, randomised, trained
from tests.tiny_models import PAD, random_ids, tiny_model
from tests.tt_lora_moe.pools import save_experts, save_lora

KINDS = tuple(BLOCKS)
PAIRS = [(kind, family) for kind in KINDS for family in families(kind)]
# the same products in matrices of other shapes
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
IDS = random_ids(4, 9)

pytestmark = pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_kind_and_family = pytest.mark.parametrize(("kind", "family"), PAIRS)


@pytest.fixture(scope="module")
def experts_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, str]]]:
    """The experts of a pool, trained on that family's tiny model: two TT-LoRAs and, beside other layers, a LoRA."""
    folder, lora = tmp_path_factory.mktemp("experts"), {"target_modules": ["k_proj", "v_proj"]}
    entries = {
        family: save_experts(folder / family, family)[:2] + [save_lora(folder / family, "rte", family, **lora)]
        for family in ("llama", "mixtral")
    }
    return lambda family: entries.get(family, [])


@pytest.fixture
def adapted(experts_of: Callable[[str], list[dict[str, str]]]) -> Callable[..., PeftModel]:
    """Makes a trained adapter of a kind on the tiny model of a family: of its first, if none is given."""

    def make(kind: str, family: str | None = None, dtype: torch.dtype = torch.float32, **kwargs: Any) -> PeftModel:
        family = family or families(kind)[0]
        return trained(kind, tiny_model(family).to(dtype), experts_of(family), **kwargs)

    return make


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    return model(input_ids=ids, **kwargs).logits


def batch_of(kind: str, ids: Tensor = IDS) -> dict[str, Tensor]:
    """A batch to train on: the first three tokens are the prompt."""
    batch = {"input_ids": ids, "labels": torch.where(torch.arange(ids.shape[1]) < 3, -100, ids)}
    return batch | {"expert_labels": torch.tensor([0, 1, 2, 0])} if BLOCKS[kind][0] == "tt_lora_moe" else batch


def base_of(kind: str) -> torch.nn.Module:
    return tiny_model(families(kind)[0])


def state(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that attaching could leave behind, to be compared with ==."""
    return {
        "modules": [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "hooks": [
            (name, hooks, len(getattr(module, hooks)))
            for name, module in model.named_modules()
            for hooks in vars(module)
            if hooks.endswith("_hooks")
        ],
        "methods": [
            (name, attribute)
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            if callable(value)
        ],
    }


# ---------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kind_and_family
def test_saved_and_loaded_logits_are_bit_equal(kind, family, dtype, adapted, tmp_path):
    model = adapted(kind, family, dtype)
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(tiny_model(family).to(dtype), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny_model(family).to(dtype)))


@every_kind
def test_with_low_cpu_mem_usage_it_loads_the_same_and_stays_float32(kind, adapted, tmp_path):
    model = adapted(kind, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(kind).bfloat16(), tmp_path, low_cpu_mem_usage=True)
    own = [p for name, p in loaded.named_parameters() if model.base_model.prefix in name]
    assert own and {p.dtype for p in own} == {torch.float32}
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path, adapter_name="second", low_cpu_mem_usage=True)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(model))


@every_kind
def test_a_full_state_dict_loads_as_well(kind, adapted):
    model, other = adapted(kind), adapted(kind, seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def without(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != key}


# what is done to the tensors of a folder, one of which is `key`, and what the error says
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor], str], dict[str, Tensor]], str]] = {
    "partial": (without, "adapter tensors missing: {key}"),
    "foreign": (lambda tensors, key: tensors | {f"{key}_extra": torch.ones(2)}, "does not have: {key}_extra"),
    "of another shape": (lambda tensors, key: tensors | {key: tensors[key][:-1].clone()}, "{last}"),
    "empty": (lambda tensors, key: {}, "no tensor of a {type} adapter"),
    "of another method": (
        lambda tensors, key: {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
        "no tensor of a {type} adapter(.|\n)*lora_A",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
@every_kind
def test_a_broken_folder_raises_and_names_what_is_wrong(kind, how, adapted, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, (change, message) = load_file(file), BROKEN[how]
    # one tensor of each sort, in the last layer that has it
    for key in {name.rpartition(".")[2]: name for name in tensors}.values():
        save_file(change(tensors, key), file)
        named = {"key": key, "last": key.rpartition(".")[2], "type": BLOCKS[kind][0].upper()}
        with pytest.raises(RuntimeError, match=message.format(**named)):
            PeftModel.from_pretrained(base_of(kind), tmp_path)


@every_kind
def test_a_truncated_file_raises(kind, adapted, tmp_path):
    adapted(kind).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(Exception, match="(?i)incomplete|deserializing|header"):
        PeftModel.from_pretrained(base_of(kind), tmp_path)


@pytest.mark.parametrize("when", ["first", "in the middle", "last"])
@every_kind
def test_attaching_that_fails_leaves_the_base_as_it_was(kind, when, adapted, experts_of, monkeypatch):
    """Whatever raises: here there is no memory for a parameter, one of the first, of the last or between them."""
    setitem, made, fails_at = torch.nn.ParameterDict.__setitem__, [], None

    def counted(parameters: torch.nn.ParameterDict, name: str, value: Any) -> None:
        made.append(name)
        if len(made) == fails_at:
            raise MemoryError("no memory for a parameter")
        setitem(parameters, name, value)

    monkeypatch.setattr(torch.nn.ParameterDict, "__setitem__", counted)
    config = config_of(kind, experts_of(families(kind)[0]))
    get_peft_model(base_of(kind), copy.deepcopy(config))
    total = len(made)
    fails_at = {"first": 1, "in the middle": total // 2 + 1, "last": total}[when]
    base = base_of(kind)
    before, expected = state(base), logits(base)
    made.clear()
    with pytest.raises(MemoryError):
        get_peft_model(base, copy.deepcopy(config))
    assert state(base) == before
    assert torch.equal(logits(base), expected)
    monkeypatch.undo()
    assert torch.equal(logits(trained(kind, base, experts_of(families(kind)[0]))), logits(adapted(kind)))


# ------------------------------------------------------------------------------------ several adapters, switching off


@every_kind_and_family
def test_disabled_adapters_equal_the_base(kind, family, adapted):
    model, expected = adapted(kind, family), logits(tiny_model(family))
    acting = logits(model)
    assert not torch.allclose(acting, expected, **TOLERANCE)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), acting)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_one_method_load_switch_and_are_deleted(method, adapted, tmp_path):
    kinds = [kind for kind in KINDS if BLOCKS[kind][0] == method and "mixtral" in families(kind)]
    names, alone = [kind.replace(" ", "_") for kind in kinds], {}
    for seed, (name, kind) in enumerate(zip(names, kinds)):
        model = adapted(kind, "mixtral", seed=seed)
        model.save_pretrained(tmp_path / name)
        alone[name] = logits(model)
    first, *others = names
    model = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / first, adapter_name=first)
    for name in others:
        model.load_adapter(tmp_path / name, adapter_name=name)
    for name in reversed(names):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name])
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable and all(n.endswith(f".{name}") for n in trainable)
    model.set_adapter(names[-1])
    model.delete_adapter(first)
    assert not any(key.endswith(f".{first}") for key in model.state_dict())
    assert torch.equal(logits(model), alone[names[-1]])
    model.save_pretrained(tmp_path / "again", selected_adapters=[names[-1]])
    again = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "again" / names[-1])
    assert torch.equal(logits(again), alone[names[-1]])


@every_kind
def test_unload_gives_the_base_back_and_it_can_be_adapted_anew(kind, adapted, experts_of):
    base = base_of(kind)
    before, expected, experts = state(base), logits(base), experts_of(families(kind)[0])
    unloaded = trained(kind, base, experts).unload()
    without_grad = [(name, id(p), False, p.dtype) for name, p in unloaded.named_parameters()]
    assert state(unloaded) == before | {"parameters": without_grad}
    assert [entry[:2] for entry in without_grad] == [entry[:2] for entry in before["parameters"]]
    assert torch.equal(logits(unloaded), expected)
    assert torch.equal(logits(trained(kind, unloaded, experts, seed=3)), logits(adapted(kind, seed=3)))


@every_kind
def test_a_deep_copy_is_independent(kind, adapted):
    model = adapted(kind)
    twin = randomised(copy.deepcopy(model), seed=5)
    assert not torch.equal(logits(twin), logits(model))
    assert torch.equal(logits(model), logits(adapted(kind)))


@every_kind
def test_autocast_adapter_dtype_false_takes_the_bases_dtype_and_warns(kind, experts_of):
    config = config_of(kind, experts_of(families(kind)[0]))
    with pytest.warns(UserWarning, match="rates most updates of a router then round away"):
        model = get_peft_model(base_of(kind).bfloat16(), config, autocast_adapter_dtype=False)
    frozen_experts = {name for name, _ in model.named_parameters() if "ttmoe_cores" in name}
    assert {p.dtype for name, p in model.named_parameters() if name not in frozen_experts} == {torch.bfloat16}
    experts = get_peft_model(base_of(kind), config_of(kind, experts_of(families(kind)[0]))).state_dict()
    assert all(torch.equal(model.state_dict()[name], experts[name]) for name in frozen_experts)
    assert logits(model.eval()).dtype == torch.bfloat16


@every_kind
def test_adapters_that_are_to_be_added_up_are_refused_in_words(kind, adapted, experts_of):
    model = adapted(kind)
    model.add_adapter("second", config_of(kind, experts_of(families(kind)[0])))
    with pytest.raises(TypeError, match="add_weighted_adapter: adapters of type"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


@every_kind
def test_the_status_of_a_model_and_its_layers_is_as_with_lora(kind, adapted, experts_of):
    lora = get_peft_model(base_of(kind), LoraConfig(target_modules="all-linear"))
    lora.add_adapter("second", LoraConfig(target_modules="all-linear"))
    model = adapted(kind).train()
    model.add_adapter("second", config_of(kind, experts_of(families(kind)[0])))
    same = ("enabled", "active_adapters", "merged_adapters", "available_adapters", "devices", "quantization_backend")
    for name in ("default", "second"):
        for each in (lora, model):
            each.set_adapter(name)
        status, expected = model.get_model_status(), lora.get_model_status()
        for field in same:
            assert getattr(status, field) == getattr(expected, field), field
        trained = status.requires_grad[name]
        # the experts of a pool are frozen, its router is trained
        assert trained == ("irregular" if BLOCKS[kind][0] == "tt_lora_moe" else True)
        assert not status.requires_grad["second" if name == "default" else "default"]
        assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert status.num_adapter_layers == len(model.get_layer_status()) > 0
        for layer, of_lora in zip(model.get_layer_status(), lora.get_layer_status()):
            assert [getattr(layer, field) for field in same] == [getattr(of_lora, field) for field in same]
    with model.disable_adapter(), lora.disable_adapter():
        assert model.get_model_status().enabled is lora.get_model_status().enabled is False


@pytest.mark.parametrize("kind", ["tt_lora", "tt_lora_moe", "pt_moe"])
def test_a_base_whose_layer_is_on_the_disk_computes_as_one_in_memory(kind, adapted, experts_of, tmp_path):
    """PERFT refuses it (tests/perft/test_bases.py)."""
    base_of(kind).save_pretrained(tmp_path / "base")
    parts = {
        name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    }
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map={**parts, "model.layers.1": "disk"}, offload_folder=str(tmp_path / "offloaded")
    )
    model = trained(kind, base, experts_of(families(kind)[0]))
    assert torch.allclose(logits(model), logits(adapted(kind)), atol=1e-5)
    own = [p for name, p in model.named_parameters() if any(part in name for part in ("ttcore_", "ttmoe_", "ptmoe_"))]
    assert own and not any(p.is_meta for p in own)


@every_kind
def test_injection_without_a_peft_model_computes_the_same(kind, adapted, experts_of):
    torch.manual_seed(1)
    injected = inject_adapter_in_model(config_of(kind, experts_of(families(kind)[0])), base_of(kind))
    assert torch.equal(logits(randomised(injected.eval(), seed=1)), logits(adapted(kind)))


# --------------------------------------------------------------------------------------------------------- training


@every_kind_and_family
def test_training_moves_every_trainable_tensor_of_the_adapter_and_nothing_else(kind, family, adapted):
    model = adapted(kind, family).train()
    batch = batch_of(kind)
    model.base_model.measure_on([batch])
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trainable.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    assert trainable and all(model.base_model.prefix in name for name in trainable)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainable), name


@pytest.mark.parametrize("kind", ["perft", "tt_lora", "tt_lora_moe", "pt_moe"])
def test_a_compiled_model_computes_and_trains_as_the_model_itself(kind, adapted):
    model, batch = adapted(kind), batch_of(kind)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(model), **TOLERANCE)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    loss, compiled_loss = model(**batch).loss, compiled(**batch).loss
    torch.testing.assert_close(compiled_loss, loss, **TOLERANCE)
    gradients = torch.autograd.grad(loss, trainable)
    torch.testing.assert_close(torch.autograd.grad(compiled_loss, trainable), gradients, **TOLERANCE)


# ----------------------------------------------------------------------------------------------- batches, generation


@every_kind
def test_left_padded_equals_right_padded_equals_single(kind, adapted):
    model, row = adapted(kind), IDS[:1, :6]
    alone = logits(model, row)[0]
    for pad in ((3, 0), (0, 3)):
        mask = F.pad(torch.ones_like(row), pad)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = logits(model, F.pad(row, pad, value=PAD), attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(padded[0, pad[0] : pad[0] + 6], alone, **TOLERANCE)


@every_kind
def test_packed_equals_unpacked(kind, adapted):
    # Mixtral and Llama take the segments from the positions, GPT-2 does not
    family = "mixtral" if "mixtral" in families(kind) else families(kind)[0]
    if family == "gpt2":
        assert kind == "tt_lora Conv1D"  # reads no positions
        return
    model, rows = adapted(kind, family), [random_ids(1, 5, seed=1), random_ids(1, 8, seed=2)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = logits(model, torch.cat(rows, 1), position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed, torch.cat([logits(model, row) for row in rows], 1), **TOLERANCE)


@every_kind
def test_cached_generation_equals_uncached_and_batched_equals_single(kind, adapted):
    model = adapted(kind)
    short, long = random_ids(1, 4, seed=2), random_ids(1, 9, seed=3)
    ids = torch.cat([F.pad(short, (5, 0), value=PAD), long])
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), **kwargs)
    uncached = model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), use_cache=False, **kwargs)
    assert torch.equal(together, uncached)
    for row, prompt in enumerate((short, long)):
        alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **kwargs)
        assert torch.equal(together[row, -8:], alone[0, -8:])
