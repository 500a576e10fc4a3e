"""What PEFT offers for LoRA beside training one adapter: as there, or PEFT's kind of refusal."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_model_status, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig, TTLoraMoeConfig
from axolotl_moe_peft.tt_lora.export import export_to_lora
from tests.tiny_models import VOCAB_SIZE, random_ids, tiny_model

IDS = random_ids(4, 6)
NAMES = ["first", "__base__", "second", "first"]


def config(method: str, seed: int, **kwargs) -> PeftConfig:
    if method == "lora":
        return LoraConfig(init_lora_weights=False, **{"target_modules": ["q_proj", "v_proj"], **kwargs})
    return TTLoraConfig(rank=2 + seed, alpha=300, **kwargs)


def two_adapters(method: str, base: PreTrainedModel, **kwargs) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base, config(method, 0, **kwargs), adapter_name="first")
    model.add_adapter("second", config(method, 1, **kwargs))
    return model.eval()


def by_row(model: PeftModel, call) -> list[Tensor]:
    """Each row alone, with its adapter switched on by hand."""
    rows = []
    for row, name in enumerate(NAMES):
        model.set_adapter("first" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                rows.append(call(row))
        else:
            rows.append(call(row))
    return rows


@torch.no_grad()
@pytest.mark.parametrize("method", ["tt_lora", "lora"])
def test_each_row_of_a_batch_has_its_own_adapter(method):
    model = two_adapters(method, tiny_model("llama"))
    expected = torch.cat(by_row(model, lambda row: model(input_ids=IDS[row : row + 1]).logits))
    found = model(input_ids=IDS, adapter_names=NAMES).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model(input_ids=IDS).logits)  # and the hooks are gone
    for beams in (1, 2):
        kwargs = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "eos_token_id": None}

        def alone(row: int, kwargs: dict = kwargs) -> Tensor:
            ids = IDS[row : row + 1]
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs)

        together = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), adapter_names=NAMES, **kwargs)
        assert torch.equal(together, torch.cat(by_row(model, alone)))


@torch.no_grad()
def test_rows_of_an_encoder_are_not_repeated_for_beams():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(vocab_size=128, decoder_start_token_id=0, **sizes))
    model = two_adapters("tt_lora", base, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    kwargs = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    alone = by_row(model, lambda row: model.generate(input_ids=IDS[row : row + 1], **kwargs))
    together = model.generate(input_ids=IDS, adapter_names=NAMES, **kwargs)
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["first"] * 3, "3 names for 4 rows"),
        (["frist"] * 4, "there is no adapter 'frist'; there are 'first', 'second'"),
    ],
)
def test_adapter_names_that_do_not_fit_are_refused(names, why):
    model = two_adapters("tt_lora", tiny_model("llama"))
    with pytest.raises(ValueError, match=why):
        model(input_ids=IDS, adapter_names=names)
    assert model(input_ids=IDS).logits.shape[0] == 4  # nothing is left of the call
    with pytest.raises(ValueError, match="in evaluation only"):
        model.train()(input_ids=IDS, adapter_names=NAMES)
    model.eval().merge_adapter(["first"])
    with pytest.raises(ValueError, match="merged"):
        model(input_ids=IDS, adapter_names=NAMES)


@pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")
@pytest.mark.parametrize("method", [PerftConfig(), PTMoeConfig(num_virtual_tokens=6, rank=4)], ids=["perft", "pt_moe"])
def test_methods_that_cannot_mix_adapters_say_so(method):
    model = get_peft_model(tiny_model("mixtral"), method).eval()
    with pytest.raises(ValueError, match=f"cannot mix adapters of type {method.peft_type.value}"):
        model(input_ids=IDS, adapter_names=["default", "__base__"] * 2)


def test_the_status_is_that_of_lora():
    status = {method: get_model_status(two_adapters(method, tiny_model("llama"))) for method in ("tt_lora", "lora")}
    for field in ("enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters"):
        assert getattr(status["tt_lora"], field) == getattr(status["lora"], field), field
    assert status["tt_lora"].num_adapter_layers == status["lora"].num_adapter_layers == 4
    assert status["tt_lora"].trainable_params > 0


def test_what_is_loras_alone_is_refused(tmp_path):
    model = two_adapters("tt_lora", tiny_model("llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="(?i)hotswapping only supports"):
        model.set_adapter("first")
        hotswap_adapter(model, tmp_path / "second", adapter_name="first")
    partial = dict(list(model.state_dict().items())[:-1])
    with pytest.raises(RuntimeError, match="adapter tensors missing"):
        model.load_state_dict({key: t for key, t in partial.items() if "layers.0" in key}, strict=False)


# ------------------------------------------------------------------------------------------------ resized embeddings


def resized(folder: Path, seed: int = 5) -> PreTrainedModel:
    if not (folder / "base").exists():
        tiny_model("llama").save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(seed)
    base.resize_token_embeddings(VOCAB_SIZE + 2, mean_resizing=False)
    return base.eval()


@torch.no_grad()
def test_an_export_takes_resized_embeddings_and_trained_modules_along(tmp_path):
    ids = torch.tensor([[4, VOCAB_SIZE, 9, VOCAB_SIZE + 1]])
    for beside in ({}, {"modules_to_save": ["embed_tokens"]}):
        model = get_peft_model(resized(tmp_path), TTLoraConfig(alpha=300, task_type="CAUSAL_LM", **beside)).eval()
        for parameter in model.parameters():
            parameter.data.mul_(1.5 if parameter.requires_grad else 1)
        model.save_pretrained(tmp_path / "adapter")
        export_to_lora(tmp_path / "adapter", tmp_path / "lora")
        lora = PeftModel.from_pretrained(resized(tmp_path, seed=6), tmp_path / "lora").eval()
        torch.testing.assert_close(lora(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_an_expert_of_a_resized_base_goes_into_a_pool_on_that_base_only(tmp_path):
    get_peft_model(resized(tmp_path), TTLoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "expert")
    entries = [{"name": "expert", "path": str(tmp_path / "expert")}]
    get_peft_model(resized(tmp_path), TTLoraMoeConfig(experts=entries, task_type="CAUSAL_LM"))
    for base in (resized(tmp_path, seed=6), AutoModelForCausalLM.from_pretrained(tmp_path / "base")):
        with pytest.raises(ValueError, match=r"expert .* has a base_model.model.(lm_head|model.embed_tokens).weight"):
            peft.get_peft_model(base, TTLoraMoeConfig(experts=entries, task_type="CAUSAL_LM"))
