"""The versions of the libraries that this package knows, checked before anything of theirs is imported."""

from __future__ import annotations

import functools
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# package: (oldest that works, first release line that is not tested)
SUPPORTED = {"transformers": ("5.16", "5.25"), "peft": ("0.20", "0.22"), "axolotl": ("0.19", "0.22")}


def needed(package: str) -> str:
    """The versions of a package that are tested, as pip takes them."""
    oldest, untested = SUPPORTED[package]
    return f"{package}>={oldest},<{untested}"


def check_versions(*packages: str) -> None:
    """Refuse versions that are too old.

    Raises:
        RuntimeError: too old or missing. Not an ImportError: Axolotl 0.19 swallows those while it loads plugins, and
            then only says that the adapter is unknown.
    """
    for package in packages:
        try:
            installed = Version(version(package))
        except PackageNotFoundError:
            raise RuntimeError(f"axolotl_moe_peft needs {needed(package)}; it is not installed.") from None
        if installed < Version(SUPPORTED[package][0]):
            raise RuntimeError(
                f"axolotl_moe_peft needs {needed(package)}, but {package} {installed} is installed. "
                f"Upgrade it: pip install '{needed(package)}'."
            )


@functools.cache
def warn_of_newer_versions() -> None:
    """Warn once of libraries newer than tested; to be called where an adapter of this package is used."""
    for package, (_, untested) in SUPPORTED.items():
        if package in sys.modules and (installed := Version(version(package))) >= Version(untested):
            warnings.warn(
                f"axolotl_moe_peft is tested with {needed(package)}; {package} {installed} is newer.",
                stacklevel=3,
            )
