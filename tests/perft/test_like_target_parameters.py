"""What PEFT asks of LoRA on the parameters of experts (its tests of `target_parameters`), asked of PERFT.

That which every adapter does alike is in tests/test_adapters.py.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer
from tests.moe_families import FAMILIES, tiny_family_model
from tests.tiny_models import random_ids, randomise_adapters, tiny_model

# experts in stacked parameters, with biases, transposed, or behind weights on their inputs
every_family = pytest.mark.parametrize("family", sorted({"qwen3_moe", "gpt_oss", "llama4_text"} & set(FAMILIES)))
IDS = random_ids(2, 9)


def config(**kwargs) -> PerftConfig:
    return PerftConfig(**{"num_experts": 6, "num_experts_per_tok": 1, "rank": 4, "task_type": "CAUSAL_LM", **kwargs})


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@every_family
@pytest.mark.parametrize("variant", ["routed", "embedded"])
def test_experts_that_are_parametrised_already_stay_so(family, variant):
    """As by another adapter on the same parameters, or by weight normalisation."""
    base = tiny_family_model(family)
    experts = next(m for name, m in base.named_modules() if name.endswith("experts"))
    parametrize.register_parametrization(experts, "down_proj", Doubled())
    before = logits(base)
    assert not torch.allclose(before, logits(tiny_family_model(family)))
    settings = config() if variant == "routed" else PerftConfig(variant="embedded", rank=4, task_type="CAUSAL_LM")
    model = get_peft_model(base, settings).eval()
    assert torch.equal(logits(model), before)
    randomise_adapters(model)
    assert not torch.allclose(logits(model), before)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    base = model.unload()
    assert parametrize.is_parametrized(experts, "down_proj")
    assert torch.equal(logits(base.eval()), before)


@every_family
def test_only_chosen_experts_learn_and_the_others_take_part(family):
    model = get_peft_model(tiny_family_model(family), config(router_aux_loss_coef=0.0))
    randomise_adapters(model)
    chosen: dict[str, set[int]] = {}

    def note(layer: PerftLayer, args: tuple, output: object) -> None:
        # the last token of a row has no label
        x_TD = args[0].detach().reshape(2, 3, layer.block.hidden_size)[:, :-1].flatten(0, 1)
        chosen[layer.block.name] = set((x_TD @ layer.perft_router["default"].T).argmax(-1).tolist())

    layers = [m for m in model.modules() if isinstance(m, PerftLayer)]
    for layer in layers:
        layer.register_forward_hook(note)
    model.train()(input_ids=IDS[:, :3], labels=IDS[:, :3]).loss.backward()
    for layer in layers:
        gradients = layer.perft_up["default"].grad
        learned = {expert for expert, gradient in enumerate(gradients) if bool(gradient.any())}
        assert learned == chosen[layer.block.name]
        assert 0 < len(learned) < 6


def test_adapters_beside_different_blocks_load_and_switch(tmp_path):
    model = get_peft_model(tiny_model("mixtral"), config(layers_to_transform=[0]), adapter_name="first")
    model.add_adapter("second", config(layers_to_transform=[1], rank=3))
    randomise_adapters(model.eval())
    expected = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        expected[name] = logits(model)
    assert not torch.allclose(expected["first"], expected["second"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "first", adapter_name="first")
    again.load_adapter(tmp_path / "second", "second")
    for name in ("second", "first"):
        again.set_adapter(name)
        assert torch.equal(logits(again), expected[name])
    again.delete_adapter("first")
    again.set_adapter("second")
    assert torch.equal(logits(again), expected["second"])


def test_the_same_blocks_by_suffixes_and_by_a_regular_expression():
    by_suffix, by_expression = (
        get_peft_model(tiny_model("qwen3_moe"), config(target_modules=targets)) for targets in (["mlp"], r".*\.1\.mlp")
    )
    names = [f"model.layers.{i}.mlp" for i in range(2)]
    assert by_suffix.targeted_module_names == names
    assert by_expression.targeted_module_names == names[1:]


def test_the_same_block_twice_is_adapted_once():
    model = get_peft_model(tiny_model("qwen3_moe"), config(target_modules=["mlp", "layers.1.mlp"]))
    assert [type(layer.mlp).__name__ for layer in model.base_model.model.model.layers] == ["PerftLayer"] * 2
    assert not isinstance(model.base_model.model.model.layers[1].mlp.get_base_layer(), PerftLayer)
