"""Every way to compute the experts' products against a loop over tokens and their choices, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import dispatch as module
from axolotl_moe_peft.perft import units
from axolotl_moe_peft.perft.dispatch import BlockedSlots, GroupedSlots, HostSlots, pad_rank
from axolotl_moe_peft.perft.products import gated_mm, gather_mm, scatter_mm, slots_for
from axolotl_moe_peft.shared.dropout import Mask

KINDS = (HostSlots, GroupedSlots, BlockedSlots)
# tokens, experts, experts per token, width, rank: odd ranks, experts without tokens, one token, one expert
SHAPES = [(10, 4, 2, 16, 8), (7, 5, 3, 8, 3), (3, 64, 2, 24, 16), (1, 3, 3, 8, 1), (6, 1, 1, 16, 5), (9, 4, 2, 13, 7)]


def choices(num_tokens: int, num_experts: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    return torch.rand(num_tokens, num_experts, generator=generator).topk(k, -1).indices


def tensors(*shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def loop(x, down, up, indices, weights):
    rows = []
    for t, experts in enumerate(indices.tolist()):
        of_experts = [(j, e) for j, e in enumerate(experts) if e < len(down)]
        rows.append(sum((weights[t, j] * (up[e] @ (down[e] @ x[t])) for j, e in of_experts), torch.zeros_like(x[t])))
    unused = 0 * sum(operand.sum() for operand in (x, down, up, weights))  # where all choices are of no expert
    return torch.stack(rows) + unused


def ours(kind, x, down, up, indices, weights, mask=None, partial=False):
    if kind is None:
        gate = weights.new_zeros(len(x), len(down) + partial).scatter_add(1, indices, weights)[:, : len(down)]
        return gated_mm(x @ down.flatten(0, 1).t(), up.transpose(1, 2), gate)
    slots = kind.of(indices, len(down), partial)
    weights = F.pad(weights.flatten(), (0, 1)).index_select(0, slots.choice_S)
    z = gather_mm(x, pad_rank(down), slots, mask) * weights.unsqueeze(-1)
    return scatter_mm(z, pad_rank(up.transpose(1, 2)), slots, len(x))


def compare(kind, device: str, dtype: torch.dtype, shape, tolerance: float, of_none: float = 0.0) -> None:
    num_tokens, num_experts, k, width, rank = shape
    indices = choices(num_tokens, num_experts, k)
    generator = torch.Generator().manual_seed(num_tokens)
    indices[torch.rand(indices.shape, generator=generator) < of_none] = num_experts
    operands = tensors(
        (num_tokens, width), (num_experts, rank, width), (num_experts, width, rank), (num_tokens, k), dtype=dtype
    )
    reference = [o.detach().double().requires_grad_() for o in operands]
    expected = loop(*reference[:3], indices, reference[3])
    expected.square().sum().backward()

    operands = [o.detach().to(device).requires_grad_() for o in operands]
    out = ours(kind, *operands[:3], indices.to(device), operands[3], partial=of_none > 0)
    out.backward((2 * expected.detach()).to(device, dtype))
    for name, ours_, theirs in [
        ("output", out, expected),
        *((f"gradient {i}", o.grad, r.grad) for i, (o, r) in enumerate(zip(operands, reference, strict=True))),
    ]:
        error = (ours_.cpu().double() - theirs).norm() / theirs.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.1e}"


# on a CPU float64 takes the plain path, the others grouped_mm where the width is aligned (13 is not);
# bf16 keeps 8 bits, and z and the result are rounded to it
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", (*KINDS, None))
def test_equals_a_loop_over_tokens(kind, dtype, tolerance, shape):
    if kind is GroupedSlots and (dtype == torch.float64 or shape[3] % 8):
        return  # never chosen
    compare(kind, "cpu", dtype, shape, tolerance)


@pytest.mark.parametrize("of_none", [0.5, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 4, 2, 16, 8)], ids=str)
@pytest.mark.parametrize("kind", (*KINDS, None))
def test_choices_of_no_expert_add_nothing(kind, shape, of_none):
    if kind is GroupedSlots and shape[3] % 8:
        return
    compare(kind, "cpu", torch.float32, shape, 2e-6, of_none)


@pytest.mark.gpu
@pytest.mark.parametrize("of_none", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", (GroupedSlots, BlockedSlots, None))
def test_equals_a_loop_over_tokens_on_a_gpu(kind, dtype, tolerance, shape, of_none):
    if kind is GroupedSlots and shape[3] % 8:
        return
    compare(kind, "cuda", dtype, shape, tolerance, of_none)  # float32 products may run in tf32


def test_the_ways_are_equal_to_rounding():
    shape = (513, 8, 2, 64, 16)
    results = []
    for kind in (*KINDS, None):
        x, down, up, weights = tensors((513, 64), (8, 16, 64), (8, 64, 16), (513, 2), dtype=torch.float32)
        out = ours(kind, x, down, up, choices(*shape[:3]), weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, down, up, weights])])
    for result in results[1:]:
        for ours_, first in zip(result, results[0], strict=True):
            assert (ours_ - first).norm() / first.norm() < 3e-7


@pytest.mark.parametrize(
    ("device", "dtype", "num_experts", "gateable", "expected"),
    [
        ("cpu", torch.float32, 8, True, None),
        ("cpu", torch.float32, 8, False, HostSlots),
        ("cpu", torch.float32, 16, True, HostSlots),
        ("cpu", torch.bfloat16, 64, True, HostSlots),
        ("meta", torch.float32, 64, True, None),
        ("meta", torch.float32, 128, True, BlockedSlots),
        ("meta", torch.bfloat16, 64, True, None),
        ("meta", torch.bfloat16, 128, True, BlockedSlots),
        ("meta", torch.bfloat16, 8, False, BlockedSlots),
    ],
)
def test_which_way_is_taken(device, dtype, num_experts, gateable, expected):
    x = torch.empty(4, 2048, dtype=dtype, device=device)
    assert slots_for(x, x.new_empty(num_experts, 16, 2048), 2, gateable) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_experts", [8, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_no_way_waits_for_the_gpu(dtype, num_experts, dropout):
    x = torch.randn(300, 2048, dtype=dtype, device="cuda").requires_grad_()
    # small enough for sums over all tokens in float16
    down = torch.randn(num_experts, 16, 2048, device="cuda").mul_(2048**-0.5).requires_grad_()
    up = torch.randn(num_experts, 2048, 16, device="cuda").mul_(2048**-0.5).requires_grad_()
    weights = torch.rand(300, 2, device="cuda").requires_grad_()
    indices = choices(300, num_experts, 2).cuda()
    config = PerftConfig(num_experts=num_experts, num_experts_per_tok=2, dropout=dropout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        units.Units(config, down, up, training=True).routed(x, weights, indices).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(tensor.grad.isfinite().all() for tensor in (x, down, up, weights))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_has_the_same_mask_in_every_pass(kind):
    """The gradients by x and by the weights of a linear function are its coefficients: they tell the masks apart."""
    num_tokens, num_experts, k, width, rank = 70, 4, 2, 64, 8
    indices, mask = choices(num_tokens, num_experts, k), Mask.draw(0.3)
    x, down, up, weights = tensors(
        (num_tokens, width),
        (num_experts, rank, width),
        (num_experts, width, rank),
        (num_tokens, k),
        dtype=torch.float32,
    )
    slots = kind.of(indices, num_experts)
    ones = torch.ones_like(x)
    # what reaches z from each element of each slot's row
    kept = kind.gather(slots, ones, torch.eye(width).expand(num_experts, -1, -1).contiguous(), mask)
    assert set(kept.unique().tolist()) == {0, 1}
    assert 0.25 < 1 - kept.mean() < 0.35
    dense_x = x.detach().double().requires_grad_()
    dense_down = down.detach().double().requires_grad_()
    expert_S = F.pad(indices.flatten(), (0, 1)).index_select(0, slots.choice_S)
    real_S1 = (slots.choice_S < indices.numel()).unsqueeze(1)
    expected = torch.einsum("srd,sd->sr", dense_down[expert_S], kept.double() * dense_x[slots.token_S]) * real_S1
    z = gather_mm(x, down, slots, mask) * real_S1
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected.backward(gradient)
    z.backward(gradient.float())
    torch.testing.assert_close(x.grad.double(), dense_x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(down.grad.double(), dense_down.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", (*KINDS, None))
def test_tokens_in_chunks_give_the_same(monkeypatch, kind):
    monkeypatch.setattr(units, "slots_for", lambda *_: kind)
    config = PerftConfig(num_experts=4, num_experts_per_tok=2, rank=8)
    results = []
    for at_once in (100, 7):
        monkeypatch.setattr(units, "tokens_at_once", lambda *_, at_once=at_once: at_once)
        x, down, up, weights = tensors((50, 16), (4, 8, 16), (4, 16, 8), (50, 2), dtype=torch.float32)
        out = units.Units(config, down, up, training=True).routed(x, weights, choices(50, 4, 2))
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, down, up, weights])])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", (*KINDS, None))
def test_a_batch_without_tokens(kind):
    x, down, up, weights = tensors((0, 16), (4, 8, 16), (4, 16, 8), (0, 2), dtype=torch.float32)
    out = ours(kind, x, down, up, torch.empty(0, 2, dtype=torch.int64), weights)
    out.sum().backward()
    assert out.shape == (0, 16)
    assert down.grad.abs().max() == up.grad.abs().max() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", (GroupedSlots, BlockedSlots, None))
def test_autocast_on_a_gpu_keeps_the_dtype_of_the_operands(kind):
    num_tokens, num_experts, k, width, rank = SHAPES[0]
    x, down, up = tensors(
        (num_tokens, width), (num_experts, rank, width), (num_experts, width, rank), dtype=torch.bfloat16
    )
    x, down, up = (tensor.detach().cuda().requires_grad_() for tensor in (x, down, up))
    weights = torch.ones(num_tokens, k, dtype=torch.bfloat16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = ours(kind, x, down, up, choices(num_tokens, num_experts, k).cuda(), weights)
        loss = out.float().square().mean()
    assert out.dtype == torch.bfloat16
    loss.backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, down, up))


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 5, 19])
def test_chunks_of_any_size_give_the_same(monkeypatch, rows_per_chunk):
    monkeypatch.setattr(module, "_CPU_CHUNK_BYTES", rows_per_chunk * 16 * 4)
    compare(HostSlots, "cpu", torch.float32, (10, 4, 2, 16, 8), 2e-6)


def test_the_padded_rank_holds_exact_zeros():
    x, down = tensors((6, 16), (4, 5, 16), dtype=torch.float32)
    z = gather_mm(x, pad_rank(down), HostSlots.of(choices(6, 4, 2), 4))
    assert z.shape == (12, 8)
    assert torch.equal(z[:, 5:], torch.zeros(12, 3))


def test_slots_are_sorted_by_expert_and_keep_the_order_of_tokens():
    slots = HostSlots.of(torch.tensor([[2, 0], [0, 2], [2, 1]]), 4)
    assert slots.token_S.tolist() == [0, 1, 2, 0, 1, 2]
    assert slots.choice_S.tolist() == [1, 2, 5, 0, 3, 4]
    assert slots.ends_N.tolist() == [2, 3, 6, 6]


def test_blocks_have_slots_of_one_expert_and_padding(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2)
    slots = BlockedSlots.of(torch.tensor([[1, 3], [0, 1], [3, 1]]), 4)
    assert slots.choice_S.tolist()[:8] == [2, 6, 0, 3, 5, 6, 1, 4]
    assert set(slots.choice_S.tolist()[8:]) <= {6}
    assert slots.expert_G.tolist()[:4] == [0, 1, 1, 3]
    assert slots.slot_TK.tolist() == [[2, 6], [0, 3], [7, 4]]


@pytest.mark.parametrize("load", ["all on one", "balanced", "one each"])
def test_there_are_blocks_enough_for_any_routing(load):
    indices = {
        "all on one": torch.full((300, 1), 7),
        "balanced": torch.arange(8).repeat(65).view(-1, 1),  # one slot of each expert is alone in a block
        "one each": torch.arange(8).view(-1, 1),
    }[load]
    slots = BlockedSlots.of(indices, 8)
    real = slots.choice_S[slots.choice_S < indices.numel()]
    assert real.sort().values.tolist() == list(range(indices.numel()))
    assert torch.equal(slots.choice_S[slots.slot_TK.flatten()], torch.arange(indices.numel()))
    expert_S = slots.expert_G.repeat_interleave(64)
    assert torch.equal(expert_S[slots.slot_TK], indices)


def test_padding_takes_no_part_whatever_it_holds():
    indices = choices(10, 4, 2)
    x, z, down = tensors((10, 16), (20, 8), (4, 8, 16), dtype=torch.float32)
    host, blocked = HostSlots.of(indices, 4), BlockedSlots.of(indices, 4)
    in_blocks = torch.full((len(blocked.choice_S), 8), torch.nan)
    in_blocks[blocked.slot_TK.flatten()[host.choice_S]] = z.detach()
    torch.testing.assert_close(blocked.outer(in_blocks, x, 4, None), host.outer(z, x, 4, None))
    torch.testing.assert_close(blocked.scatter(in_blocks, down, 10, None), host.scatter(z, down, 10, None))
