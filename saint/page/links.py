"""What a browser and the page send each other as text: links, copied JSON, lengths."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from saint.stage.errors import UserError

MAX_LINK_CHARS, MAX_JSON_CHARS = 40_000, 400_000


def json_of(text: str) -> dict[str, Any]:
    """Read JSON that a browser sent. Raises UserError when it is none."""
    if len(text) > MAX_JSON_CHARS:
        raise UserError("the settings are too long to be settings")
    try:
        record = json.loads(text)
    except ValueError:
        raise UserError("the settings are not JSON") from None
    if not isinstance(record, dict):
        raise UserError("the settings are not a JSON object")
    return record


def link_query(record: dict[str, Any]) -> str:
    """Return the page's query string for a record."""
    packed = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    return "?steer=" + base64.urlsafe_b64encode(packed).decode().rstrip("=")


def read_link(query: str) -> str:
    """Return the JSON text of a link's query value. Raises UserError when it is damaged."""
    if len(query) > MAX_LINK_CHARS:
        raise UserError("the link is too long to be one of this page's")
    try:
        return base64.urlsafe_b64decode(query + "=" * (-len(query) % 4)).decode()
    except ValueError:
        raise UserError("the link is damaged: copy it again, whole") from None


def read_lengths(values: Any, rows: Sequence[Sequence[int]]) -> list[int]:
    """Read how much of each row of tokens is the prompt. Raises UserError when it cannot be."""
    fits = isinstance(values, list) and len(values) == len(rows)
    if not fits or not all(
        isinstance(n, int) and 1 <= n <= len(row) for n, row in zip(values, rows, strict=True)
    ):
        raise UserError("the stopped text is damaged: compare again")
    return values
