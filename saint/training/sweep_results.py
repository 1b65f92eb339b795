"""What a sweep leaves beside its SAEs: a table on the terminal, as JSON and CSV, and a page."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saint.stage.errors import UserError, log
from saint.stage.files import write_json, write_text
from saint.stage.terminal import page_link
from saint.training.comparison import RULE, best_runs, frontier, read_run, rows_of, verdict
from saint.training.curves_page import runs_page
from saint.training.run import Job

_FORMATS = {"fvu": ".4f", "l0": ".1f", "dead": ".1%", "loss": ".4f"}


def compare(sweep: Path, jobs: Sequence[Job], failures: Mapping[str, str]) -> None:
    """Write a sweep's table and page beside its SAEs, and name the best.

    failures: why runs were given up, by name. Raises UserError where all were.
    """
    if len(failures) == len(jobs):
        raise UserError(f"every run of {sweep} was given up: {next(iter(failures.values()))}")
    runs = [read_run(job.files.metrics, job.name, failures.get(job.name, "")) for job in jobs]
    rows, folder = rows_of(runs), jobs[0].files.model.parent
    table = {
        "rule": RULE,
        "best": [run.name for run in best_runs(runs)],
        "frontier": [run.name for run in frontier(runs)],
        "runs": [
            {"file": job.files.model.name, **row} for job, row in zip(jobs, rows, strict=True)
        ],
    }
    page = folder / f"{sweep.stem}.html"
    write_json(folder / f"{sweep.stem}.json", table)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table["runs"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table["runs"])
    write_text(folder / f"{sweep.stem}.csv", text.getvalue())
    write_text(page, runs_page(runs, title=f"Sweep {sweep.name}"))
    print(terminal_table(rows))
    n_good = len(jobs) - len(failures)
    log.info(
        "swept %d SAEs of %d: %s; look at %s", n_good, len(jobs), verdict(runs), page_link(page)
    )


def terminal_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows in aligned columns, the lowest FVU first; * the best, + on the frontier."""
    shown = [name for name in rows[0] if name not in ("best", "frontier", "failure")]
    lines = [["", *shown]]
    for row in sorted(rows, key=lambda row: (bool(row["failure"]), row["fvu"] or 0.0)):
        mark = "*" if row["best"] else "+" if row["frontier"] else ""
        words = [_word(name, row[name]) for name in shown]
        lines.append([mark, *words, *(["given up"] if row["failure"] else [])])
    widths = [max(len(w) for w in column) for column in itertools.zip_longest(*lines, fillvalue="")]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )


def _word(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name in _FORMATS:
        return format(value, _FORMATS[name])
    return f"{value:.4g}" if isinstance(value, float) else str(value)
