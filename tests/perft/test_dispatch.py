"""Grouped low-rank products against a loop over tokens and their choices, gradients included."""

import pytest
import torch

from axolotl_moe_peft.perft import dispatch as module
from axolotl_moe_peft.perft.dispatch import dispatch, gather_mm, pad_rank, scatter_mm

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
        rows.append(sum(weights[t, j] * (up[e] @ (down[e] @ x[t])) for j, e in enumerate(experts)))
    return torch.stack(rows)


def ours(x, down, up, indices, weights):
    slots = dispatch(indices, len(down))
    z = gather_mm(x, pad_rank(down), slots) * weights.flatten()[slots.order_S].unsqueeze(-1)
    return scatter_mm(z, pad_rank(up.transpose(1, 2)), slots, len(x))


def compare(device: str, dtype: torch.dtype, shape, tolerance: float) -> None:
    num_tokens, num_experts, k, width, rank = shape
    indices = choices(num_tokens, num_experts, k)
    operands = tensors(
        (num_tokens, width), (num_experts, rank, width), (num_experts, width, rank), (num_tokens, k), dtype=dtype
    )
    reference = [o.detach().double().requires_grad_() for o in operands]
    expected = loop(*reference[:3], indices, reference[3])
    expected.square().sum().backward()

    operands = [o.detach().to(device).requires_grad_() for o in operands]
    out = ours(*operands[:3], indices.to(device), operands[3])
    out.backward((2 * expected.detach()).to(device, dtype))
    for name, ours_, theirs in [
        ("output", out, expected),
        *((f"gradient {i}", o.grad, r.grad) for i, (o, r) in enumerate(zip(operands, reference, strict=True))),
    ]:
        error = (ours_.cpu().double() - theirs).norm() / theirs.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.1e}"


# float64 takes the plain path, the others grouped_mm where the width is aligned (13 is not);
# bf16 keeps 8 bits, and z and the result are rounded to it
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_tokens(dtype, tolerance, shape):
    compare("cpu", dtype, shape, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_tokens_on_a_gpu(dtype, tolerance, shape):
    compare("cuda", dtype, shape, tolerance)  # float32 products may run in tf32


@pytest.mark.gpu
def test_autocast_on_a_gpu_keeps_the_dtype_of_the_operands():
    num_tokens, num_experts, k, width, rank = SHAPES[0]
    x, down, up = tensors(
        (num_tokens, width), (num_experts, rank, width), (num_experts, width, rank), dtype=torch.bfloat16
    )
    x, down, up = (tensor.detach().cuda().requires_grad_() for tensor in (x, down, up))
    weights = torch.ones(num_tokens, k, dtype=torch.bfloat16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = ours(x, down, up, choices(num_tokens, num_experts, k).cuda(), weights)
        loss = out.float().square().mean()
    assert out.dtype == torch.bfloat16
    loss.backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, down, up))


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 5, 19])
def test_chunks_of_any_size_give_the_same(monkeypatch, rows_per_chunk):
    monkeypatch.setattr(module, "_CPU_CHUNK_BYTES", rows_per_chunk * 16 * 4)
    compare("cpu", torch.float32, (10, 4, 2, 16, 8), 2e-6)


def test_the_padded_rank_holds_exact_zeros():
    x, down = tensors((6, 16), (4, 5, 16), dtype=torch.float32)
    slots = dispatch(choices(6, 4, 2), 4)
    z = gather_mm(x, pad_rank(down), slots)
    assert z.shape == (12, 8)
    assert torch.equal(z[:, 5:], torch.zeros(12, 3))


def test_slots_are_sorted_by_expert_and_keep_the_order_of_tokens():
    slots = dispatch(torch.tensor([[2, 0], [0, 2], [2, 1]]), 4)
    assert slots.token_S.tolist() == [0, 1, 2, 0, 1, 2]
    assert slots.order_S.tolist() == [1, 2, 5, 0, 3, 4]
    assert slots.ends_N.tolist() == [2, 3, 6, 6]


def test_only_narrow_tensors_are_kept_for_backward():
    num_tokens, width, rank, k = 64, 256, 8, 4
    x, down, up = tensors((num_tokens, width), (8, rank, width), (8, width, rank), dtype=torch.float32)
    kept = {x.data_ptr(): x, down.data_ptr(): down, up.data_ptr(): up}
    own = sum(t.numel() for t in kept.values())

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ours(x, down, up, choices(num_tokens, 8, k), torch.ones(num_tokens, k))
    extra = sum(t.numel() for t in kept.values() if t.is_floating_point()) - own
    assert extra <= 3 * num_tokens * k * rank  # never num_tokens * k * width
