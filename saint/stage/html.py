"""The one way to write HTML: jinja2 templates, every value escaped unless it is `Markup`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_OWN_TEMPLATES = Path(__file__).parent / "templates"


@lru_cache
def environment(folder: Path) -> Environment:
    """Return the jinja2 environment of a folder of templates.

    A name that is not in `folder` is looked up among the shared ones: `page.html` (the frame of a
    whole page: blocks title, style, body) and `plot.html`. A value that a template asks for and
    does not get is an error, not an empty place.
    """
    return Environment(
        loader=FileSystemLoader([folder, _OWN_TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(folder: Path, name: str, **values: Any) -> Markup:
    """Fill a template; every value that is no `Markup` is escaped.

    Raises jinja2.UndefinedError for a value that is missing.
    """
    return Markup(environment(folder).get_template(name).render(**values))


def fragment(folder: Path, name: str, macro: str, *values: Any, **more: Any) -> Markup:
    """Return what one macro of a template makes of its values, escaped likewise."""
    module = environment(folder).get_template(name).module
    return Markup(getattr(module, macro)(*values, **more))


def inline(path: Path) -> Markup:
    """Return a style sheet or a script of ours to stand inside a page as it is."""
    return Markup(path.read_text(encoding="utf-8"))
