"""PERFT on bases that are split, offloaded, copied, compiled, or more than a language model: right, or refused."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer, units
from axolotl_moe_peft.perft.dispatch import BlockedSlots, HostSlots
from axolotl_moe_peft.shared.auxiliary import AuxiliaryLosses, ForwardPass
from axolotl_moe_peft.shared.routing import Routing
from tests.moe_families import tiny_family_model
from tests.multimodal_models import MULTIMODAL, image_batch, tiny_multimodal_model
from tests.tiny_models import random_ids, randomise_adapters, tiny_model

VARIANTS = {"routed": {"num_experts": 3, "num_experts_per_tok": 2}, "embedded": {}, "dense": {"num_experts": 2}}


def config(variant: str = "routed", **kwargs) -> PerftConfig:
    return PerftConfig(variant=variant, task_type="CAUSAL_LM", **{"rank": 4, **VARIANTS[variant], **kwargs})


def layers_of(model: nn.Module) -> list[PerftLayer]:
    return [m for m in model.modules() if isinstance(m, PerftLayer)]


def _fail(reason: str) -> None:
    raise RuntimeError(reason)


def as_it_was(base: nn.Module) -> bool:
    return not layers_of(base) and not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


# --------------------------------------------------------------------------------------------------- refused, unharmed


@pytest.mark.parametrize(
    "refused",
    [
        {"target_modules": "model.layers.(0.mlp"},
        {"target_modules": ["model.layers.0.lm_head"]},
        {"layers_to_transform": [7]},
        {"gate_weights": "base", "num_experts_per_tok": 3},
    ],
    ids=str,
)
def test_a_failed_attach_leaves_the_base_as_it_was(refused):
    base, ids = tiny_model("mixtral"), random_ids(1, 5)
    expected = base(ids).logits
    with pytest.raises(ValueError, match="^perft[.]"):
        get_peft_model(base, config(**refused))
    assert as_it_was(base)
    assert torch.equal(base(ids).logits, expected)


def test_a_failed_second_adapter_leaves_the_first_as_it_was():
    model, ids = get_peft_model(tiny_model("mixtral"), config()), random_ids(1, 5)
    randomise_adapters(model)
    expected = model(ids).logits
    with pytest.raises(ValueError, match="layers_to_transform"):
        model.add_adapter("second", config(layers_to_transform=[7]))
    assert torch.equal(model(ids).logits, expected)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target_modules", [None, ["text_moe"]], ids=str)
def test_blocks_that_see_a_part_of_the_tokens_are_refused(variant, target_modules):
    base = tiny_multimodal_model("ernie4_5_vl_moe")
    with pytest.raises(ValueError, match=r"VLMoeMoeBlock \(model.language_model.layers.0.mlp\): it hands its"):
        get_peft_model(base, config(variant, target_modules=target_modules))
    assert as_it_was(base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_offloaded_blocks_are_refused(tmp_path, variant):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map = {**parts, "lm_head": "cpu", "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=str(tmp_path / "offloaded")
    )
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp.*is offloaded"):
        get_peft_model(base, config(variant))
    assert not layers_of(base)
    model = get_peft_model(base, config(variant, layers_to_transform=[0]))
    randomise_adapters(model)
    expected = get_peft_model(tiny_model("mixtral"), config(variant, layers_to_transform=[0]))
    randomise_adapters(expected)
    with torch.no_grad():
        torch.testing.assert_close(model(random_ids(2, 6)).logits, expected(random_ids(2, 6)).logits)


@pytest.mark.parametrize("attach", [get_peft_model, lambda base, config: inject_adapter_in_model(config, base)])
def test_replicas_of_data_parallel_are_refused(attach):
    model = attach(tiny_model("mixtral"), config())
    replica = layers_of(model)[0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="does not work under nn.DataParallel"):
        replica(torch.randn(1, 3, 32))


# ------------------------------------------------------------------------------------------------------------ as usual


def pickles(model: nn.Module) -> bool:
    try:
        pickle.dumps(model)
    except (AttributeError, pickle.PicklingError):
        return False
    return True


# every entry of the table of families, and families without one
@pytest.mark.parametrize(
    "family", "aria_text dbrx deepseek_v3 inkling_text jamba jetmoe llama4_text longcat_flash phimoe zaya".split()
)
def test_a_model_is_pickled_and_copied_where_the_bare_one_is(family):
    base, ids = tiny_family_model(family), random_ids(2, 6)
    bare_pickles = pickles(base)
    model = get_peft_model(base, config("embedded")).eval()
    randomise_adapters(model)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
        if bare_pickles:
            assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)


@pytest.mark.parametrize(
    ("variant", "dtype", "kind"),
    [
        ("embedded", torch.float32, HostSlots),
        ("routed", torch.float32, BlockedSlots),
        ("routed", torch.bfloat16, None),
    ],
    ids=str,
)
def test_compiled_equals_eager(variant, dtype, kind, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(units, "slots_for", lambda *_: kind)
    ids, losses, gradients = random_ids(2, 8), [], []
    for compiled in (False, True):
        model = get_peft_model(tiny_model("mixtral", num_hidden_layers=1).to(dtype), config(variant)).train()
        randomise_adapters(model)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        losses.append(called(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[1], losses[0])
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "variant", "kwargs"), [("llama4_text", "embedded", {}), ("mixtral", "routed", {"gate_weights": "base"})]
)
def test_threads_that_call_one_model_have_their_own_base_routing(family, variant, kwargs):
    model = get_peft_model(tiny_family_model(family), config(variant, **kwargs)).eval()
    randomise_adapters(model)
    batches = [random_ids(2, 5 + length, seed=length) for length in range(4)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in batches]

    def call(i: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(batches[i % 4]).logits, expected[i % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(80)))


def test_layers_on_several_devices_have_losses_and_figures():
    auxiliary = AuxiliaryLosses(nn.Identity())
    with FakeTensorMode():  # two GPUs, without any
        auxiliary.current = ForwardPass(torch.ones(1, 12, dtype=torch.bool, device="cuda:0"), module=nn.Identity())
        losses = []
        for index in range(2):
            device = f"cuda:{index}"
            indices = torch.zeros(12, 2, dtype=torch.int64, device=device)
            routing = Routing(torch.randn(12, 4, device=device), indices)
            losses.append(auxiliary.losses("default", str(index), config(router_z_loss_coef=0.1), routing))
        assert [loss.device.index for loss in losses] == [0, 1]
        stacked = []
        with pytest.raises(RuntimeError, match="read on"):  # a fake tensor has no values for the host
            auxiliary.statistics.pop(lambda tensor: stacked.append(tensor) or _fail("read on"))
        assert stacked[0].device.index == 0


# -------------------------------------------------------------------------------------------------------- multimodal


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", sorted({"dots3_note"} & set(MULTIMODAL)))
def test_the_blocks_of_a_vision_tower_are_left_alone_unless_named(family, variant):
    model = get_peft_model(tiny_multimodal_model(family), config(variant))
    assert model.targeted_module_names == ["model.language_model.layers.1.mlp"]
    assert model.base_model.blocks_left_alone == ["model.vision_tower.blocks.1.mlp"]
    named = get_peft_model(tiny_multimodal_model(family), config(variant, target_modules=["mlp"]))
    vision, text = sorted(layers_of(named), key=lambda layer: layer.block.reads_text)
    assert (vision.block.hidden_size, text.block.hidden_size) == (16, 32)
    randomise_adapters(named)
    named.train()(**image_batch(family)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in named.parameters() if p.requires_grad)


with_images = pytest.mark.parametrize("family", sorted(set(MULTIMODAL) - {"ernie4_5_vl_moe"}))


@pytest.mark.parametrize("variant", VARIANTS)
@with_images
def test_a_multimodal_base_trains_on_images_and_on_text(family, variant):
    base, batch = tiny_multimodal_model(family), image_batch(family)
    expected = base(**batch).logits
    model = get_peft_model(base, config(variant))
    assert torch.equal(model(**batch).logits, expected)
    randomise_adapters(model)
    text = {name: tensor[1:] for name, tensor in image_batch(family).items() if tensor.shape[:2] == (2, 12)}
    for rows in (batch, text):
        model.zero_grad()
        model.train()(**rows).loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert not any("vision" in name for name, p in model.named_parameters() if p.requires_grad)


@with_images
def test_image_tokens_count_in_losses_and_figures_and_padding_never(family):
    model = get_peft_model(tiny_multimodal_model(family), config(num_experts=5, router_z_loss_coef=0.1)).train()
    randomise_adapters(model)
    seen: dict[str, list[torch.Tensor]] = {}
    for layer in layers_of(model):
        layer.register_forward_hook(lambda m, args, out: seen.update({m.block.name: args[0].detach()}))
    batch = image_batch(family, padding=3)
    model(**batch)
    figures = model.base_model.statistics.pop()
    real = batch["attention_mask"].flatten().bool()
    aux, z, counted = [], [], []
    for layer in layers_of(model):
        x_TD = seen[layer.block.name].reshape(-1, layer.block.hidden_size)[real]
        assert len(x_TD) == 12 + 9
        logits = x_TD @ layer.perft_router["default"].T
        chosen = logits.topk(2).indices
        shares = torch.stack([(chosen == e).any(1).float().mean() for e in range(5)])
        aux.append(5 * (shares * logits.softmax(-1).mean(0)).sum())
        z.append(logits.logsumexp(-1).square().mean())
        counted.append(shares.max() / 2)
    assert figures["router_aux_loss"] == pytest.approx(torch.stack(aux).mean().item(), rel=1e-4)
    assert figures["router_z_loss"] == pytest.approx(torch.stack(z).mean().item(), rel=1e-4)
    assert figures["expert_max_share"] == pytest.approx(torch.stack(counted).mean().item(), rel=1e-4)
