"""The client of the Message Batches API: one host for the key, one line for an error.

The SDK is told not to follow redirects, and results are fetched below the configured base URL
rather than from the absolute `results_url`, so that a proxy sees every request and the key goes
nowhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import anthropic
from anthropic._decoders.jsonl import JSONLDecoder
from anthropic.types.messages import MessageBatch, MessageBatchIndividualResponse

from saint.stage.errors import UserError

_READ_RETRIES = 4
_CONNECT_S = 5.0
_CHUNK_BYTES = 1 << 16


def have_key() -> bool:
    """Whether the environment holds a credential for the API."""
    return bool(_key())


def _key() -> str:
    return os.environ.get("ANTHROPIC_API_KEY") or os.environ.get("ANTHROPIC_AUTH_TOKEN") or ""


def open_client(timeout_s: float) -> anthropic.Anthropic:
    """Return a client of `ANTHROPIC_BASE_URL`; raises UserError without a usable key.

    timeout_s: longest silence of the server, in any call; a connection is made within 5 s, or not.
    """
    key = _key()
    if not key:
        raise UserError(
            "no API key: set ANTHROPIC_API_KEY (any word will do for a local server that "
            "ANTHROPIC_BASE_URL names)"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            "the API key holds a space, line break or unusual character: check its value"
        )
    try:
        return anthropic.Anthropic(
            # A bare number would also be the time that a connection may take to be made.
            timeout=anthropic.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
            max_retries=_READ_RETRIES,
            http_client=anthropic.DefaultHttpxClient(follow_redirects=False),
        )
    except anthropic.AnthropicError as error:
        raise UserError(_redacted(str(error))) from None


def _redacted(text: str) -> str:
    key = _key()
    text = text.replace(key, "[key]") if key else text
    return " ".join(text.split())[:300]


def describe(error: anthropic.APIError) -> str:
    """One line on an API error: status and message, without the key."""
    status = getattr(error, "status_code", None)
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("error")
    message = inner.get("message") if isinstance(inner, dict) else None
    cause = f" ({error.__cause__})" if status is None and error.__cause__ else ""
    return _redacted(f"{status or ''} {message or error.message}{cause}".strip())


@contextmanager
def api_errors(what: str) -> Iterator[None]:
    """Turn the API's errors into one clear line about `what` was being done."""
    try:
        yield
    except anthropic.APIError as error:
        fail(what, error)


def fail(what: str, error: anthropic.APIError) -> NoReturn:
    """Raise a UserError that says `what` failed and how."""
    hints = {401: ": the API does not accept this key", 404: ": not known there"}
    hint = hints.get(getattr(error, "status_code", 0), "")
    raise UserError(f"{what} failed{hint} ({describe(error)})") from error


def never_sent(error: anthropic.APIError) -> bool:
    """Whether a connection was not even made."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")


def total_requests(batch: MessageBatch) -> int:
    """The number of requests of a batch, whatever became of them."""
    counts = batch.request_counts
    return counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired


def stream_lines(client: anthropic.Anthropic, batch_id: str) -> Iterator[bytes]:
    """Yield the complete lines of a batch's results, without their newline.

    Raises anthropic.APIError, or ConnectionError when the connection drops half-way.
    """
    decoder = client.get(
        f"/v1/messages/batches/{batch_id}/results",
        cast_to=JSONLDecoder[MessageBatchIndividualResponse],
        stream=True,
        options={"headers": {"Accept": "application/binary"}},
    )
    tail = b""
    try:
        for chunk in decoder.http_response.iter_bytes(_CHUNK_BYTES):
            *lines, tail = (tail + chunk).split(b"\n")
            yield from filter(None, map(bytes.strip, lines))
        if tail.strip():
            yield tail.strip()
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise ConnectionError(f"the results of {batch_id} broke off: {error}") from error
    finally:
        decoder.close()


def read_custom_id(line: bytes) -> str | None:
    """Return the custom_id of a results line that is whole; None for a damaged one."""
    row = read_row(line)
    return row["custom_id"] if row else None


def read_row(line: bytes) -> dict[str, Any] | None:
    """Decode a results line: {"custom_id", "result": {"type", …}}; None when it is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
        return None
    result = row.get("result")
    return row if isinstance(result, dict) and isinstance(result.get("type"), str) else None
