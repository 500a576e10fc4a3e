"""Files that are complete or absent."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

_CHUNK = 1 << 18


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def new_part(folder: Path) -> Path:
    """Make an empty folder beside `folder`, to be given its name once it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    return part
