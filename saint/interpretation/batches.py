"""Batches of requests: prepared within the API's limits, quoted, and created exactly once.

Limits and error codes: https://platform.claude.com/docs/en/api/creating-message-batches. The SDK is
asked not to retry a creation, which has no idempotency key.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any

import anthropic

from saint.interpretation.client import (
    ApiError,
    Client,
    api_errors,
    describe,
    never_sent,
    patiently,
    read_custom_id,
    stream_lines,
    total_requests,
)
from saint.interpretation.ledger import Intent, Ledger, new_intent_id, parse_custom_id
from saint.interpretation.prices import RequestTally
from saint.stage.errors import UserError, log
from saint.stage.flags import positive_float, positive_int

# Answers after which the API certainly made no batch. Others (5xx, time-outs) leave it open.
_REFUSALS = frozenset({400, 401, 402, 403, 404, 405, 413, 415, 422, 429})
_RATE_LIMITS = 20  # waits for a 429, or for a connection, before giving up
_RENEWALS = 5  # times that a batch is made again that certainly was not made
# What the server's clock may still be off by, after the difference of the clocks.
_CLOCK_ERROR = timedelta(minutes=10)
_UNREADABLE = "unreadable"  # no intent has this id
_LOOKS = 3  # at results whose lines are damaged


@dataclass(frozen=True)
class BatchLimits:
    """The size of one batch. The API takes 100,000 requests and 256 MB."""

    max_requests: int = 10_000
    max_bytes: int = 200_000_000

    @classmethod
    def of(cls, args: argparse.Namespace) -> BatchLimits:
        """Read the flags of `add_batch_flags`; raises UserError beyond the API's limits."""
        if not 0 < args.max_batch_mb <= 256 or args.max_batch_requests > 100_000:
            raise UserError("a batch is at most 100,000 requests and 256 MB")
        return cls(args.max_batch_requests, round(args.max_batch_mb * 1e6))


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of whoever creates batches."""
    group = parser.add_argument_group("batches")
    group.add_argument(
        "--max_batch_requests",
        type=positive_int,
        default=10_000,
        help="requests in one batch, API limit 100,000 [10000]",
    )
    group.add_argument(
        "--max_batch_mb", type=float, default=200, help="size of one batch, API limit 256 MB [200]"
    )
    group.add_argument(
        "--max_attempts",
        type=positive_int,
        default=3,
        help="times that one request is sent, counting the first [3]",
    )
    group.add_argument(
        "--settle_s",
        type=float,
        default=120,
        help="seconds after an unclear creation in which a batch may still turn up [120]",
    )
    group.add_argument(
        "--timeout_s",
        type=positive_float,
        default=600,
        help="seconds without a sign of life after which a call has failed [600]",
    )


def prepare_batches(
    ledger: Ledger, rows: Iterable[dict[str, Any]], limits: BatchLimits, tally: RequestTally
) -> list[str]:
    """Write {"unit", "attempt", "params", "key"} rows as batches within the limits.

    Returns the ids of their (not yet recorded) intents. Memory: one batch.
    """
    intents: list[str] = []
    held: list[dict[str, Any]] = []
    held_bytes = 0

    def flush() -> None:
        nonlocal held_bytes
        intent = new_intent_id()
        ledger.write_requests(
            intent,
            (
                {"custom_id": f"{r['unit']}-{r['attempt']}-{intent}"}
                | {"params": r["params"], "key": r["key"]}
                for r in held
            ),
        )
        intents.append(intent)
        held.clear()
        held_bytes = 0

    for row in rows:
        # Escaped to ASCII a body is at its largest; 100 bytes more for the custom_id and commas.
        size = len(json.dumps(row["params"])) + 100
        if held and (len(held) >= limits.max_requests or held_bytes + size > limits.max_bytes):
            flush()
        held.append(row)
        held_bytes += size
        tally.add(row["params"])
    if held:
        flush()
    return intents


def create_batches(
    client: Client, ledger: Ledger, intents: list[str], *, task: str, model: str, settle_s: float
) -> None:
    """Create prepared batches, one after another, each exactly once."""
    for number, intent in enumerate(intents, start=1):
        for _ in range(_RENEWALS):
            batch_id = create_batch(client, ledger, intent, task=task, model=model)
            if batch_id is None:
                batch_id = _clear_up(client, ledger, intent, settle_s)
            if ledger.state().intents[intent].resolution != "lost":
                break
            intent = _renewed(ledger, intent)
        else:
            raise UserError("the API has made none of several batches: run again later")
        told = batch_id or "one that still runs is probably it: retrieving clears it up"
        log.info("batch %d of %d: %s", number, len(intents), told)


def create_batch(
    client: Client, ledger: Ledger, intent: str, *, task: str, model: str
) -> str | None:
    """Create one batch from the prepared requests of `intent`; return its id, None where unclear.

    The intent is on disk before the request and the id right after. Only what certainly made no
    batch is tried again: a rate limit (429), after the time that the API asks for, and a connection
    that was not made. Raises UserError when the API refuses.
    """
    rows = list(ledger.read_requests(intent))
    units = [row["custom_id"].rpartition("-")[0] for row in rows]
    requests: list[Any] = [{name: row[name] for name in ("custom_id", "params")} for row in rows]
    newest = patiently(lambda: _newest(client), pause_s=1, longest_s=60)
    about = {"task": task, "model": model, "newest": newest, "server_time": _now(client)}
    ledger.append("intent", intent=intent, kind="batch", units=units, **about)
    for attempt in range(_RATE_LIMITS):
        try:
            batch = client.with_options(max_retries=0).messages.batches.create(requests=requests)
        except anthropic.APIError as error:
            status = getattr(error, "status_code", None)
            if not never_sent(error) and status not in _REFUSALS:
                ledger.append("unclear", intent=intent, server_time=_now(client))
                log.warning("the creation of a batch got no clear answer (%s)", describe(error))
                return None
            ledger.append("refused", intent=intent, reason=describe(error))
            _wait_or_give_up(error, len(rows), attempt)
            ledger.append("again", intent=intent)
            continue
        if not isinstance(getattr(batch, "id", None), str):
            raise UserError("the creation of a batch was answered without an id: it may exist")
        ledger.append("created", intent=intent, batch_id=batch.id)
        ledger.write_response_ids()
        return batch.id
    raise AssertionError("unreachable")


def _now(client: Client) -> str:
    return client.server_time().isoformat(timespec="milliseconds")


def _newest(client: Client) -> str | None:
    """The batch that the API lists first; its answer also tells the server's time."""
    with api_errors("listing recent batches"):
        return next((batch.id for batch in client.messages.batches.list(limit=1).data), None)


def _wait_or_give_up(error: anthropic.APIError, n: int, attempt: int) -> None:
    status = getattr(error, "status_code", None)
    if status not in (None, 429) or attempt == _RATE_LIMITS - 1:
        hint = "; smaller batches: --max_batch_mb, --max_batch_requests" if status == 413 else ""
        raise UserError(f"the API refused a batch of {n} requests ({describe(error)}){hint}")
    pause = _retry_after(error) if status else min(2.0**attempt, 60.0)
    log.info("%s: trying again in %.0f s", "rate limited" if status else "no connection", pause)
    time.sleep(pause)


def _retry_after(error: anthropic.APIError) -> float:
    response = getattr(error, "response", None)
    try:
        seconds = float(response.headers["retry-after"]) if response is not None else 20.0
    except (KeyError, ValueError):
        seconds = 20.0
    return min(max(seconds, 0.0), 600.0)


def _clear_up(client: Client, ledger: Ledger, intent: str, settle_s: float) -> str | None:
    """Look for a batch whose creation was unclear; return its id, None where none can be told.

    Where the API lists none like it for settle_s, its intent is noted as lost.
    """
    log.info("looking for it among the API's batches, for up to %.0f s", settle_s)
    settle_open_intents(client, ledger, assume_lost=False, settle_s=settle_s, only=intent)
    return ledger.state().intents[intent].batch_id


def _renewed(ledger: Ledger, intent: str) -> str:
    """Prepare a lost intent's requests again, under a new mark."""
    new = new_intent_id()
    rows = ledger.read_requests(intent)
    ledger.write_requests(
        new, ({**row, "custom_id": f"{row['custom_id'].rpartition('-')[0]}-{new}"} for row in rows)
    )
    log.info("the API lists no batch like it: it is made again")
    return new


def cancel_batches(client: Client, ledger: Ledger) -> int:
    """Ask the API to cancel every batch of the ledger that still runs; return how many."""
    cancelled = 0
    for batch_id, intent in ledger.state().batches.items():
        if intent.retrieved:
            continue
        with api_errors(f"cancelling {batch_id}"):
            if client.messages.batches.retrieve(batch_id).processing_status != "in_progress":
                continue
            client.messages.batches.cancel(batch_id)
        ledger.append("cancel", batch_id=batch_id)
        log.info("cancelling %s: what it had already answered stays and is billed", batch_id)
        cancelled += 1
    return cancelled


def say_what_is_out(ledger: Ledger) -> None:
    """After Ctrl-C: name the batches that go on, and how they are cancelled."""
    state = ledger.state()
    running = [b for b, intent in state.batches.items() if not intent.retrieved]
    if any(intent.kind == "batch" for intent in state.unresolved):
        log.warning("one batch was being created and may exist: --cancel looks for it, too")
    log.warning(
        "%d batches are out and go on (%s): retrieve them, or cancel them with "
        "interpret_top_sentences_send_batches.py --response_ids_filepath %s --cancel",
        len(running),
        ", ".join(running) or "none",
        ledger.response_ids_path,
    )


# --- batches whose ids were lost between their creation and the ledger -------------------------


@dataclass(frozen=True)
class OpenIntent:
    """An intent that could not be matched.

    running, unreadable: batches that may be it; what they are can be told once they have ended and
    their results can be read.
    """

    intent: Intent
    running: list[str]
    unreadable: list[str]

    def __str__(self) -> str:
        n, when = len(self.intent.units), self.intent.time.isoformat(timespec="seconds")
        if self.intent.is_live:
            return (
                f"{len(self.intent.in_flight)} live requests of {when} were interrupted: they may "
                "have been answered and billed once. send --assume_lost asks again"
            )
        began = f"a batch of {n} requests was begun at {when} and its id was lost"
        if self.running or self.unreadable:
            names = ", ".join([*self.running, *self.unreadable])
            hint = "; send --assume_lost makes it again" if not self.running else ""
            return (
                f"{began}; {names} is probably it, which can be told once it has ended and its "
                f"results can be read: run interpret_top_sentences_retrieve_batches.py --wait{hint}"
            )
        return f"{began}; the API lists none like it: sending again makes it again"


def reconcile(client: Client, ledger: Ledger) -> list[OpenIntent]:
    """Match intents without an id with the batches that the API lists; return the rest.

    A candidate has the same number of requests, was made between the intent and its failure and is
    in no ledger line; the intent's mark in its results' custom_ids proves it, once it has ended.
    Raises ApiError.
    """
    still_open = []
    for intent in ledger.state().unresolved:
        item, found = OpenIntent(intent, [], []), None
        if not intent.is_live:
            found = _match(client, ledger, item)
        if found:
            log.info("found the lost batch of %d requests: %s", len(intent.units), found)
            ledger.append("created", intent=intent.id, batch_id=found)
            ledger.write_response_ids()
        else:
            still_open.append(item)
    return still_open


def _match(client: Client, ledger: Ledger, item: OpenIntent) -> str | None:
    intent, known = item.intent, ledger.state().batches
    with api_errors("listing recent batches"):
        batches = iter(client.messages.batches.list(limit=100))
        first = next(batches, None)  # its answer tells the server's time, for intents without one
        began = intent.server_time or intent.time + (client.server_offset or timedelta(0))
        for batch in chain([first] if first else [], batches):
            # The API lists the newest first; where the batch before ours is known, clocks are not
            # needed.
            if batch.id == intent.newest:
                break
            if batch.created_at < began - (timedelta(days=2) if intent.newest else _CLOCK_ERROR):
                break
            late = intent.failed is not None and batch.created_at > intent.failed + _CLOCK_ERROR
            if late or batch.id in known or total_requests(batch) != len(intent.units):
                continue
            if batch.processing_status != "ended":
                item.running.append(batch.id)
                continue
            mark = _first_mark(client, batch.id)
            if mark == intent.id:
                return batch.id
            if mark == _UNREADABLE:
                item.unreadable.append(batch.id)
    return None


def _first_mark(client: Client, batch_id: str) -> str | None:
    """The intent that an ended batch was made for; None for a stranger's, or `_UNREADABLE`."""
    for _ in range(_LOOKS):
        try:
            for line in stream_lines(client, batch_id):
                custom_id = read_custom_id(line)
                if custom_id is not None:
                    request = parse_custom_id(custom_id)
                    return request.intent if request else None
        except ConnectionError as error:
            raise ApiError(f"{error}", passes=True) from error
    return _UNREADABLE


def settle_open_intents(
    client: Client,
    ledger: Ledger,
    *,
    assume_lost: bool,
    settle_s: float,
    free: bool = False,
    only: str | None = None,
) -> list[OpenIntent]:
    """Match open intents, and note as lost those of which nothing turns up; return the rest.

    The rest may still be what a batch that runs, or whose results cannot be read, is: it stays out.
    assume_lost: the person says that what cannot be read, or was interrupted live, is lost.
    settle_s: how long after an intent a batch may still turn up in the API's list. free: live
    requests cost nothing. only: look at this intent.
    """
    pause = min(2.0, max(settle_s / 10, 0.02))
    while True:
        found = patiently(lambda: reconcile(client, ledger), pause_s=pause, longest_s=60)
        rest, fresh = [], []
        for item in found:
            intent = item.intent
            if only not in (None, intent.id):
                continue
            if intent.is_live:
                _release(ledger, intent, in_flight=assume_lost or free)
                rest += [item] if intent.in_flight and not (assume_lost or free) else []
            elif item.running or (item.unreadable and not assume_lost):
                rest.append(item)
            elif _age(client, intent) < settle_s:
                fresh.append(item)
            else:
                ledger.append("lost", intent=intent.id)
                log.info("taken as lost: %d requests begun at %s", len(intent.units), intent.time)
        if not fresh:
            return rest
        time.sleep(pause)


def _release(ledger: Ledger, intent: Intent, *, in_flight: bool) -> None:
    """Give live requests back that were never begun, and with in_flight those that were."""
    kept = intent.done if in_flight else intent.done | intent.in_flight
    if units := sorted(set(intent.units) - kept):
        ledger.append("released", intent=intent.id, units=units)


def _age(client: Client, intent: Intent) -> float:
    """Seconds since a batch was begun, or since that failed."""
    since = intent.failed or intent.server_time
    if since is None:
        return (datetime.now(UTC) - intent.time).total_seconds()
    return (client.server_time() - since).total_seconds()
