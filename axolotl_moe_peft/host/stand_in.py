"""The plugin where this package cannot be used: it says why, in the runs that ask for an adapter of ours."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from ..registration import METHODS


def stand_in(reason: str) -> type[BasePlugin]:
    """A plugin that does nothing but refuse the adapters of this package.

    While Axolotl loads plugins is no time to say it: 0.19 swallows ImportErrors, 0.21 warns in every run of every
    exception of an installed plugin, and both then only say that the adapter is unknown.
    """

    class MoePeftPlugin(BasePlugin):
        def register(self, cfg: dict[str, Any]) -> None:
            if cfg.get("adapter") in METHODS:
                raise RuntimeError(reason)

    return MoePeftPlugin
