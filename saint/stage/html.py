"""The one way to write HTML: jinja2 templates, every value escaped unless it is `Markup`."""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from saint.stage.terminal import visible

_OWN_TEMPLATES = Path(__file__).parent / "templates"


@lru_cache
def environment(folder: Path) -> Environment:
    """Return the jinja2 environment of a folder of templates.

    A name that is not in `folder` is looked up among the shared ones: `page.html` (the frame of a
    whole page: blocks title, style, body) and `plot.html`. A value that a template asks for and
    does not get is an error, not an empty place.
    Plain text shows its control characters and marks of direction (`visible`); pages say with
    `policy` which scripts may run.
    """
    made = Environment(
        loader=FileSystemLoader([folder, _OWN_TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    made.globals["policy"] = policy
    return made


def _finalize(value: Any) -> Any:
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return visible(value) if is_text else value


def policy(*scripts: str) -> Markup:
    """Return the content-security-policy of a page: these scripts run, nothing else, no request.

    scripts: exactly what stands between the tags. Without any, no script runs at all.
    """
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    sources = " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests) or "'none'"
    rules = f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; "
    rules += "connect-src 'none'; base-uri 'none'; form-action 'none'"
    return Markup('<meta http-equiv="Content-Security-Policy" content="{}">').format(Markup(rules))


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
