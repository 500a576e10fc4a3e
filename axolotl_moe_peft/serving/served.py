"""What is served, whichever engine does it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from ..shared.config import AdapterConfig


class Served:
    """What is to be served.

    Args:
        adapter, config: folder or hub id, and its configuration.
        base: folder or hub id of the base model.
        port: of the server.
        scratch: a folder that is there as long as the server runs.

    Attributes:
        folder: of the adapter; one of the hub is fetched.
        name: of the adapter as a model: the folder's, or the hub id.
    """

    def __init__(self, adapter: str, config: AdapterConfig, base: str, port: int, scratch: Path) -> None:
        self.config, self.base, self.port, self.scratch = config, base, port, scratch
        is_local = Path(adapter).is_dir()
        # the user's own adapter, of the revision that PEFT takes
        self.folder = Path(adapter if is_local else snapshot_download(adapter)).resolve()  # nosec B615
        self.name = self.folder.name if is_local else adapter

    @property
    def tokenizer(self) -> str:
        """Where its tokenizer is, which training may have given another chat template."""
        return str(self.folder) if (self.folder / "tokenizer_config.json").is_file() else self.base
