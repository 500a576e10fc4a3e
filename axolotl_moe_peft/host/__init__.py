"""What knows Axolotl: the plugin, its YAML blocks and their checks, its callback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..versions import check_versions

if TYPE_CHECKING:
    from axolotl.integrations.base import BasePlugin


def plugin_class(unusable: str | None) -> type[BasePlugin]:
    """MoePeftPlugin, or what stands in for it where this package cannot be used.

    Args:
        unusable: why the methods cannot be used, if they cannot.

    Raises:
        RuntimeError: no Axolotl is installed.
    """
    if unusable is None:
        try:
            check_versions("axolotl")
        except RuntimeError as error:
            unusable = str(error)
    if unusable is None:
        from .plugin import MoePeftPlugin

        return MoePeftPlugin
    try:
        from .stand_in import stand_in
    except ModuleNotFoundError:
        raise RuntimeError(unusable) from None
    return stand_in(unusable)
