"""The matrix of tests/README.md: which features of the host are tested with which adapter, written by the tests.

A test that shows how an adapter works with a feature carries

    @pytest.mark.matrix("packing: on", "{adapter}")                       # a row and a column
    @pytest.mark.matrix("merging", "perft", cell="refused: its updates depend on the token")

in which names in braces are the test's parameters. A cell exists when every test of it has passed: `CPU` or `GPU` by
the test's marker, or the text of `cell`, whose reason becomes a note. `pytest --write-matrix` writes the page; without
it a run of all tests fails where the page says anything else than the run.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- matrix: written by pytest --write-matrix -->", "<!-- matrix ends -->"
COLUMNS = (
    "lora",
    "perft routed",
    "perft embedded",
    "perft dense",
    "tt_lora",
    "tt_lora_moe",
    "pt_moe",
)
_ALIASES = {"perft": "perft routed", "routed": "perft routed"}
_SKIPPED = "(GPU)"


class Matrix:
    """Collects the cells of a run and writes or checks the page."""

    def __init__(self, write: bool) -> None:
        self.write = write
        self.cells: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
        self.problem = ""

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        parameters = getattr(item, "callspec", None)
        for marker in item.iter_markers("matrix"):
            row, column = (text.format(**(parameters.params if parameters else {})) for text in marker.args)
            column = _ALIASES.get(column, column)
            if column not in COLUMNS:
                raise ValueError(f"@pytest.mark.matrix: column {column!r}; one of {COLUMNS}")
            cell = marker.kwargs.get("cell") or ("GPU" if item.get_closest_marker("gpu") else "CPU")
            item.user_properties.append(("matrix", (row, column, cell)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" or (report.when == "setup" and report.passed):
            return
        for name, value in report.user_properties:
            if name == "matrix":
                row, column, cell = value
                cells = self.cells[row, column]
                cell = _SKIPPED if report.skipped else cell
                cells[cell] = cells.get(cell, True) and not report.failed

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config = session.config
        if hasattr(config, "workerinput"):  # a process of pytest-xdist: its reports go to the controller
            return
        table = self.table()
        head, _, rest = PAGE.read_text().partition(BEGIN)
        written, _, tail = rest.partition(END)
        options = config.option
        all_tests = config.args_source is config.ArgsSource.TESTPATHS and not (options.keyword or options.markexpr)
        if self.write:
            PAGE.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}")
        elif all_tests and not session.testsfailed and _without_gpu(written.strip()) != _without_gpu(table):
            self.problem = "tests/README.md differs from what these tests ran: pytest -n 2 --write-matrix"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.problem:
            terminalreporter.write_line(self.problem, red=True)

    def table(self) -> str:
        """The matrix and its notes in Markdown."""
        notes: list[str] = []
        lines = ["| feature | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for row in sorted({row for row, _ in self.cells}):
            cells = (self._cell(row, column, notes) for column in COLUMNS)
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]).rstrip()

    def _cell(self, row: str, column: str, notes: list[str]) -> str:
        texts = []
        for cell, passed in sorted(self.cells.get((row, column), {}).items()):
            word, _, reason = cell.partition(": ")
            if reason and reason not in notes:
                notes.append(reason)
            if passed:
                texts.append(f"{word} [{notes.index(reason) + 1}]" if reason else word)
            else:
                texts.append("fails")
        return ", ".join(texts)


def _without_gpu(table: str) -> str:
    """The table, the same whether the GPU's tests ran or were skipped."""
    return re.sub(r"\(GPU\)", "GPU", table)
