"""Names that are a folder's or a repository's on the hub: looked for on the disk first."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import cached_file


def check_base_is_there(base_model: str) -> None:
    """Check that a base model whose name looks like that of a folder here is one, or is on the hub.

    What transformers says of a missing folder, above all offline, names neither the key nor the folder.

    Raises:
        ValueError: it is neither.
    """
    path = Path(base_model)
    looks_like_a_folder = base_model.startswith((".", "/", "~")) or (len(path.parts) > 1 and path.parent.is_dir())
    if path.exists() or not looks_like_a_folder:
        return
    try:
        cached_file(base_model, "config.json")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base_model: there is no folder {base_model!r} here, and the hub does not give a model of that name "
            f"either ({str(error).splitlines()[0]}). Give a model's folder, or a repository's id."
        ) from None
