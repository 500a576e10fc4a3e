"""Experts in 4 and 8 bits, as the host's loader leaves them: what adapters beside them compute, and what they keep.

Quantised with bitsandbytes' own functions, on CPUs too; the command line is in tests/cli/test_cli_quantized.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from axolotl.utils.dict import DictDefault
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    core_model_loading,
)

from axolotl_moe_peft.host.args import CONFIGS
from axolotl_moe_peft.host.quantised import (
    check_published_format,
    check_quantised_experts,
    check_routers_read_float16,
    check_stacked_experts,
    end_caches_with_calls,
)
from tests.moe_families import tiny_family_model
from tests.quantised_experts import quantised_experts
from tests.tiny_models import random_ids, tiny_config, tiny_model

ADAPTERS: dict[str, dict[str, Any]] = {
    "perft routed": {"rank": 4},
    "perft embedded": {"rank": 4, "variant": "embedded"},
    "perft dense": {"rank": 4, "variant": "dense", "num_experts": 2},
    "perft single": {"rank": 4, "variant": "single"},
    "tt_lora": {"rank": 4},
    "pt_moe": {"num_virtual_tokens": 4, "rank": 3, "router_noise_std": 0.0},
}
BITS = ("4bit", "8bit")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYERS = 6
# of an unquantised expert stack of this base, in float32
STACK_BYTES = 4 * 4 * 64 * 2 * 24

every_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
every_width = pytest.mark.parametrize("bits", BITS)
every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base of several layers, in full precision."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("mixtral", hidden_size=64, num_hidden_layers=LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture
def load(folder: Path) -> Callable[[str, str], PreTrainedModel]:
    """`load("4bit", "cpu")`: the base with quantised experts."""

    def from_pretrained(bits: str, device: str) -> PreTrainedModel:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with quantised_experts(bits):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}).train()
        end_caches_with_calls(model)
        return model

    return from_pretrained


def attach(base: PreTrainedModel, adapter: str) -> PeftModel:
    torch.manual_seed(0)
    config = CONFIGS[adapter.split()[0]](**ADAPTERS[adapter], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter.device) * 0.02)
    return model


def loss_and_gradients(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    ids = random_ids(2, 9).to(model.device)
    labels = ids.masked_fill(torch.arange(9, device=ids.device) < 4, -100)  # a prompt
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@every_width
@every_device
def test_experts_are_quantised_one_stack_at_a_time(bits: str, device: str, folder: Path) -> None:
    unquantised = []
    with quantised_experts(bits):
        set_param = core_model_loading.set_param_for_module

        def count_after(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
            set_param(model, *args, **kwargs)
            stacks = [p for p in model.parameters() if p.ndim >= 3 and p.is_floating_point() and not p.is_meta]
            unquantised.append(len(stacks))

        with patch.object(core_model_loading, "set_param_for_module", count_after):
            model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    assert max(unquantised) == 0
    assert len(unquantised) > 2 * LAYERS
    for layer in model.model.layers:
        for weights in layer.mlp.experts.parametrizations.values():
            held = sum(t.nbytes for t in (*weights.parameters(), *weights.buffers()))
            full = weights[0](weights.original).numel()
            assert held / full < {"4bit": 0.51, "8bit": 1.2}[bits]
            assert weights.original.dtype == {"4bit": torch.uint8, "8bit": torch.int8}[bits]
    check_quantised_experts(model)


@pytest.mark.matrix("base: load_in_{bits}, quantize_moe_experts", "{adapter}")
@every_adapter
@every_width
@every_device
def test_loss_and_gradients_are_those_on_the_dequantised_experts(
    adapter: str, bits: str, device: str, load: Callable[[str, str], PreTrainedModel]
) -> None:
    base, full = (attach(load(bits, device), adapter) for _ in range(2))
    for module in filter(parametrize.is_parametrized, list(full.modules())):
        for name in list(module.parametrizations):
            weight = getattr(module, name)
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    loss, gradients = loss_and_gradients(base)
    expected_loss, expected = loss_and_gradients(full)
    # elsewhere than on a CPU sums have no fixed order
    assert torch.equal(loss, expected_loss) if device == "cpu" else abs(loss / expected_loss - 1) < 1e-2
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0 or "router" in name, name
        if device == "cpu":
            assert torch.equal(gradients[name], gradient), name
        else:
            assert (gradients[name] - gradient).norm() <= 0.02 * gradient.norm(), name


@every_width
@pytest.mark.parametrize("coef", [0.0, 0.01])
def test_attaching_leaves_no_dequantised_weights_behind(
    bits: str, coef: float, load: Callable[[str, str], PreTrainedModel]
) -> None:
    config = CONFIGS["perft"](variant="embedded", rank=4, base_router_aux_loss_coef=coef, task_type="CAUSAL_LM")
    model = get_peft_model(load(bits, "cpu"), config)  # which calls the blocks, and ends the calls early
    assert parametrize._cache_enabled == 0 and not parametrize._cache
    model(random_ids(1, 5))
    assert parametrize._cache_enabled == 0 and not parametrize._cache


class LiveBytes:
    """Of the dequantised expert weights that exist, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def note(self, weight: Tensor) -> None:
        storage = weight.untyped_storage()
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


@contextmanager
def live_bytes(model: PreTrainedModel) -> Iterator[LiveBytes]:
    """Counts the bytes of dequantised weights while gradients are computed."""
    live, handles = LiveBytes(), []
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            handles.append(module[0].register_forward_hook(lambda _, __, weight: live.note(weight)))
    yield live
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("adapter", ["perft routed", "perft embedded", "tt_lora", "pt_moe"])
@every_width
@pytest.mark.parametrize("reentrant", [True, False])
def test_dequantised_experts_are_not_kept_for_backward(
    adapter: str, bits: str, reentrant: bool, load: Callable[[str, str], PreTrainedModel]
) -> None:
    model = attach(load(bits, "cpu"), adapter)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with live_bytes(model) as live:
        loss_and_gradients(model)
        of_one_layer = STACK_BYTES * 3 // 2  # gate and up, and down
        assert 0 < live.most <= of_one_layer
        assert live.now == 0


def test_without_checkpointing_they_are(load: Callable[[str, str], PreTrainedModel]) -> None:
    model = attach(load("4bit", "cpu"), "perft routed")
    with live_bytes(model) as live:
        loss_and_gradients(model)
    assert live.most > (LAYERS - 1) * STACK_BYTES  # so that the test above can fail


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", ["perft routed", "perft embedded", "tt_lora", "pt_moe"])
def test_on_a_gpu_a_step_takes_no_more_memory_with_more_layers_than_their_weights(
    adapter: str, tmp_path: Path
) -> None:
    def peak_beyond_weights(num_layers: int) -> int:
        config = tiny_config("mixtral", num_hidden_layers=num_layers, hidden_size=512)
        config.intermediate_size, config.num_local_experts = 1024, 8
        MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
        with quantised_experts("4bit"):
            base = AutoModelForCausalLM.from_pretrained(
                tmp_path / "base", dtype=torch.bfloat16, device_map={"": "cuda"}
            )
        model = attach(base, adapter)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_and_gradients(model)  # gradients exist
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        loss_and_gradients(model)
        return torch.cuda.max_memory_allocated() - held

    one_layer = 8 * 3 * 512 * 1024 * 2  # of dequantised experts, in bf16
    assert peak_beyond_weights(8) - peak_beyond_weights(2) < one_layer / 2


def test_experts_that_the_host_passed_over_are_an_error(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"12 expert weights were not quantised \(model.layers.0.mlp.experts.*CUDA"):
        check_quantised_experts(base)


def test_a_base_without_stacked_experts_has_nothing_to_quantise() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM, which has no experts in stacks.*Remove the key"):
        check_stacked_experts(DictDefault(quantize_moe_experts=True), tiny_model("llama"))
    check_stacked_experts(DictDefault(quantize_moe_experts=True), tiny_model("mixtral"))


@pytest.mark.parametrize("key", ["load_in_8bit", "float16"])
def test_float16_beside_routers_in_float32_needs_autocast(key: str) -> None:
    cfg = DictDefault({"base_model": "some/model", key: True, "torch_dtype": torch.float16})
    with torch.device("meta"):
        mixtral, dense, casting = tiny_model("mixtral"), tiny_model("llama"), tiny_family_model("deepseek_v3")
    with pytest.raises(ValueError, match=f"`{key}: true` without `bf16: true`.*'some/model'.*layers.0.mlp.gate.*Add"):
        check_routers_read_float16(cfg, mixtral)
    check_routers_read_float16(cfg, casting)
    check_routers_read_float16(cfg, dense)
    check_routers_read_float16(DictDefault({**cfg, "fp16": True}), mixtral)
    check_routers_read_float16(DictDefault({**cfg, "torch_dtype": torch.bfloat16}), mixtral)


@pytest.mark.parametrize(
    ("published", "keys", "fragments"),
    [
        ({"quant_method": "mxfp4"}, {}, ("mxfp4", "model_quantization_config: Mxfp4Config", "dequantize: true")),
        ({"quant_method": "mxfp4"}, {"load_in_4bit": True}, ("Mxfp4Config", "Remove `load_in_4bit`")),
        ({"quant_method": "fp8"}, {}, ("fp8", "model_quantization_config: FineGrainedFP8Config", "dequantize: true")),
        ({"quant_method": "fp8"}, {"model_quantization_config": "Mxfp4Config"}, ("published in fp8", "Remove")),
        (None, {"model_quantization_config": "Mxfp4Config"}, ("not quantised", "Remove the key")),
        ({"quant_method": "gptq"}, {}, ("gptq", "bf16", "load_in_4bit", "quantize_moe_experts")),
        ({"quant_method": "awq"}, {}, ("awq", "bf16", "load_in_4bit")),
        ({"quant_method": "compressed-tensors"}, {}, ("compressed-tensors", "load_in_4bit")),
        ({"quant_method": "torchao"}, {}, ("torchao", "load_in_4bit")),
        ({"load_in_4bit": True}, {"quantize_moe_experts": True}, ("quantised already", "bitsandbytes")),
    ],
)
def test_published_formats_that_are_not_trained_are_refused(
    published: dict[str, Any] | None, keys: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    architecture = PretrainedConfig(quantization_config=published) if published else PretrainedConfig()
    with pytest.raises(ValueError) as refusal:
        check_published_format(DictDefault(base_model="some/model", **keys), architecture)
    assert [f for f in ("some/model", *fragments) if f not in str(refusal.value)] == [], refusal.value


@pytest.mark.parametrize(
    ("published", "keys"),
    [
        (None, {}),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {}),
        ({"quant_method": "mxfp4"}, {"model_quantization_config": "Mxfp4Config"}),
        ({"quant_method": "fp8"}, {"model_quantization_config": "FineGrainedFP8Config", "quantize_moe_experts": True}),
    ],
)
def test_formats_that_are_trained_pass(published: dict[str, Any] | None, keys: dict[str, Any]) -> None:
    architecture = PretrainedConfig(quantization_config=published) if published else PretrainedConfig()
    check_published_format(DictDefault(base_model="some/model", **keys), architecture)
