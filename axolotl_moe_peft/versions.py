"""The versions of the host that this package knows, checked before anything of theirs is imported."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# package: (oldest that works, first release line that is not tested)
SUPPORTED = {"transformers": ("5.16", "5.17"), "peft": ("0.20", "0.21"), "axolotl": ("0.19", "0.20")}


def check_version(package: str) -> None:
    """Refuse a version that is too old; warn once of one that is newer than tested.

    Raises:
        RuntimeError: too old or missing. Not an ImportError: Axolotl swallows those while it loads plugins, and then
            only says that the adapter is unknown.
    """
    oldest, untested = SUPPORTED[package]
    try:
        installed = Version(version(package))
    except PackageNotFoundError:
        raise RuntimeError(f"axolotl_moe_peft needs {package}>={oldest},<{untested}; it is not installed.") from None
    if installed < Version(oldest):
        raise RuntimeError(
            f"axolotl_moe_peft needs {package}>={oldest},<{untested}, but {package} {installed} is installed. "
            f"Upgrade it: pip install '{package}>={oldest},<{untested}'."
        )
    if installed >= Version(untested):
        warnings.warn(
            f"axolotl_moe_peft is tested with {package}>={oldest},<{untested}; {package} {installed} is newer.",
            stacklevel=3,
        )
