"""Factorisations: as few parameters as an exhaustive search finds, at any size, and errors that help."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
import torch

from axolotl_moe_peft.tt_lora import factors as factors_module
from axolotl_moe_peft.tt_lora.factors import Factors, auto_factors, check_product, nearest_factors

# (inputs, outputs, rank), and the authors' hand-picked factors of both sides
AUTHORS = [
    (2048, 2048, 5, (16, 8, 4, 4), (16, 8, 4, 4)),
    (2048, 512, 5, (16, 16, 4, 2), (16, 16, 2)),
    (3072, 3072, 5, (16, 4, 4, 3, 2, 2), (16, 4, 4, 3, 2, 2)),
    (3072, 1024, 5, (16, 4, 4, 3, 2, 2), (16, 4, 4, 2, 2)),
    (4096, 4096, 5, (16, 4, 4, 4, 2, 2), (16, 4, 4, 4, 2, 2)),
    (4096, 1024, 5, (16, 4, 4, 4, 2, 2), (16, 4, 4, 2, 2)),
    (8192, 8192, 5, (16, 4, 4, 4, 2, 2, 2), (16, 4, 4, 4, 2, 2, 2)),
    (8192, 1024, 5, (16, 4, 4, 4, 2, 2, 2), (16, 4, 4, 2, 2)),
    (768, 768, 5, (64, 4, 3), (64, 4, 3)),
    (768, 768, 4, (12, 8, 8), (12, 8, 2, 2, 2)),
    (4096, 4096, 4, (16, 8, 8, 4), (16, 8, 8, 4)),
]
# (inputs, outputs, rank, cores) and the parameters that the authors' exhaustive search finds
SEARCHED = [
    (2048, 2048, 6, 6, 1536),
    (2048, 2048, 6, 8, 1248),
    (2048, 2048, 6, 10, 1200),
    (2048, 512, 6, 10, 1056),
    (2048, 2048, 5, 8, 920),
    (2048, 512, 5, 7, 820),
    (768, 2304, 6, 6, 1344),
    (768, 768, 6, 6, 1104),
    (768, 768, 6, 10, 984),
]


def parameters(factors: Factors, rank: int) -> int:
    """By the cores: (1, s, r), (r, s, r) .., (r, s, 1)."""
    shape = factors.inputs + tuple(reversed(factors.outputs))
    ranks = [1, *[rank] * (len(shape) - 1), 1]
    return sum(ranks[k] * size * ranks[k + 1] for k, size in enumerate(shape))


def ordered_factorisations(size: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield from [(size,)] if size > 1 else []
    else:
        for first in (f for f in range(2, size + 1) if size % f == 0):
            yield from ((first, *rest) for rest in ordered_factorisations(size // first, count - 1))


def exhaustive(inputs: int, outputs: int, rank: int, cores: int) -> int:
    return min(
        parameters(Factors(a, b), rank)
        for k in range(1, cores)
        for a in ordered_factorisations(inputs, k)
        for b in ordered_factorisations(outputs, cores - k)
    )


def assert_factorises(factors: Factors, inputs: int, outputs: int) -> None:
    assert (math.prod(factors.inputs), math.prod(factors.outputs)) == (inputs, outputs)
    for side in factors:
        assert all(f >= 2 for f in side) or side == (1,)


@pytest.mark.parametrize("rank", [1, 2, 5, 16])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 36), (64, 96), (30, 7), (128, 32), (210, 16), (60, 60)])
def test_auto_has_as_few_parameters_as_the_exhaustive_search(inputs, outputs, rank):
    searched = {}
    for cores in range(2, 9):
        try:
            searched[cores] = exhaustive(inputs, outputs, rank, cores)
        except ValueError:  # the sizes have not as many factors
            continue
        chosen = auto_factors(inputs, outputs, rank, cores)
        assert_factorises(chosen, inputs, outputs)
        assert len(chosen.tt_shape) == cores
        assert chosen.num_parameters(rank) == parameters(chosen, rank) == searched[cores]
    unasked = auto_factors(inputs, outputs, rank)
    assert parameters(unasked, rank) == min(searched.values())
    assert len(unasked.tt_shape) == min(cores for cores, count in searched.items() if count == min(searched.values()))


@pytest.mark.parametrize(("inputs", "outputs", "rank", "cores", "expected"), SEARCHED)
def test_auto_finds_what_the_authors_search_finds(inputs, outputs, rank, cores, expected):
    assert auto_factors(inputs, outputs, rank, cores).num_parameters(rank) == expected


@pytest.mark.parametrize(("inputs", "outputs", "rank", "m", "n"), AUTHORS)
def test_auto_never_needs_more_than_the_authors_at_the_same_rank_and_core_count(inputs, outputs, rank, m, n):
    authors = Factors(m, n)
    assert_factorises(authors, inputs, outputs)
    chosen = auto_factors(inputs, outputs, rank, len(m) + len(n))
    assert len(chosen.tt_shape) == len(m) + len(n)
    assert chosen.num_parameters(rank) <= parameters(authors, rank)


# Saved adapters rely on these: files with `factors: auto` do not hold them.
@pytest.mark.parametrize(
    ("inputs", "outputs", "rank", "m", "n"),
    [
        (2048, 2048, 5, (32, 4, 4, 4), (32, 4, 4, 4)),
        (2048, 512, 5, (32, 4, 4, 4), (16, 2, 4, 4)),
        (4096, 4096, 5, (32, 4, 4, 8), (32, 4, 4, 8)),
        (4096, 14336, 5, (32, 4, 4, 8), (32, 7, 8, 8)),
        (4096, 14336, 16, (64, 4, 4, 4), (128, 4, 4, 7)),
        (768, 768, 5, (16, 3, 4, 4), (16, 3, 4, 4)),
        (768, 2304, 5, (16, 3, 4, 4), (24, 4, 4, 6)),
        (2048, 2048, 64, (256, 2, 4), (256, 2, 4)),
        (32, 32, 5, (16, 2), (16, 2)),
    ],
)
def test_the_choice_of_auto_is_fixed(inputs, outputs, rank, m, n):
    assert auto_factors(inputs, outputs, rank) == Factors(m, n)


@pytest.mark.parametrize("rank", [4, 5, 8, 16, 32])
@pytest.mark.parametrize("width", [2048, 2304, 3072, 4096, 5120, 8192, 14336])
def test_the_ends_are_several_times_the_rank(width, rank):
    chosen = auto_factors(width, width, rank)
    assert 6 <= len(chosen.tt_shape) <= 8
    assert min(chosen.inputs[0], chosen.outputs[0]) >= 2.5 * rank
    assert max(chosen.inputs[1:] + chosen.outputs[1:]) < chosen.inputs[0]


@pytest.mark.parametrize(
    ("inputs", "outputs", "cores", "expected"),
    [
        (509, 2048, 4, Factors((509,), (32, 8, 8))),  # primes have one factor
        (509, 2, 6, Factors((509,), (2,))),
        (2048, 1, None, Factors((16, 2, 4, 4, 4), (1,))),
        (1, 1, 3, Factors((1,), (1,))),
        (768, 50257, None, Factors((16, 3, 4, 4), (1733, 29))),
        (16, 16, 100, Factors((2, 2, 2, 2), (2, 2, 2, 2))),
    ],
)
def test_awkward_sizes(inputs, outputs, cores, expected):
    chosen = auto_factors(inputs, outputs, 5, cores)
    assert_factorises(chosen, inputs, outputs)
    assert chosen == expected


@pytest.mark.parametrize(
    ("inputs", "outputs", "cores"),
    [(14336, 4096, None), (14336, 4096, 14), (28672, 8192, 8), (50257, 768, None), (152064, 5120, 12)],
)
def test_the_search_takes_well_below_a_second(inputs, outputs, cores):
    for function in vars(factors_module).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    start = time.process_time()
    auto_factors(inputs, outputs, 5, cores)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("given", "size", "expected"),
    [
        ((16, 8, 4, 2), 2048, [(16, 8, 4, 4), (16, 8, 8, 2), (16, 16, 4, 2)]),
        ((64, 4, 4), 768, [(48, 4, 4), (64, 3, 4), (64, 4, 3)]),
        ((100, 7, 3), 2048, [(128, 8, 2), (64, 8, 4), (128, 4, 4)]),
        ((4, 4), 509, [(509,)]),  # no two factors: its only one
        ((2, 2, 2, 2), 12, [(3, 2, 2)]),
        ((3,), 1, [(1,)]),
    ],
)
def test_nearest_factors_change_as_little_as_possible(given, size, expected):
    assert nearest_factors(given, size) == expected


def test_a_wrong_product_shows_the_product_and_the_nearest():
    check_product([16, 8, 4, 4], 2048, "")
    with pytest.raises(ValueError) as error:
        check_product([16, 8, 4, 2], 2048, "tt_lora.factors: q_proj.in: q_proj has 2048 inputs")
    assert str(error.value) == (
        "tt_lora.factors: q_proj.in: q_proj has 2048 inputs, but [16, 8, 4, 2] multiply to 1024. The nearest that do: "
        "[16, 8, 4, 4] or [16, 8, 8, 2] or [16, 16, 4, 2]."
    )


WIDTHS = (576, 768, 960, 1024, 1536, 2048, 2304, 3072, 3584, 4096, 5120, 8192, 14336)


@pytest.mark.parametrize("rank", [1, 4, 5, 8, 16, 64])
def test_auto_wastes_nothing_at_the_usual_widths(rank):
    for inputs in WIDTHS:
        for outputs in (*WIDTHS, 64, 128, 256):
            chosen = auto_factors(inputs, outputs, rank)
            assert (chosen.num_wasted(rank), set(chosen.true_ranks(rank))) == (0, {rank}), chosen


@pytest.mark.parametrize(
    ("given", "rank", "ranks", "wasted"),
    [
        (Factors((2, 4, 8), (2, 4, 8)), 5, [2, 5, 5, 5, 2], 2 * (6 + 60)),
        (Factors((2, 2, 2), (8,)), 5, [2, 4, 5], (10 + 50 + 50 + 40) - (4 + 16 + 40 + 40)),
        (Factors((16, 2), (2,)), 4, [4, 2], (64 + 32 + 8) - (64 + 16 + 4)),
    ],
)
def test_true_ranks_are_those_of_the_unfoldings(given, rank, ranks, wasted):
    assert (given.true_ranks(rank), given.num_wasted(rank)) == (ranks, wasted)
    generator, whole = torch.Generator().manual_seed(0), torch.ones(1, 1, dtype=torch.float64)
    sizes = [1, *[rank] * (len(given.tt_shape) - 1), 1]
    for k, size in enumerate(given.tt_shape):
        core = torch.randn(sizes[k], size, sizes[k + 1], generator=generator, dtype=torch.float64)
        whole = (whole @ core.flatten(1)).view(-1, sizes[k + 1])
    for k in range(1, len(given.tt_shape)):
        unfolding = whole.view(math.prod(given.tt_shape[:k]), -1)
        assert torch.linalg.matrix_rank(unfolding) == ranks[k - 1]
