"""A run's report.

python -m saint.report RUN [--html report.html]

RUN is the directory into which the stages wrote (the quickstart's: runs/quickstart). The figures
go to the terminal; --html writes the page with curves, diagrams and examples.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from saint.report.page import report_page, report_sections
from saint.stage.errors import log
from saint.stage.files import write_text
from saint.stage.program import run_stage
from saint.stage.terminal import page_link, show


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="python -m saint.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the directory into which the stages wrote")
    parser.add_argument(
        "--html",
        type=Path,
        nargs="?",
        const=Path("report.html"),
        help="also write one page [report.html in the run's directory]",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures and write the page."""
    args = build_parser().parse_args(argv)
    sections = report_sections(args.run_dir)
    for section in sections:
        figures = ", ".join(f"{name} {value}" for name, value in section.figures.items())
        if figures:
            show(f"{section.title}: {figures}  ({section.source})")
    if args.html is not None:
        path = args.run_dir / args.html if args.html == Path("report.html") else args.html
        write_text(path, report_page(args.run_dir, sections))
        log.info("look at %s", page_link(path))


if __name__ == "__main__":
    run_stage(main)
