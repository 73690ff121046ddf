"""Rows that a part writes while it runs, and the JSON file and Markdown table that check.py builds from them.

Each part runs in its own process and appends one JSON line per row, so a part that is stopped early keeps its finished rows.
"""

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One check or measurement. `ok` is None for a measurement, which can't fail."""

    name: str
    value: str = ""
    reference: str = ""  # the limit, the prediction, or the value of the other implementation
    ok: bool | None = None
    seconds: float = 0.0
    error: str = ""  # the traceback of a check that failed
    numbers: dict[str, Any] = field(default_factory=dict)  # for the JSON file

    def require(self, ok: bool, value: str, reference: str = "") -> None:
        """Record a value and whether it meets the requirement. After a failure, only further failures are recorded."""
        if self.ok is False:
            if not ok:
                self.value += f"; {value}"
            return
        self.ok, self.value, self.reference = ok, value, reference

    def show(self, value: str, reference: str = "", **numbers: Any) -> None:
        """Record a measurement."""
        self.value, self.reference = value, reference
        self.numbers |= numbers


class Report:
    """A writer that appends rows to a file."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.deadline = path, time.monotonic() + seconds

    def remaining_s(self) -> float:
        """Return the seconds until the time limit of this part."""
        return self.deadline - time.monotonic()

    @contextmanager
    def row(self, name: str, needs_s: float = 0.0) -> Iterator[Row]:
        """Record one row. An exception in the body fails the row and does not end the part.

        `needs_s` is the time that the row takes at most. It is not enforced: callers that need it check `remaining_s()` first.
        """
        row, start = Row(name), time.monotonic()
        try:
            yield row
        except Exception as error:
            row.ok, row.error = False, traceback.format_exc(limit=-8)
            row.value = row.value or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        row.seconds = time.monotonic() - start
        self.write(row)

    def write(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        verdict = {True: "ok", False: "FAILED", None: ""}[row.ok]
        print(
            f"  {row.name}: {row.value}" + (f" ({row.reference})" if row.reference else "") + f"  {verdict} [{row.seconds:.1f} s]",
            flush=True,
        )
        if row.error:
            print(row.error, flush=True)


@dataclass
class Part:
    """The status and the rows of a part."""

    name: str
    status: str = "not run"  # not run, running, passed, failed
    seconds: float = 0.0
    limit_s: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""  # the end of its output, if it failed

    def set_status(self, exit_code: int | None) -> None:
        """Set the status of a part that ended. An `exit_code` of None means that it was stopped at its time limit."""
        failed = [row["name"] for row in self.rows if row["ok"] is False]
        if exit_code is None:
            self.status = f"failed: stopped after {self.limit_s:.0f} s, its time limit"
        elif failed:
            self.status = f"failed: {', '.join(failed)}"
        elif exit_code or not self.rows:
            self.status = f"failed: exit code {exit_code} after {len(self.rows)} rows"
        else:
            self.status = "passed"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows in the file of a part, without an incomplete last line."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write(folder: Path, facts: dict[str, Any], parts: list[Part]) -> None:
    """Write results.json and table.md into `folder`."""
    (folder / "results.json").write_text(json.dumps({"machine": facts, "parts": [asdict(part) for part in parts]}, indent=1))
    (folder / "table.md").write_text(table(facts, parts))


def table(facts: dict[str, Any], parts: list[Part]) -> str:
    lines = [" · ".join(f"{key} {value}" for key, value in facts.items()), ""]
    for part in parts:
        lines += [f"**{part.name}**: {part.status}, {part.seconds:.0f} s of at most {part.limit_s:.0f}", ""]
        if part.rows:
            lines += ["| | measured | reference | | s |", "|---|---|---|---|---|"]
        for row in part.rows:
            verdict = {True: "ok", False: "**failed**", None: ""}[row["ok"]]
            cells = (row["name"], row["value"], row["reference"], verdict, f"{row['seconds']:.1f}")
            lines.append("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |")
        lines.append("")
        for row in part.rows:
            if row["error"]:
                lines += [f"{row['name']}:", "", *(f"    {line}" for line in row["error"].splitlines()), ""]
        if part.log:
            lines += ["The end of its output:", "", *(f"    {line}" for line in part.log.splitlines()), ""]
    return "\n".join(lines)
