"""PTMoeModel through PEFT's public API, beside what all adapters do (tests/test_adapters.py): its start, refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
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

from tests.pt_moe.prompts import SETTINGS, T, config, layer_of, pt_moe, randomise_prompts
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
    if settings.center_router_input:
        expected |= {f"{prompt}.ptmoe_router_mean": (32,), f"{prompt}.ptmoe_router_mean_count": (1,)}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == expected
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PT_MOE"
    # what FSDP2 saving would take for a LoRA
    assert not any("lora_" in name for name, _ in pt_moe(setting=setting).named_parameters())


def test_another_width_raises_and_names_the_tensor(folder):
    with pytest.raises(RuntimeError, match=r"size mismatch for .*soft_prompt\.ptmoe_shared"):
        PeftModel.from_pretrained(tiny_model("llama", hidden_size=64), folder)


# --------------------------------------------------------------------------------------------------- several adapters


def test_two_active_prompts_are_refused():
    model = pt_moe()
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one prompt at a time; default, other are active"):
        model(random_ids(1, 4))


def test_a_bare_decoder_can_have_a_prompt():
    bare = inject_adapter_in_model(config(), tiny_model("llama").model)
    randomise_prompts(bare)
    ids = random_ids(2, 6)
    expected = pt_moe().get_base_model().model(ids).last_hidden_state
    assert torch.equal(bare(ids).last_hidden_state, expected)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(method):
    with pytest.raises(ValueError, match="cannot be merged: it is a prompt before the text"):
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
