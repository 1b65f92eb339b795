"""A terminal is shown nothing that acts; colours only on warnings and final figures."""

import io
import logging
import os
import pty
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saint.stage.terminal import FINAL, TerminalFormatter, page_link, show, visible


def lines(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, **environment: str) -> list[str]:
    """A warning, a last line and another line, as stderr would show them."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    main, other = pty.openpty()
    stderr = os.fdopen(other, "w") if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    shown, log = io.StringIO(), logging.Logger("a")
    handler = logging.StreamHandler(shown)
    handler.setFormatter(TerminalFormatter("%(message)s"))
    log.addHandler(handler)
    log.warning("layer 13 is odd")
    log.info("%d steps, FVU %.3f, see /tmp/run2/a-3.html", 1686, 0.137, extra=FINAL)
    log.info("layer %d", 13)
    stderr.close()
    os.close(main) if terminal else [os.close(fd) for fd in (main, other)]
    return shown.getvalue().splitlines()


PLAIN = ["layer 13 is odd", "1686 steps, FVU 0.137, see /tmp/run2/a-3.html", "layer 13"]


def test_warnings_and_final_figures_are_coloured_on_a_terminal(monkeypatch):
    warning, last, other = lines(monkeypatch, terminal=True)
    assert warning == f"\033[33m{PLAIN[0]}\033[0m" and other == PLAIN[2]
    marked = "\033[1m1686\033[0m steps, FVU \033[1m0.137\033[0m, see /tmp/run2/a-3.html"
    assert last == marked, "a path's digits are no figure"


def test_nothing_is_coloured_where_nobody_wants_or_sees_it(monkeypatch):
    assert lines(monkeypatch, terminal=True, NO_COLOR="1") == PLAIN
    assert lines(monkeypatch, terminal=False) == PLAIN
    assert lines(monkeypatch, terminal=False, FORCE_COLOR="1")[0].startswith("\033[33m")
    assert lines(monkeypatch, terminal=True, FORCE_COLOR="1", NO_COLOR="1") == PLAIN


def test_a_page_is_linked_so_that_a_terminal_opens_it(tmp_path: Path):
    assert page_link(tmp_path / "a page.html") == f"file://{tmp_path}/a%20page.html"


HOSTILE = "a\x1b[2Jb\x9b31mc\r\x07\u202ecod.exe\u2066d\u2028e\x00\ud800 fin"


def test_nothing_that_acts_is_printed(capsys: pytest.CaptureFixture[str]):
    show(HOSTILE)
    shown = capsys.readouterr().out
    expected = r"a\x1b[2Jb\x9b31mc\r\x07\u202ecod.exe\u2066d\u2028e\x00\ud800 fin" + "\n"
    assert shown == expected
    record = logging.LogRecord("saint", logging.INFO, "", 0, "label: %s", (HOSTILE,), None)
    assert TerminalFormatter("%(message)s").format(record) == "label: " + expected[:-1]


def test_what_people_write_stays():
    for text in ("two\nlines\tand", "שלום", "👩‍🔬 e\u0301", "«日本»", "\\x1b"):
        assert visible(text) == text


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_nothing_obeyed_is_left(text: str):
    shown = visible(text)
    shown.encode()
    assert all(c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028")
