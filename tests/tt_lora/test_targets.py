"""Which layers of a model are targets: those that are called, linear, and not trained whole anyway."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.tt_lora import TTLoraLinear
from axolotl_moe_peft.tt_lora.layer import build_matrices, core_shapes
from axolotl_moe_peft.tt_lora.model import factors_of
from tests.moe_families import FAMILIES, tiny_family_model
from tests.tiny_models import random_ids

SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MAMBA = {"state_size": 4, "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
DENSE = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA)),
    "falcon_mamba": lambda: transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**MAMBA)),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(num_heads=4, head_dim=16, n_groups=1, **MAMBA)
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(intermediate_size=48, **SMALL)),
}
NEVER_ADAPTED = {
    "mamba": {"dt_proj", "x_proj", "out_proj"},
    "falcon_mamba": {"dt_proj", "x_proj", "out_proj"},
    "mamba2": {"out_proj"},
    "jamba": {"dt_proj"},
    "longcat_flash": {"classifier"},
    "phimoe": {"router"},
}


def adapted(base: nn.Module, targets: str | list[str] = "all-linear", **kwargs) -> PeftModel:
    return get_peft_model(base, TTLoraConfig(rank=2, alpha=10, target_modules=targets, **kwargs))


def names(model: nn.Module) -> set[str]:
    layers = [name for name, module in model.named_modules() if isinstance(module, TTLoraLinear)]
    assert layers
    return {name.rpartition(".")[2] for name in layers}


@pytest.mark.filterwarnings("ignore:tt_lora.rank")
@pytest.mark.parametrize("family", [*FAMILIES, *DENSE])
def test_every_layer_of_all_linear_is_called_and_learns(family):
    base = DENSE[family]() if family in DENSE else tiny_family_model(family)
    model, called = adapted(base), set()
    for name, module in model.named_modules():
        if isinstance(module, TTLoraLinear):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    ids = random_ids(2, 12)
    batch = {"decoder_input_ids": ids} if family == "t5" else {}
    model(input_ids=ids, **batch).logits.float().square().sum().backward()
    assert called == {name for name, module in model.named_modules() if isinstance(module, TTLoraLinear)}
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not names(model) & NEVER_ADAPTED.get(family, set())
    if family == "bloom":  # slices of weights are read only to imitate tensor parallelism
        assert names(model) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


@pytest.mark.parametrize(
    ("family", "target", "why"),
    [
        ("mamba", "dt_proj", "reads"),
        ("longcat_flash", "classifier", "reads"),
        ("deepseek_v32", "wq_b", "only chooses"),
    ],
)
def test_a_layer_that_is_idle_is_refused_by_name(family, target, why):
    base = DENSE[family]() if family in DENSE else tiny_family_model(family)
    with pytest.raises(ValueError, match=rf"matches .*{target}, beside which an adapter would do nothing: \w+ {why}"):
        adapted(base, [target])
    assert not any(isinstance(module, TTLoraLinear) for module in base.modules())


# ------------------------------------------------------------------------------------------- adapters of version 0.1


def saved_by_version_0_1(base: nn.Module, folder: Path, target: str | list[str] = "all-linear") -> dict[str, Tensor]:
    """An adapter beside every linear layer but the output layer, or these, as that version made it; its deltas."""
    generator = torch.Generator().manual_seed(3)
    config = TTLoraConfig(rank=2, alpha=300, target_modules=target, inference_mode=True, task_type="CAUSAL_LM")
    tensors, deltas = {}, {}
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear) or module is base.get_output_embeddings():
            continue
        if target != "all-linear" and not name.endswith(tuple(target)):
            continue
        shapes = core_shapes(factors_of(name, module, config), config.rank)
        cores = {key: torch.randn(shape, generator=generator) * 0.15 for key, shape in shapes.items()}
        tensors |= {f"base_model.model.{name}.{key}": core for key, core in cores.items()}
        sides = [[core for key, core in cores.items() if f"_{side}_" in key] for side in ("in", "out")]
        down, up = build_matrices(*sides, config.alpha)
        deltas[name] = up.T @ down
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return deltas


def base_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    return (DENSE[family]() if family in DENSE else tiny_family_model(family)).eval()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    ("family", "unread", "target"),
    [
        ("mamba", "dt_proj", "all-linear"),
        ("mamba", "dt_proj", ["x_proj", "in_proj"]),
        ("deepseek_v32", "kv_b_proj", "all-linear"),
        ("deepseek_v32", "kv_b_proj", ["wq_b", "q_b_proj"]),
    ],
)
@torch.no_grad()
def test_an_adapter_of_version_0_1_loads_as_it_was(family, unread, target, trainable, tmp_path):
    deltas, ids = saved_by_version_0_1(base_of(family), tmp_path / "old", target), random_ids(2, 9)
    old, merged = load_file(tmp_path / "old/adapter_model.safetensors"), base_of(family)
    for name, delta in deltas.items():
        if name.rpartition(".")[2] != unread or family != "mamba":
            merged.get_submodule(name).weight += delta
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base_of(family), tmp_path / "old", is_trainable=trainable).eval()
    assert any("of version 0.1 has parts beside layers" in str(w.message) for w in caught)
    torch.testing.assert_close(model(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
    other = [name for name, p in model.named_parameters() if "ttcore_" in name and p.requires_grad is not trainable]
    assert other == []
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert again.keys() == old.keys() and all(torch.equal(again[key], old[key]) for key in old)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base_of(family)(input_ids=ids).logits)
    if family == "mamba":
        with pytest.raises(ValueError, match="version 0.1 beside .*x_proj.* cannot be merged"):
            model.merge_and_unload()


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.scaled = Router(8, 4), Scaled(8, 8)
        self.read, self.asked, self.either = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.init_weights()

    def init_weights(self) -> None:
        self.asked.weight.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.asked(self.scaled(x).to(self.asked.weight.dtype))
        if self.asked.weight.shape[0] == 8 and isinstance(self.asked.weight, Tensor):
            x = F.linear(x, self.read.weight, self.read.bias)
        x = self.either(x) if self.training else x @ self.either.weight.T
        return x + self.router(x)[0].sum()


def test_of_a_module_of_ones_own_too():
    model = adapted(nn.Sequential(Parent()))
    assert names(model) == {"scaled", "asked"}
    for target, why in (
        ("read", "reads the layer"),
        ("either", "reads the layer"),
        ("router", "no linear layer but Router"),
    ):
        with pytest.raises(ValueError, match=why):
            adapted(nn.Sequential(Parent()), [target])


def test_all_linear_leaves_heads_and_what_is_trained_whole():
    model = get_peft_model(DENSE["bert"](), TTLoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert "classifier" not in names(model)
    assert "classifier" not in names(adapted(DENSE["bert"]()))  # without being told that it is one
    assert "dense" not in names(adapted(DENSE["bert"](), modules_to_save=["dense"]))
    with torch.no_grad():
        assert model(input_ids=random_ids(1, 5)).logits.shape == (1, 2)


@pytest.mark.parametrize("targets", ["*proj", "(q_proj", "q_proj)", "layers.[0-.q_proj"])
def test_what_is_no_regular_expression_is_refused_by_name(targets):
    with pytest.raises(ValueError, match=r"tt_lora\.target_modules: .* is no regular expression"):
        TTLoraConfig(target_modules=targets)
