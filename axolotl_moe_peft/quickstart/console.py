"""What a quick start says."""

from __future__ import annotations

import sys
from typing import NoReturn


class Steps:
    """Announces one numbered step after the other."""

    def __init__(self, total: int) -> None:
        self.total, self.number = total, 0

    def __call__(self, text: str) -> None:
        self.number += 1
        print(f"\n[{self.number}/{self.total}] {text}", flush=True)


def fail(message: str) -> NoReturn:
    sys.exit(f"\nquick start: {message}")
