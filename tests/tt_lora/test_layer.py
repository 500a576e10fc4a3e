"""TTLoraLinear against the formula, digit by digit; its dtypes, its cache, and what it keeps for backward."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from axolotl_moe_peft import TTLoraConfig
from axolotl_moe_peft.shared.dropout import Mask
from axolotl_moe_peft.tt_lora import TTLoraLinear
from axolotl_moe_peft.tt_lora import layer as layer_module
from axolotl_moe_peft.tt_lora.factors import Factors
from axolotl_moe_peft.tt_lora.layer import kept_matrices

SQUARE = Factors((4, 3, 2), (4, 3, 2))
WIDE = Factors((3, 5), (7, 2, 2))
SHORT = Factors((15,), (28,))
BASES = {
    "linear": lambda i, o: nn.Linear(i, o),
    "no_bias": lambda i, o: nn.Linear(i, o, bias=False),
    "conv1d": lambda i, o: Conv1D(o, i),
}


def adapted(base: str = "linear", factors: Factors = SQUARE, seed: int = 0, **kwargs) -> TTLoraLinear:
    """A wrapped layer in training mode; its base is frozen, as a model's is."""
    torch.manual_seed(seed)
    layer = TTLoraLinear(BASES[base](math.prod(factors.inputs), math.prod(factors.outputs)).requires_grad_(False))
    layer.update_layer("default", TTLoraConfig(**kwargs), factors)
    return layer


def inputs(layer: TTLoraLinear, *shape: int) -> Tensor:
    return torch.randn(*shape, layer.in_features, generator=torch.Generator().manual_seed(7))


def digits(factors: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Digits of every index, the first the fastest."""
    return [tuple(reversed(d)) for d in itertools.product(*(range(f) for f in reversed(factors)))]


def dense_update(layer: TTLoraLinear, name: str = "default") -> Tensor:
    """dW (outputs, inputs): for each entry the product of the cores' slices at its digits, in float64."""
    cores_in, cores_out = ([core.double() for core in side] for side in layer.cores(name))
    factors = layer.factors[name]
    rows = []
    for output_digits in digits(factors.outputs):
        row = []
        for input_digits in digits(factors.inputs):
            product = torch.eye(1, dtype=torch.float64)
            for core, digit in zip(cores_in, input_digits, strict=True):
                product = product @ core[:, digit]
            for core, digit in zip(cores_out, reversed(output_digits), strict=True):
                product = product @ core[:, digit]
            row.append(product.squeeze())
        rows.append(torch.stack(row))
    return torch.stack(rows)


# float32 sums of some 30 products of order 1, against float64
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("rank", [1, 3, 16, 17])  # padded to 16, 16, 16, 32
@pytest.mark.parametrize("factors", [SQUARE, WIDE, SHORT], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_output_and_gradients_are_the_formulas(base, factors, rank):
    layer = adapted(base, factors, rank=rank, alpha=3.0)
    x = inputs(layer, 2, 5)
    for tensor in (x, *layer.parameters()):
        tensor.requires_grad_(tensor is x or tensor.dim() == 3)
    cores = [core for side in layer.cores("default") for core in side]
    out, base_out = layer(x), layer.base_layer(x)
    assert (out - base_out).abs().max() > 1e-3
    reference = base_out + 3.0 * (x.double() @ dense_update(layer).T).float()
    torch.testing.assert_close(out, reference, **CLOSE)
    cotangent = torch.randn_like(out)
    expected = torch.autograd.grad(reference, [x, *cores], cotangent)
    for ours, theirs in zip(torch.autograd.grad(out, [x, *cores], cotangent), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 2, 3)], ids=str)
def test_inputs_of_any_number_of_dimensions(shape):
    layer = adapted()
    x = inputs(layer, *shape)
    torch.testing.assert_close(layer(x), layer(x.reshape(-1, 24)).reshape(*shape, 24), **CLOSE)
    assert layer(x).shape == (*shape, 24)


@pytest.mark.parametrize("base", BASES)
def test_the_delta_weight_has_the_layout_and_dtype_of_the_base(base):
    layer = adapted(base, WIDE, alpha=2.0)
    delta = layer.get_delta_weight("default")
    assert delta.shape == layer.base_layer.weight.shape
    expected = (2.0 * dense_update(layer)).float()
    torch.testing.assert_close(delta, expected.T if base == "conv1d" else expected, **CLOSE)
    layer.base_layer.bfloat16()
    assert layer.get_delta_weight("default").dtype == torch.bfloat16


def test_adapters_are_float32_and_of_the_documented_names_and_shapes():
    torch.manual_seed(0)
    layer = TTLoraLinear(nn.Linear(15, 28, dtype=torch.bfloat16))
    layer.update_layer("a", TTLoraConfig(rank=4), WIDE)
    layer.update_layer("b", TTLoraConfig(rank=2), SHORT)
    own = {name: tuple(p.shape) for name, p in layer.named_parameters() if "base_layer" not in name}
    assert own == {
        "ttcore_in_0.a": (1, 3, 4),
        "ttcore_in_1.a": (4, 5, 4),
        "ttcore_out_0.a": (4, 2, 4),
        "ttcore_out_1.a": (4, 2, 4),
        "ttcore_out_2.a": (4, 7, 1),
        "ttcore_in_0.b": (1, 15, 2),
        "ttcore_out_0.b": (2, 28, 1),
    }
    assert {p.dtype for name, p in layer.named_parameters() if "ttcore_" in name} == {torch.float32}


def test_normalized_cores_have_norm_one():
    layer = adapted(factors=WIDE, rank=6)
    for core in (core for side in layer.cores("default") for core in side):
        torch.testing.assert_close(core.norm(), torch.tensor(1.0), rtol=0, atol=1e-5)  # they divide by norm + 1e-6


def test_zero_init_starts_at_the_base_and_learns():
    layer = adapted(init="zero", factors=WIDE)
    x = inputs(layer, 6)
    assert torch.equal(layer(x), layer.base_layer(x))
    cores = [core for side in layer.cores("default") for core in side]
    assert [bool(core.any()) for core in cores] == [True] * 4 + [False]
    layer(x).square().sum().backward()
    assert [bool(core.grad.any()) for core in cores] == [False] * 4 + [True]


def test_dropout_is_on_the_adapters_input_and_in_training_only():
    layer = adapted(dropout=0.4, alpha=2.0)
    x = inputs(layer, 8)
    torch.manual_seed(5)
    out = layer(x)
    torch.manual_seed(5)
    mask = Mask.draw(0.4)
    dropped = mask.dropper(x.device)(x.clone()) * mask.scale
    expected = layer.base_layer(x) + 2.0 * (dropped.double() @ dense_update(layer).T).float()
    torch.testing.assert_close(out, expected, **CLOSE)
    plain = layer.base_layer(x) + 2.0 * (x.double() @ dense_update(layer).T).float()
    torch.testing.assert_close(layer.eval()(x), plain, **CLOSE)


# ------------------------------------------------------------------------------------------------------------- dtypes


def matrices(layer: TTLoraLinear) -> tuple[Tensor, Tensor]:
    """A transposed and alpha C in float32, by the formula."""
    cores_in, cores_out = layer.cores("default")
    down = cores_in[0][0]
    for core in cores_in[1:]:
        down = torch.einsum("ip,pmq->miq", down, core).flatten(0, 1)
    up = cores_out[0]
    for core in cores_out[1:]:
        up = torch.einsum("pjq,qns->pjns", up, core).flatten(1, 2)
    return down.T, layer.tt_config["default"].alpha * up[:, :, 0]


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16_base", "autocast"])
def test_cores_stay_float32_and_are_rounded_once(autocast):
    layer = adapted(factors=WIDE)
    x = inputs(layer, 4)
    if not autocast:
        layer.base_layer.bfloat16()
        x = x.bfloat16()
    down, up = (m.bfloat16() for m in matrices(layer))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        base_out = layer.base_layer(x)
        out = layer(x)
    assert out.dtype == base_out.dtype == torch.bfloat16
    expected = base_out + F.linear(x.bfloat16(), down) @ up
    # one rounding of the bottleneck and one of each sum; rounding each core would add one a core
    torch.testing.assert_close(out, expected, rtol=2**-8, atol=2**-8 * float(base_out.abs().max()))
    out.float().sum().backward()
    assert {core.grad.dtype for side in layer.cores("default") for core in side} == {torch.float32}


def test_matrices_are_built_in_float32_under_autocast(monkeypatch):
    layer = adapted(factors=WIDE)
    built = []
    build = layer_module.build_matrices
    monkeypatch.setattr(layer_module, "build_matrices", lambda *args: built.append(build(*args)) or built[-1])
    with torch.autocast("cpu", torch.bfloat16):
        layer(inputs(layer, 3))
    for ours, expected in zip(built[0], matrices(layer), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_a_float16_input_keeps_its_dtype():
    layer = adapted(factors=WIDE)
    layer.base_layer.half()
    assert layer(inputs(layer, 2).half()).dtype == torch.float16


# ---------------------------------------------------------------------------------------------------- memory and cache


def test_backward_keeps_two_thin_matrices_and_never_a_dense_update():
    factors = Factors((32, 8, 8), (32, 8, 8))
    layer = adapted(factors=factors)
    x, kept = inputs(layer, 64).requires_grad_(), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    for tensor in (x, layer.base_layer.weight):
        kept.pop(tensor.untyped_storage().data_ptr())
    # A and C at rank 16, twice while they are built, and the bottleneck; a dense update has 4 million entries
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) <= 4 * (2 * 2 * 2048 * 16 + 64 * 16 + 4096)


def counted(monkeypatch) -> list[None]:
    calls: list[None] = []
    build = layer_module.build_matrices
    monkeypatch.setattr(layer_module, "build_matrices", lambda *args: calls.append(None) or build(*args))
    return calls


def test_matrices_are_built_once_a_forward_and_once_in_a_call_of_generate(monkeypatch):
    layer = adapted()
    x, calls = inputs(layer, 3), counted(monkeypatch)
    for _ in range(2):
        layer(x)
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            expected = layer(x)
    assert len(calls) == 4
    for _ in range(2):  # as generate does
        with kept_matrices(), torch.no_grad():
            for _ in range(3):
                assert torch.equal(layer(x), expected)
    assert len(calls) == 6
    with kept_matrices():
        layer(x).sum().backward()  # with gradients, they belong to one graph
        layer(x).sum().backward()
    assert len(calls) == 8


CHANGES = {
    "in_place": lambda layer: [core.mul_(2) for core in layer.cores("default")[0]],
    "data": lambda layer: [setattr(core, "data", core.data * 2) for core in layer.cores("default")[1]],
    "in_place_of_data": lambda layer: [core.data.mul_(2) for core in layer.cores("default")[0]],  # EMA swaps so
    "load": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "there_and_back": lambda layer: (layer.bfloat16(), layer.float()),
    "another_adapter": lambda layer: layer.update_layer("default", TTLoraConfig(rank=3), WIDE),
}


@pytest.mark.parametrize("change", CHANGES)
def test_in_evaluation_changed_cores_act_at_once(change):
    layer = adapted(factors=WIDE).eval()
    x = inputs(layer, 3)
    with torch.no_grad():
        before = layer(x)
        CHANGES[change](layer)
        after = layer(x)
        expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected, **CLOSE)


def test_kept_matrices_know_layers_and_dtypes():
    layer = adapted().eval().requires_grad_(False)
    twin = copy.deepcopy(layer)
    twin.cores("default")[0][0].data.zero_()
    x = inputs(layer, 3)
    out = layer(x)
    with kept_matrices(), torch.no_grad():
        torch.testing.assert_close(layer(x), out)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), out)
        torch.testing.assert_close(twin(x), layer.base_layer(x))


def test_parameters_made_in_inference_mode_work():
    with torch.inference_mode():
        layer = adapted().eval()
        x = inputs(layer, 3)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.get_delta_weight("default").T, **CLOSE)
