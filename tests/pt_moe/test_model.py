"""PTMoeModel through PEFT's public API: initialisation, saving, several adapters, switching off, refusals."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.pt_moe.prompts import FAMILIES, SETTINGS, T, config, layer_of, pt_moe, randomise_prompts
from tests.tiny_models import VOCAB_SIZE, random_ids, tiny_model


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pt_moe().save_pretrained(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------------------------- initialisation


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer, w3 .. w127 for its ids."""
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(path)
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w2").save_pretrained(path)
    return path


def started(base_folder: Path, setting: str = "pt_moe", **kwargs) -> PeftModel:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base, config(setting, **kwargs))
        model.eval()(random_ids(1, 4))  # here a text that is missing would show
    return model


def products(model: PeftModel, adapter_name: str = "default") -> Tensor:
    """The whole prompts of all experts, (N, T, D)."""
    layer = layer_of(model)
    experts, shared = layer.ptmoe_experts[adapter_name], layer.ptmoe_shared
    return (experts @ shared[adapter_name] if adapter_name in shared else experts).detach()


def embedded(model: PeftModel, *ids: int) -> Tensor:
    return model.get_input_embeddings()(torch.tensor(ids)).detach()


def test_without_rank_the_prompt_is_the_text_tiled_or_cut(base_folder):
    model = started(base_folder, "smop", init_text="w5 w6 w7")
    assert torch.equal(products(model), embedded(model, 5, 6, 7, 5, 6).expand(3, -1, -1))
    model = started(base_folder, "smop", init_text="w5 w6 w7 w8 w9 w10 w11")
    assert torch.equal(products(model), embedded(model, 5, 6, 7, 8, 9).expand(3, -1, -1))


def test_with_rank_it_is_the_best_approximation_and_balanced(base_folder):
    model = started(base_folder, init_text="w5 w6 w7 w8 w9")
    text = embedded(model, 5, 6, 7, 8, 9)
    u, s, vt = torch.linalg.svd(text, full_matrices=False)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    torch.testing.assert_close(products(model), best.expand(3, -1, -1), rtol=1e-4, atol=1e-6)
    layer = layer_of(model)
    expected = torch.diag(s[:4])  # A^T A = B B^T = S
    for gram in (
        layer.ptmoe_experts["default"][0].T @ layer.ptmoe_experts["default"][0],
        layer.ptmoe_shared["default"] @ layer.ptmoe_shared["default"].T,
    ):
        torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-6)


def test_each_expert_may_have_its_own_text(base_folder):
    texts = ["w5 w6 w7 w8 w9", "w10 w11", "w5 w6 w7 w8 w12"]
    model = started(base_folder, num_virtual_tokens=T, rank=5, init_text=texts)
    text = torch.stack([embedded(model, *i) for i in ((5, 6, 7, 8, 9), (10, 11, 10, 11, 10), (5, 6, 7, 8, 12))])
    u, s, vt = torch.linalg.svd(text.flatten(0, 1), full_matrices=False)
    best = ((u[:, :5] * s[:5]) @ vt[:5]).unflatten(0, (3, T))
    torch.testing.assert_close(products(model), best, rtol=1e-4, atol=1e-6)


def test_a_text_of_few_tokens_leaves_no_dead_direction(base_folder):
    """Two different tokens have two singular values; A and B both 0 would stay so for ever."""
    model = started(base_folder, init_text="w5 w6").train()
    torch.testing.assert_close(products(model), embedded(model, 5, 6, 5, 6, 5).expand(3, -1, -1))
    ids = random_ids(3, 8)
    labels = torch.where(torch.arange(8) < 4, -100, ids)
    model(input_ids=ids, labels=labels).loss.backward()
    layer = layer_of(model)
    experts, shared = layer.ptmoe_experts["default"].grad, layer.ptmoe_shared["default"].grad
    assert (experts.abs().sum((0, 1)) + shared.abs().sum(1) > 1e-6).all()


def test_the_router_starts_small_and_the_same_for_the_same_seed(base_folder):
    torch.manual_seed(3)
    first = started(base_folder, num_experts=50)
    torch.rand(7)  # processes of a distributed run may have drawn differently
    second = started(base_folder, num_experts=50)
    torch.manual_seed(4)
    third = started(base_folder, num_experts=50)
    weights = [layer_of(m).ptmoe_router_weight["default"] for m in (first, second, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(0.02, rel=0.1)
    assert not layer_of(first).ptmoe_router_bias["default"].any()


def test_without_a_tokenizer_it_starts_from_the_vocabulary_and_says_so():
    model = get_peft_model(tiny_model("llama"), config("smop"))
    table = model.get_input_embeddings().weight
    assert all((table == token).all(1).any() for token in products(model)[0])
    with pytest.warns(UserWarning, match="no tokenizer.*random tokens of the vocabulary"):
        model(random_ids(1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(random_ids(1, 4))


def test_a_text_that_cannot_be_read_is_an_error():
    model = get_peft_model(tiny_model("llama"), config(init_text="Answer the question."))
    with pytest.raises(ValueError, match=r"pt_moe\.init_text: no tokenizer of the base model was found"):
        model(random_ids(1, 4))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_saved_adapter_needs_no_tokenizer(base_folder, tmp_path, is_trainable):
    model = started(base_folder, init_text="w5 w6 w7")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=is_trainable).eval()
        assert torch.equal(loaded(random_ids(1, 4)).logits, model(random_ids(1, 4)).logits)


# ------------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_logits_are_bit_equal(tmp_path, family, setting, dtype):
    model, ids = pt_moe(family, setting, base=tiny_model(family).to(dtype)), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(tiny_model(family).to(dtype), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(model(ids).logits, tiny_model(family).to(dtype)(ids).logits)
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_keys_and_shapes_are_the_documented_ones(tmp_path, setting):
    pt_moe(setting=setting).save_pretrained(tmp_path)
    settings, prompt = config(setting), "base_model.model.model.soft_prompt"
    n, r = settings.num_experts, settings.rank
    expected = {f"{prompt}.ptmoe_experts": (n, T, r or 32)}
    if r:
        expected[f"{prompt}.ptmoe_shared"] = (r, 32)
    if n > 1:
        expected |= {f"{prompt}.ptmoe_router_weight": (n, 32), f"{prompt}.ptmoe_router_bias": (n,)}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == expected
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PT_MOE"
    # what FSDP2 saving would take for a LoRA
    assert not any("lora_" in name for name, _ in pt_moe(setting=setting).named_parameters())


def rewrite(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize("tensor", ["ptmoe_experts", "ptmoe_shared", "ptmoe_router_weight", "ptmoe_router_bias"])
def test_a_folder_that_lacks_a_tensor_raises_and_names_it(folder, tensor):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if tensor not in k})
    with pytest.raises(RuntimeError, match=f"adapter tensors missing: base_model.*{tensor}"):
        PeftModel.from_pretrained(tiny_model("llama"), folder)


def test_a_folder_with_a_foreign_tensor_raises_and_names_it(folder):
    rewrite(folder, lambda t: {**t, "base_model.model.model.soft_prompt.ptmoe_extra": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"does not have: base_model.*ptmoe_extra"):
        PeftModel.from_pretrained(tiny_model("llama"), folder)


def test_a_folder_of_another_method_raises(folder, tmp_path):
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    (folder / "adapter_model.safetensors").write_bytes((tmp_path / "lora/adapter_model.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match=r"no tensor of a PT_MOE adapter(.|\n)*lora_A"):
        PeftModel.from_pretrained(tiny_model("llama"), folder)


def test_a_truncated_file_raises(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(Exception, match="(?i)incomplete|deserializing|header"):
        PeftModel.from_pretrained(tiny_model("llama"), folder)


def test_another_width_raises_and_names_the_tensor(folder):
    with pytest.raises(RuntimeError, match=r"size mismatch for .*soft_prompt\.ptmoe_shared"):
        PeftModel.from_pretrained(tiny_model("llama", hidden_size=64), folder)


def test_low_cpu_mem_usage_loads_the_same(folder):
    ids = random_ids(1, 5)
    low = PeftModel.from_pretrained(tiny_model("llama"), folder, low_cpu_mem_usage=True)
    assert torch.equal(low(ids).logits, pt_moe()(ids).logits)
    low.load_adapter(folder, adapter_name="second", low_cpu_mem_usage=True)
    low.set_adapter("second")
    assert torch.equal(low(ids).logits, pt_moe()(ids).logits)


# --------------------------------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_adapters_equal_the_base(family):
    base, ids = tiny_model(family), random_ids(2, 7)
    expected = base(ids).logits
    model = pt_moe(base=base)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, adapted)


def test_adapters_of_different_shapes_switch_and_delete(tmp_path):
    ids, alone = random_ids(1, 7), {}
    lengths = {name: 3 + i for i, name in enumerate(SETTINGS)}
    for seed, (name, length) in enumerate(lengths.items()):
        model = pt_moe(setting=name, seed=seed, num_virtual_tokens=max(length, 4))
        model.save_pretrained(tmp_path / name)
        alone[name] = model(ids).logits
    first, *others = SETTINGS
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / first, adapter_name=first)
    for name in others:
        model.load_adapter(tmp_path / name, adapter_name=name)
    for name in reversed(SETTINGS):
        model.set_adapter(name)
        assert torch.equal(model(ids).logits, alone[name])
        assert trainable(model) and all(n.endswith(f".{name}") for n in trainable(model))
    model.delete_adapter("smop")
    assert not any(n.endswith(".smop") for n, _ in model.named_parameters())
    model.set_adapter("dpt")
    assert torch.equal(model(ids).logits, alone["dpt"])
    model.save_pretrained(tmp_path / "again", selected_adapters=["dpt"])
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "again/dpt")
    assert torch.equal(again(ids).logits, alone["dpt"])


def test_two_active_prompts_are_refused():
    model = pt_moe()
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one prompt at a time; default, other are active"):
        model(random_ids(1, 4))


def test_unload_gives_the_base_back_without_a_hook():
    base, ids = tiny_model("mixtral"), random_ids(1, 7)
    names, expected = [n for n, _ in base.named_parameters()], base(ids).logits
    unloaded = pt_moe(base=base).unload()
    assert [n for n, _ in unloaded.named_parameters()] == names
    assert torch.equal(unloaded(ids).logits, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())
    assert torch.equal(pt_moe(base=unloaded, seed=3)(ids).logits, pt_moe("mixtral", seed=3)(ids).logits)


def test_a_deep_copy_is_independent():
    model, ids = pt_moe(), random_ids(1, 7)
    twin = copy.deepcopy(model)
    randomise_prompts(twin, seed=5)
    assert torch.equal(twin(ids).logits, pt_moe(seed=5)(ids).logits)
    assert torch.equal(model(ids).logits, pt_moe()(ids).logits)


def test_autocast_adapter_dtype_false_takes_the_bases_dtype_and_warns():
    with pytest.warns(UserWarning, match="rates most updates of a router then round away"):
        model = get_peft_model(tiny_model("llama").bfloat16(), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.eval()(random_ids(1, 4)).logits.dtype == torch.bfloat16


def test_injection_without_a_peft_model_works_the_same():
    model, ids = inject_adapter_in_model(config(), tiny_model("llama")), random_ids(1, 6)
    randomise_prompts(model)
    assert torch.equal(model(ids).logits, pt_moe()(ids).logits)


def test_a_bare_decoder_can_have_a_prompt():
    bare = inject_adapter_in_model(config(), tiny_model("llama").model)
    randomise_prompts(bare)
    ids = random_ids(2, 6)
    expected = pt_moe().get_base_model().model(ids).last_hidden_state
    assert torch.equal(bare(ids).last_hidden_state, expected)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_every_adapter_tensor_and_nothing_else(family):
    model, ids = pt_moe(family, router_noise_std=0.1).train(), random_ids(4, 9)
    labels = torch.where(torch.arange(9) < 3, -100, ids)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(input_ids=ids, labels=labels).loss)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("ptmoe_" not in name), name


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(method):
    with pytest.raises(ValueError, match="cannot be merged: they are a prompt before the text"):
        getattr(pt_moe(), method)()


def test_an_encoder_decoder_is_refused():
    base = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        get_peft_model(base, config())


def test_a_decoder_without_the_arguments_is_refused():
    base = RwkvForCausalLM(RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16))
    with pytest.raises(ValueError, match="RwkvModel takes no past_key_values"):
        get_peft_model(base, config())


def test_a_decoder_whose_layers_read_token_ids_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = {"vocab_size": 32, "vocab_size_per_layer_input": 32, "hidden_size_per_layer_input": 4, "laurel_rank": 4}
    own = {"num_key_value_heads": 1, "head_dim": 8, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2}
    base = Gemma3nForCausalLM(Gemma3nTextConfig(**sizes, **small, **own, activation_sparsity_pattern=[0.0, 0.0]))
    with pytest.raises(ValueError, match="layers of Gemma3nTextModel read the token ids themselves"):
        get_peft_model(base, config())


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(ValueError, match=r"pt_moe\.rank: 40 is more than the hidden size of LlamaForCausalLM \(32\)"):
        get_peft_model(tiny_model("llama"), config(num_virtual_tokens=40, rank=40))


def test_more_virtual_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match=r"num_virtual_tokens: 16 leaves no room.*16 positions"):
        get_peft_model(tiny_model("llama", max_position_embeddings=16), config(num_virtual_tokens=16))
