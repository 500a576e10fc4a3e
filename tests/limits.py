"""The table of limits (tests/README.md) of Axolotl's keys that are refused, written by `python -m tests.limits`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from axolotl_moe_peft.host.host_keys import HOST_KEYS, HostKey
from axolotl_moe_peft.registration import METHODS

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- keys: written by python -m tests.limits -->", "<!-- keys end -->"


def key_with_values(key: HostKey) -> str:
    """The key as a YAML has it, with the values that are refused and what stands beside it."""
    text = f"`{key.name}: {key.shown}`" if key.shown else f"`{key.name}`"
    beside = " or ".join(f"`{entry}`" for entry in key.beside)
    losses = " and router losses" if key.losses else ""
    without = f" without {' or '.join(f'`{entry}`' for entry in key.unless)}" if key.unless else ""
    return (f"{text} with {beside}{losses}" if beside else text) + without


def adapters(key: HostKey) -> list[str]:
    """The adapters with which the key is refused."""
    return [name for name in METHODS if key.concerns(name)]


def rows() -> list[tuple[str, str, str, str]]:
    """(keys, adapters, reason, what to write) of the table's lines; keys of one reason share a line."""
    lines = []
    for key in HOST_KEYS:
        reasons = {key.reason_for(name): [] for name in adapters(key)}
        for name in adapters(key):
            reasons[key.reason_for(name)].append(name)
        for reason, names in reasons.items():
            instead = (
                f"`{'`, `'.join(key.own)}` of the block" if key.own else key.instead or "Set the coefficients to 0."
            )
            who = "all" if len(names) == len(METHODS) else ", ".join(names)
            reason = reason or "the block has keys of its own"
            lines.append((key_with_values(key), who, reason[0].upper() + reason[1:], instead))
    lines = [(", ".join(line[0] for line in same), *rest) for rest, same in groupby(lines, lambda line: line[1:])]
    return lines


def table() -> str:
    """The rows in Markdown."""
    head = ["| key | with | why | instead |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows())])


def page_table() -> str:
    """The table as the page has it."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")
