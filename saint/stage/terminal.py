"""What a terminal shows: text of others made safe to look at, colours, and links to pages.

Colours are for warnings and a stage's final figures; they are off where stderr is no terminal or
NO_COLOR is set (https://no-color.org), and on where FORCE_COLOR is.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

_WARNING, _ERROR, _FIGURE, _END = "\033[33m", "\033[31m", "\033[1m", "\033[0m"
# A figure with its unit, as last lines hold them: "1,726,464 tokens", "0.137", "88.1 %", "2.1 GB".
_FIGURES = re.compile(r"(?<![\w./-])[+-]?\d+(?:[,.]\d+)*(?:\s?%|\s?[kMG]B|\s?s\b)?(?![\w/-])")
FINAL = {"final_figures": True}  # `extra` of the log record with which a stage ends
# Control characters but line feed and tab (a terminal obeys them), marks that reorder what stands
# beside them, separators of lines that no terminal shows, and halves of surrogate pairs.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def has_colours() -> bool:
    """Whether stderr shows colours, and the person wants any."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stderr.isatty()


def page_link(path: Path) -> str:
    """Return a page's place as terminals make it clickable: file:///…"""
    return path.resolve().as_uri()


def visible(text: str) -> str:
    r"""Return the text with every character of `UNSEEN` spelled out, as in `\x1b` and `\u202e`."""
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def show(text: str = "") -> None:
    """Print text for a person, with nothing in it that a terminal would obey."""
    print(visible(text), flush=True)


class TerminalFormatter(logging.Formatter):
    """Messages as `visible` text; warnings yellow, errors red, the figures of a last line bold."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, coloured where stderr shows colours."""
        text = visible(super().format(record))
        if not has_colours():
            return text
        if record.levelno >= logging.WARNING:
            colour = _ERROR if record.levelno >= logging.ERROR else _WARNING
            return f"{colour}{text}{_END}"
        if getattr(record, "final_figures", False):
            return _FIGURES.sub(lambda found: f"{_FIGURE}{found[0]}{_END}", text)
        return text
