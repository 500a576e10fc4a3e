"""The matrix of tests/README.md, from the runs of several stacks (see matrix.py).

    python -m tests.matrix_page a.json b.json c.json            # writes the page
    python -m tests.matrix_page --check a.json b.json c.json    # fails where the page says anything else

A file's name is the stack's on the page: `CPU ab` is a cell that passed on the stacks of a.json and b.json. Of a stack
of which a part ran (`--one-in`, or `--until`) the check asks that the page has what ran, and not that all of it ran.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.matrix import COLUMNS, SKIPPED

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- matrix: written by python -m tests.matrix_page -->", "<!-- matrix ends -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix_page")
    parser.add_argument("--check", action="store_true", help="compare the page, instead of writing it")
    parser.add_argument("files", type=Path, nargs="+", help="what `pytest --matrix=FILE` wrote on each stack")
    arguments = parser.parse_args()
    runs = {path.stem: json.loads(path.read_text()) for path in arguments.files}
    parts = [name for name, run in runs.items() if not run["whole"]]
    if parts and not arguments.check:
        sys.exit(
            "".join(f"{name}.json has a part of the tests alone. " for name in parts)
            + "The page is written from whole runs: `pytest --matrix=FILE` without --one-in and --until."
        )
    head, _, rest = PAGE.read_text().partition(BEGIN)
    written, _, tail = rest.partition(END)
    page = _legend(runs) + "\n\n" + table(runs)
    if not arguments.check:
        PAGE.write_text(f"{head}{BEGIN}\n\n{page}\n\n{END}{tail}")
    elif different := _different(_cells(written), _cells(page), parts):
        sys.exit(
            "tests/README.md differs from what these tests ran:\n"
            + "\n".join(different)
            + "\nFrom whole runs of the tests, write it: python -m tests.matrix_page "
            + " ".join(map(str, arguments.files))
        )


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The matrix and its notes in Markdown.

    Args:
        runs: by the stack's name, what `pytest --matrix` wrote.
    """
    stacks: dict[tuple[str, str], dict[str, str]] = {}  # of a row and column, by cell
    for name, run in runs.items():
        for row, column, cell, passed in run["cells"]:
            cells = stacks.setdefault((row, column), {})
            cell = cell if passed else "fails"
            cells[cell] = cells.get(cell, "") + name
    notes: list[str] = []
    lines = ["| feature | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in sorted({row for row, _ in stacks}):
        texts = (", ".join(_texts(stacks.get((row, column), {}), notes)) for column in COLUMNS)
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]).rstrip()


def _texts(cells: dict[str, str], notes: list[str]) -> Iterator[str]:
    for cell, names in sorted(cells.items()):
        word, _, reason = cell.partition(": ")
        if word in ("GPU", SKIPPED):  # run by itself, on one stack
            if word == "GPU" or "GPU" not in cells:
                yield word
            continue
        if reason and reason not in notes:
            notes.append(reason)
        yield f"{word} [{notes.index(reason) + 1}] {names}" if reason else f"{word} {names}"


def _legend(runs: dict[str, dict[str, Any]]) -> str:
    return "\n".join(f"- {name}: {run['stack']}" for name, run in runs.items())


def _cells(page: str) -> set[tuple[str, str, str, str]]:
    """(row, column, word and reason, stack) of all cells, the same whether the GPU's tests ran or were skipped."""
    lines = [line.strip() for line in page.splitlines()]
    notes = dict(line.split(". ", 1) for line in lines if re.match(r"\d+\. ", line))
    found = set()
    for line in lines:
        row, *texts = [text.strip() for text in line.strip("|").split("|")]
        if line.startswith("|") and len(texts) == len(COLUMNS) and texts not in ([*COLUMNS], ["---"] * len(COLUMNS)):
            for column, text in zip(COLUMNS, texts):
                for word, note, stacks in re.findall(r"([^,\s][^,\[]*?)(?: \[(\d+)\])?(?: ([a-z]+))?(?:, |$)", text):
                    word = f"{word}: {notes[note]}" if note else re.sub(r"^\(GPU\)$", "GPU", word)
                    found |= {(row, column, word, stack) for stack in stacks or ("",)}
    return found


def _different(
    said: set[tuple[str, str, str, str]], ran: set[tuple[str, str, str, str]], parts: list[str]
) -> list[str]:
    # a test of the GPU names no stack, and may be on any one's part that did not run
    missing = {cell for cell in said - ran if cell[-1] not in (parts and ["", *parts])}
    return sorted(
        [f"only on the page: {' | '.join(cell)}" for cell in missing]
        + [f"only in the tests: {' | '.join(cell)}" for cell in ran - said]
    )


if __name__ == "__main__":
    main()
