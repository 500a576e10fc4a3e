"""What adapters keep of a token for backward: the input that they cannot do without, and their bottlenecks."""

import pytest

from tests.benchmarks.saved_tensors import ROWS, measure

OURS = {name: row for name, row in ROWS.items() if "PEFT" not in name}


@pytest.fixture(scope="module")
def kept() -> dict[str, float]:
    return measure(OURS)


@pytest.mark.parametrize("name", OURS)
def test_no_more_is_kept_than_an_adapter_needs(kept, name):
    assert kept[name] <= OURS[name].bound
