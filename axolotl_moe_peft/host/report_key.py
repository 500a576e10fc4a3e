"""`routing_report: true` in an adapter's block: whether a YAML has it, and whether it can be done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..registration import METHODS
from ..report.page import check_that_it_can_be_drawn
from .host_keys import REPORT


def wants_report(cfg: Mapping[str, Any]) -> bool:
    """Whether a YAML, raw or validated, asks for a report."""
    block = cfg.get(cfg.get("adapter")) if cfg.get("adapter") in METHODS else None
    return isinstance(block, Mapping) and block.get(REPORT) is True


def check_report(data: Mapping[str, Any]) -> None:
    """Check that a YAML that asks for a report can have one.

    Raises:
        ValueError: it has no evaluation data, or there is nothing to draw with.
    """
    key = f"{data['adapter']}.{REPORT}"
    if not data.get("test_datasets") and not float(data.get("val_set_size") or 0):
        raise ValueError(
            f"{key}: true needs evaluation data, which the routers are measured on, and there is none. Give "
            "`test_datasets`, or hold a part of `datasets` out with `val_set_size: 0.05`."
        )
    check_that_it_can_be_drawn()
