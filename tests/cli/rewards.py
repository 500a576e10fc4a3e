"""A reward for GRPO's tests, named in their YAML."""

from typing import Any


def share_of_a(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """How much of each completion is in the first half of the alphabet."""
    return [sum(character < "n" for character in text) / max(len(text), 1) for text in completions]
