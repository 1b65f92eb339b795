"""The client of the Message Batches API: one host for the key, one line for an error.

The SDK is told not to follow redirects, and results are fetched below the configured base URL
rather than from the absolute `results_url`, so that a proxy sees every request and the key goes
nowhere else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeVar

import anthropic
from anthropic._decoders.jsonl import JSONLDecoder
from anthropic.types.messages import MessageBatch, MessageBatchIndividualResponse

from saint.stage.errors import UserError, log

T = TypeVar("T")
_READ_RETRIES = 4
# Room for the thoughts of a model that cannot be kept from thinking.
_THINKING_TOKENS = 2000
_CONNECT_S = 5.0
_CHUNK_BYTES = 1 << 16


def have_key() -> bool:
    """Whether the environment holds a credential for the API."""
    return bool(_key())


def _key() -> str:
    return os.environ.get("ANTHROPIC_API_KEY") or os.environ.get("ANTHROPIC_AUTH_TOKEN") or ""


class ApiError(UserError):
    """A call that failed. passes: whether it may well succeed later (429, 5xx, no answer)."""

    def __init__(self, message: str, *, passes: bool) -> None:
        super().__init__(message)
        self.passes = passes


class Client(anthropic.Anthropic):
    """The SDK's client; `server_offset` is the server's clock minus ours, by its last answer."""

    server_offset: timedelta | None = None

    def server_time(self) -> datetime:
        """The server's time now; ours, as long as it has not told its own."""
        return datetime.now(UTC) + (self.server_offset or timedelta(0))

    def note_clock(self, response: Any) -> None:
        """Read the clock off an answer's Date header (whole seconds)."""
        try:
            told = parsedate_to_datetime(response.headers["date"])
            self.server_offset = told.astimezone(UTC) - datetime.now(UTC)
        except (KeyError, ValueError, TypeError):
            pass


def open_client(timeout_s: float) -> Client:
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
    http = anthropic.DefaultHttpxClient(follow_redirects=False)
    try:
        client = Client(
            # A bare number would also be the time that a connection may take to be made.
            timeout=anthropic.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
            max_retries=_READ_RETRIES,
            http_client=http,
        )
    except anthropic.AnthropicError as error:
        raise UserError(_redacted(str(error))) from None
    http.event_hooks["response"].append(client.note_clock)
    return client


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
    """Raise an ApiError that says `what` failed and how."""
    hints = {401: ": the API does not accept this key", 404: ": not known there"}
    hint = hints.get(getattr(error, "status_code", 0), "")
    raise ApiError(f"{what} failed{hint} ({describe(error)})", passes=passes(error)) from error


def passes(error: anthropic.APIError) -> bool:
    """Whether a failed call may well succeed later: the server was busy, broken or not there."""
    status = getattr(error, "status_code", None)
    return status is None or status in (408, 409, 429) or status >= 500


def patiently(call: Callable[[], T], *, pause_s: float, longest_s: float) -> T:
    """Return what a call returns, waiting out errors that pass, longer each time."""
    while True:
        try:
            return call()
        except ApiError as error:
            if not error.passes:
                raise
            log.info("%s: again in %.0f s", error, pause_s)
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, longest_s)


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


# --- what a model takes ------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestForm:
    """What a request to a model holds beside its prompt.

    thinking: "disabled" or "between_tools", both of which turn it off, or None where the field is
    left out. effort: "low" where the model thinks nevertheless. schema: whether the answer's form
    is prescribed. thinking_tokens: what `max_tokens` allows for thoughts. most_tokens: its limit.
    """

    thinking: str | None = "disabled"
    effort: str | None = None
    schema: bool = True
    thinking_tokens: int = 0
    most_tokens: int | None = None

    def as_config(self) -> dict[str, Any]:
        """The form as the ledger keeps it."""
        return asdict(self)


# For servers that know neither JSON schemas nor thinking.
PLAIN_FORM = RequestForm(thinking=None, schema=False)


def ask_form(client: anthropic.Anthropic, model: str, *, for_batches: bool) -> RequestForm:
    """Ask the API once what requests a model takes; a server that cannot say gets the usual form.

    Raises UserError for a retired model, or one that takes no batches where these are wanted.
    """
    try:
        info = client.models.retrieve(model)
    except anthropic.APIStatusError as error:
        if error.status_code in (404, 405, 501):
            return RequestForm()
        fail(f"asking what {model} takes", error)
    except anthropic.APIError as error:
        fail(f"asking what {model} takes", error)
    _say_lifecycle(info, model)
    takes = getattr(info, "capabilities", None)
    if takes is None:
        return RequestForm()
    if for_batches and not _supports(takes, "batch"):
        raise UserError(f"{model} takes no batches: ask it live, with --live N")
    form = RequestForm(
        schema=_supports(takes, "structured_outputs"), most_tokens=getattr(info, "max_tokens", None)
    )
    for kind in ("disabled", "between_tools"):
        if _supports(takes, "thinking", "types", kind):
            return replace(form, thinking=kind)
    effort = "low" if _supports(takes, "effort", "low") else None
    log.info("%s always thinks: up to %d tokens a request, billed", model, _THINKING_TOKENS)
    return replace(form, thinking=None, effort=effort, thinking_tokens=_THINKING_TOKENS)


def _supports(capabilities: Any, *names: str) -> bool:
    for name in names:
        capabilities = getattr(capabilities, name, None)
    return bool(getattr(capabilities, "supported", False))


def _say_lifecycle(info: Any, model: str) -> None:
    retires = getattr(info, "retires_at", None)
    if getattr(info, "lifecycle", None) == "retired":
        raise UserError(f"{model} is retired: choose another --model")
    if getattr(info, "lifecycle", None) == "deprecated" or retires:
        when = f" on {retires:%Y-%m-%d}" if retires else ""
        log.warning("%s will be retired%s", model, when or " soon")
