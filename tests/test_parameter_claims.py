"""The papers' claims about numbers of parameters: the page says what is counted."""

from __future__ import annotations

import pytest

from tests.benchmarks import parameter_claims


def test_the_pages_table_is_that_of_the_command() -> None:
    expected = "write it anew: python -m tests.benchmarks.parameter_claims"
    assert parameter_claims.page_table() == parameter_claims.table(), expected


def test_the_settings_that_give_the_claims() -> None:
    found = {(claim.ours[1], claim.others[1]): claim.share for claim in parameter_claims.claims()}
    assert found[33_920, 1_703_936] == pytest.approx(0.02, rel=0.01)
    assert found[33_920, 12_651_520] == pytest.approx(0.003, rel=0.11)
    assert found[69_649, 201_326_592] == pytest.approx(0.0003, rel=0.16)
    assert found[80_706, 106_496] == pytest.approx(0.75, rel=0.02)
