"""Whether a page keeps anybody out: axe-core's rules, the window's width, and paper."""

from __future__ import annotations

from typing import Any

import pytest

WIDTHS, SCHEMES = (390, 1440), ("light", "dark")
_BESIDE = """() => { const root = document.documentElement;
  if (root.scrollWidth <= root.clientWidth) return [];
  return [...document.querySelectorAll('body *')]
    .filter((e) => e.getBoundingClientRect().right > root.clientWidth)
    .map((e) => e.outerHTML.slice(0, 120)); }"""
_MOVES = """() => document.getAnimations().filter(a => a.playState === 'running').length"""
# What a reader would lose on paper: text that is paler than 4.5:1 on white, past the print rules.
_PALE = """() => {
  const linear = (v) => (v <= 10.31475 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4);
  const lum = (c) => { const [r, g, b] = c.map(linear);
    return .2126 * r + .7152 * g + .0722 * b; };
  const all = document.querySelectorAll('main h1, main h2, main p, main td, main dd');
  return [...all].filter((e) => {
    if (!e.textContent.trim() || !e.checkVisibility()) return false;
    const c = getComputedStyle(e).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    return 1.05 / (lum(c) + .05) < 4.5;
  }).map((e) => e.outerHTML.slice(0, 120));
}"""


def check_barriers(tab: Any, *, only: str = "") -> None:
    """Fail on what axe-core finds (by one rule alone, or by all), and on text beside the window."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    options = {"runOnly": [only]} if only else {}
    found = axe.Axe().run(tab, options=options).response["violations"]
    barriers = [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found]
    assert not barriers, barriers
    beside = tab.evaluate(_BESIDE)
    assert not beside, beside


def check_stillness(tab: Any) -> None:
    """Fail where something moves though the visitor asked for less motion."""
    tab.emulate_media(reduced_motion="reduce")
    moving = tab.evaluate(_MOVES)
    assert not moving, moving


def check_paper(tab: Any) -> None:
    """Fail where a dark page would be printed pale, or beside the sheet."""
    tab.emulate_media(media="print", color_scheme="dark")
    pale = tab.evaluate(_PALE)
    assert not pale, pale
    tab.set_viewport_size({"width": 720, "height": 1000})  # a sheet of A4 at 96 dpi, in its margins
    beside = tab.evaluate(_BESIDE)
    assert not beside, beside
