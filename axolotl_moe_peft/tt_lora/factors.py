"""Factorisations of a matrix's two sides: the sizes of a tensor train's cores.

The cores of factors (m_1 .. m_K) of the inputs and (n_1 .. n_L) of the outputs have the sizes m_1 .. m_K, n_L .. n_1,
so the ends of the train are m_1 and n_1. With rank r a matrix has r (m_1 + n_1) + r^2 (all others) parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple

# At the widths of language models six to eight cores have almost the fewest parameters. Each further one saves little,
# while the authors' language models get worse with it, and it is one more product of small matrices to compute.
_DEFAULT_MOST_CORES = 8


class Factors(NamedTuple):
    """Factors of one matrix. Their products are its number of inputs and of outputs."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def tt_shape(self) -> tuple[int, ...]:
        """Sizes of the cores, first to last."""
        return self.inputs + self.outputs[::-1]

    def num_parameters(self, rank: int) -> int:
        return _cost(self.inputs, rank) + _cost(self.outputs, rank)

    def true_ranks(self, rank: int) -> list[int]:
        """The rank of each cut between two cores: no more than the product of the sizes on either side."""
        shape = self.tt_shape
        return [min(rank, math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]

    def num_wasted(self, rank: int) -> int:
        """Parameters more than a tensor train of the true ranks has, which computes the same matrices."""
        ranks = [1, *self.true_ranks(rank), 1]
        return self.num_parameters(rank) - sum(a * size * b for a, size, b in zip(ranks, self.tt_shape, ranks[1:]))


@cache
def auto_factors(in_features: int, out_features: int, rank: int, num_cores: int | None = None) -> Factors:
    """The factors with the fewest parameters.

    A saved adapter with `factors: auto` does not hold its factors: what this returns is part of the format.

    Args:
        in_features, out_features: the matrix.
        rank: the tensor train's rank.
        num_cores: the number of cores of both sides together; if the sizes do not allow it (2048 has at most 11
            factors), the nearest number that they allow. None: the number up to 8 with the fewest parameters.
    """
    most_in, most_out = _most_factors(in_features), _most_factors(out_features)
    most = most_in + most_out
    if num_cores is None:
        wishes: Iterable[int] = range(2, min(_DEFAULT_MOST_CORES, most) + 1)
    else:
        wishes = [min(max(num_cores, 2), most)]
    candidates = [
        Factors(_cheapest(in_features, k, rank), _cheapest(out_features, wish - k, rank))
        for wish in wishes
        for k in range(max(1, wish - most_out), min(most_in, wish - 1) + 1)
    ]
    # of equals the fewest cores, then the most even split
    return min(
        candidates, key=lambda f: (f.num_parameters(rank), len(f.tt_shape), abs(len(f.inputs) - len(f.outputs)))
    )


def check_product(factors: Sequence[int], size: int, what: str) -> None:
    """Check that the factors multiply to a side of a matrix.

    Args:
        factors: the given factors of one side.
        size: the number of inputs or outputs.
        what: begins the message: the key, and what has how many inputs or outputs.

    Raises:
        ValueError: they do not; the message has their product and the nearest factors that do.
    """
    product = math.prod(factors)
    if product != size:
        nearest = " or ".join(str(list(f)) for f in nearest_factors(factors, size))
        raise ValueError(f"{what}, but {list(factors)} multiply to {product}. The nearest that do: {nearest}.")


def nearest_factors(factors: Sequence[int], size: int, most: int = 3) -> list[tuple[int, ...]]:
    """Up to `most` lists of as many factors whose product is `size`.

    As few as possible of the given factors are changed, and by as little as possible (in logarithms). A size that has
    not as many factors gives its prime factors.
    """
    for num_changed in range(1, len(factors) + 1):
        distances = {}
        for positions in combinations(range(len(factors)), num_changed):
            kept = math.prod(f for i, f in enumerate(factors) if i not in positions)
            if size % kept:
                continue
            for new in _ordered(size // kept, num_changed):
                candidate = list(factors)
                for i, f in zip(positions, new):
                    candidate[i] = f
                distances[tuple(candidate)] = sum(abs(math.log(c / f)) for c, f in zip(candidate, factors))
        if distances:
            return sorted(distances, key=lambda c: (round(distances[c], 9), c))[:most]
    return [tuple(reversed(_prime_factors(size))) or (1,)]


def _cost(factors: Sequence[int], rank: int) -> int:
    return rank * factors[0] + rank * rank * sum(factors[1:])


@cache
def _cheapest(size: int, count: int, rank: int) -> tuple[int, ...]:
    """`count` factors of one side: its end, then the others ascending, which is the cheapest order to multiply."""
    if count == 1:
        return (size,)
    candidates = [
        (end, *_least_sum(size // end, count - 1))
        for end in _divisors(size)
        if end > 1 and _num_prime_factors(size // end) >= count - 1
    ]
    return min(candidates, key=lambda f: (_cost(f, rank), -f[0]))  # of equals the largest end


@cache
def _least_sum(size: int, count: int) -> tuple[int, ...]:
    """`count` factors of at least 2, ascending, with the smallest sum; `size` must have as many."""
    if count == 1:
        return (size,)
    candidates = [
        tuple(sorted((f, *_least_sum(size // f, count - 1))))
        for f in _divisors(size)
        if f > 1 and _num_prime_factors(size // f) >= count - 1
    ]
    return min(candidates, key=lambda f: (sum(f), f))


def _ordered(size: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every list of `count` factors of at least 2 with this product."""
    if count == 1:
        if size > 1:
            yield (size,)
        return
    for f in _divisors(size):
        if f > 1 and _num_prime_factors(size // f) >= count - 1:
            for rest in _ordered(size // f, count - 1):
                yield (f, *rest)


def _most_factors(size: int) -> int:
    return max(1, _num_prime_factors(size))  # a size of 1 has one factor, 1


def _num_prime_factors(size: int) -> int:
    return len(_prime_factors(size))


@cache
def _prime_factors(size: int) -> tuple[int, ...]:
    primes, p = [], 2
    while p * p <= size:
        while size % p == 0:
            primes.append(p)
            size //= p
        p += 1
    return (*primes, size) if size > 1 else tuple(primes)


@cache
def _divisors(size: int) -> tuple[int, ...]:
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return tuple(sorted({*small, *(size // d for d in small)}))
