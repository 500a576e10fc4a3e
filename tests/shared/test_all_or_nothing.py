"""An adapter is attached, loaded and saved whole; what fails leaves the base as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig, TTLoraMoeConfig
from tests.shared.methods import METHODS, config_of
from tests.tiny_models import random_ids, tiny_model
from tests.tt_lora_moe.pools import save_experts

pytestmark = pytest.mark.filterwarnings("ignore:pt_moe. no tokenizer")


def parts(model: nn.Module) -> dict[str, object]:
    """Everything that attaching could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        "parameters": [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "training": [module.training for module in model.modules()],
    }


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_ids(2, 6)).logits


# -------------------------------------------------------------------------------------------------------- attaching

TYPO = {"target_modules": ["q_prj"]}
UNFIT: dict[str, Callable[[Path], peft.PeftConfig]] = {
    "perft": lambda folder: PerftConfig(**TYPO),
    "perft_half_way": lambda folder: PerftConfig(modules_to_save=["gate"]),  # inside the blocks, which PEFT refuses
    "tt_lora": lambda folder: TTLoraConfig(target_modules=["q_proj", "norm"]),
    "tt_lora_half_way": lambda folder: TTLoraConfig(
        target_modules=["o_proj"], factors={"o_proj": {"in": [7], "out": [32]}}
    ),
    "tt_lora_tokens": lambda folder: TTLoraConfig(
        modules_to_save=["embed_tokens"], trainable_token_indices={"embed_tokens": [1]}
    ),
    "tt_lora_moe_path": lambda folder: TTLoraMoeConfig(experts=[{"name": "a", "path": str(folder / "typo")}]),
    "tt_lora_moe_base": lambda folder: TTLoraMoeConfig(
        experts=[*save_experts(folder), {"name": "x", "path": str(other_base(folder))}]
    ),
    "pt_moe": lambda folder: PTMoeConfig(num_virtual_tokens=600),
}


def other_base(folder: Path) -> Path:
    model = peft.get_peft_model(tiny_model("llama", hidden_size=64), TTLoraConfig())
    model.save_pretrained(folder / "other")
    return folder / "other"


@pytest.mark.parametrize("case", UNFIT)
def test_a_failed_attach_leaves_the_base_as_it_was(case, tmp_path):
    base, config = tiny_model("mixtral"), UNFIT[case](tmp_path)
    base.train()
    before, expected = parts(base), logits(base)
    with pytest.raises((ValueError, RuntimeError)):
        peft.get_peft_model(base, config)
    assert parts(base) == before
    assert torch.equal(logits(base), expected)
    base.eval()
    peft.get_peft_model(base, TTLoraConfig(init="zero"))  # and it takes another one
    assert torch.equal(logits(base), logits(tiny_model("mixtral")))


@pytest.mark.parametrize("method", METHODS)
def test_a_second_adapter_that_fails_leaves_the_first_as_it_was(method, tmp_path):
    model = peft.get_peft_model(tiny_model("mixtral"), config_of(method, tmp_path)).eval()
    before, expected = parts(model), logits(model)
    bad = {"perft": "perft", "tt_lora": "tt_lora", "tt_lora_moe": "tt_lora_moe_path", "pt_moe": "pt_moe"}[method]
    with pytest.raises((ValueError, RuntimeError)):
        model.add_adapter("second", UNFIT[bad](tmp_path))
    assert parts(model) == before and list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


# ---------------------------------------------------------------------------------------------------------- loading


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


BREAKS: dict[str, Callable[[Path], None]] = {
    "without its tensors": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "truncated": truncate,
    "partial": lambda folder: rewrite(folder, lambda t: dict(sorted(t.items())[1:])),
    "foreign": lambda folder: rewrite(folder, lambda t: {**t, "base_model.model.nothing": torch.ones(1)}),
    "of another shape": lambda folder: rewrite(folder, lambda t: {k: torch.cat([v, v]) for k, v in t.items()}),
}


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_failed_load_leaves_the_base_as_it_was(method, broken, trainable, tmp_path):
    peft.get_peft_model(tiny_model("mixtral"), config_of(method, tmp_path)).save_pretrained(tmp_path / "adapter")
    BREAKS[broken](tmp_path / "adapter")
    base = tiny_model("mixtral")
    before, expected = parts(base), logits(base)
    with pytest.raises(Exception):  # noqa: B017 (of PEFT, safetensors, torch or ours)
        PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=trainable)
    assert parts(base) == before
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_load_beside_a_trained_adapter_leaves_that_one(method, tmp_path):
    model = peft.get_peft_model(tiny_model("mixtral"), config_of(method, tmp_path)).eval()
    model.save_pretrained(tmp_path / "adapter")
    BREAKS["partial"](tmp_path / "adapter")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    before, expected = parts(model), logits(model)
    with pytest.raises(RuntimeError, match="adapter tensors missing"):
        model.load_adapter(tmp_path / "adapter", "second")
    assert parts(model) == before and list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    with pytest.raises(RuntimeError, match="adapter tensors missing"):
        model.load_adapter(tmp_path / "adapter", "default")  # its own weights, anew
    assert parts(model) == before and list(model.peft_config) == ["default"]


def test_lora_has_the_load_adapter_of_peft(tmp_path):
    """Whatever stands in for it does nothing for other methods, not even when they fail."""
    peft.get_peft_model(tiny_model("llama"), TTLoraConfig())
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError):
        model.load_adapter(tmp_path, "second")
    assert "second" in model.peft_config


# ----------------------------------------------------------------------------------------------------------- saving


def wrapped(model: PeftModel) -> PeftModel:
    """As `fsdp_config.activation_checkpointing: true` wraps decoder layers."""
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, MixtralDecoderLayer))
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    return model


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_under_activation_checkpointing_is_saved_and_loaded_whole(method, tmp_path):
    config = config_of(method, tmp_path)
    model = peft.get_peft_model(tiny_model("mixtral"), config).eval()
    model.save_pretrained(tmp_path / "plain")
    wrapped(model).save_pretrained(tmp_path / "wrapped")
    plain, under_wrappers = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("plain", "wrapped"))
    assert plain and plain.keys() == under_wrappers.keys()
    assert all(torch.equal(tensor, under_wrappers[key]) for key, tensor in plain.items())
    loaded = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "wrapped").eval()
    assert torch.equal(logits(loaded), logits(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.base_model.prefix in name:
                parameter.zero_()
    model.load_adapter(tmp_path / "wrapped", "default")  # as a Trainer resumes
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kept", [0, 1], ids=["empty", "partial"])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_is_not_whole_is_not_saved(method, kept, tmp_path):
    model = peft.get_peft_model(tiny_model("mixtral"), config_of(method, tmp_path))
    state = {key: tensor for key, tensor in model.state_dict().items() if model.base_model.prefix in key}
    state = dict(list(state.items())[:kept])
    with pytest.raises(RuntimeError, match="was not saved(.|\n)*missing or empty"):
        model.save_pretrained(tmp_path / "adapter", state_dict=state)
    assert not (tmp_path / "adapter/adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter/adapter_config.json").exists()


def test_placeholders_of_a_sharded_model_are_not_saved(tmp_path):
    model = peft.get_peft_model(tiny_model("mixtral"), TTLoraConfig())
    state = {key: tensor.new_empty(0) for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="gathered first"):
        model.save_pretrained(tmp_path / "adapter", state_dict=state)


@pytest.mark.parametrize("method", METHODS)
def test_copies_save_and_load_as_the_original(method, tmp_path):
    model = peft.get_peft_model(tiny_model("mixtral"), config_of(method, tmp_path)).eval()
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    loaded: PreTrainedModel = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "copy").eval()
    assert torch.equal(logits(loaded), logits(model))
