"""The page that says which method learnt best has the figures of the runs, and takes those of one setting only."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import quality_page


def test_the_pages_tables_and_figure_are_those_of_the_results() -> None:
    runs, ratios = quality_page.read(quality_page.RESULTS)
    expected = "write it anew: python -m tests.benchmarks.quality_page"
    assert quality_page.page_tables() == quality_page.tables(runs, ratios), expected
    drawn = quality_page.FIGURE.read_text(encoding="utf-8")
    assert {name for name in runs if quality_page.METHODS[name].attach} <= set(re.findall(r">([^<]+)</text>", drawn))


@pytest.mark.parametrize(
    ("second", "error"),
    [
        ({"seed": 1, "steps": 20}, "runs of PT have several learning rates or numbers of steps"),
        ({"mean": 0.5}, r"runs of PT have the seeds \[0, 0\]"),
    ],
)
def test_runs_that_do_not_go_together_are_refused(tmp_path: Path, second: dict[str, float], error: str) -> None:
    path = tmp_path / "results.jsonl"
    run = {"method": "PT", "chooses": False, "learning_rate": 0.03, "steps": 60, "seed": 0}
    path.write_text(json.dumps(run) + "\n" + json.dumps(run | second), encoding="utf-8")
    with pytest.raises(ValueError, match=error):
        quality_page.read(path)


def test_a_method_whose_steps_are_timed_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = [json.dumps({"method": "PT", "step / base": ratio}) for ratio in (1.2, 1.6)]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match="two lines say how long a step of PT takes"):
        quality_page.read(path)


def test_runs_that_choose_a_learning_rate_are_not_of_the_page(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run = {"method": "PT", "chooses": True, "learning_rate": 0.03, "steps": 20, "seed": 0}
    path.write_text(json.dumps(run) + "\n" + json.dumps({"method": "PT", "step / base": 1.25}), encoding="utf-8")
    assert quality_page.read(path) == ({}, {"PT": 1.25})
