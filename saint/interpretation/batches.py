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
from typing import Any

import anthropic

from saint.interpretation.client import (
    api_errors,
    describe,
    never_sent,
    read_custom_id,
    stream_lines,
    total_requests,
)
from saint.interpretation.ledger import Intent, Ledger, new_intent_id, parse_custom_id
from saint.interpretation.prices import RequestTally
from saint.stage.errors import UserError, log
from saint.stage.flags import positive_float, positive_int, whole_number

# Answers after which the API certainly made no batch. Others (5xx, time-outs) leave it open.
_REFUSALS = frozenset({400, 401, 402, 403, 404, 405, 413, 415, 422, 429})
# Clocks differ: a batch may seem older than the intent it came from.
_CLOCK_SKEW = timedelta(minutes=10)
_UNREADABLE = "unreadable"  # no intent has this id


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
        "--max_batch_mb",
        type=positive_float,
        default=200,
        help="size of one batch, API limit 256 MB [200]",
    )
    group.add_argument(
        "--max_attempts",
        type=positive_int,
        default=3,
        help="times that one request is sent, counting the first [3]",
    )
    group.add_argument(
        "--create_retries",
        type=whole_number,
        default=8,
        help="waits for a rate limit (429), which certainly made no batch [8]",
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
    client: anthropic.Anthropic,
    ledger: Ledger,
    intents: list[str],
    *,
    task: str,
    model: str,
    retries: int,
) -> None:
    """Create prepared batches, one after another, each exactly once."""
    for number, intent in enumerate(intents, start=1):
        batch_id = create_batch(client, ledger, intent, task=task, model=model, retries=retries)
        log.info("batch %d of %d: %s", number, len(intents), batch_id)


def create_batch(
    client: anthropic.Anthropic, ledger: Ledger, intent: str, *, task: str, model: str, retries: int
) -> str:
    """Create one batch from the prepared requests of `intent`, exactly once; return its id.

    The intent is on disk before the request and the id right after. Only a refusal that certainly
    made no batch because of its rate (429) is tried again, after the time that the API asks for.
    Raises UserError when the API refuses, or when nobody can know whether it accepted.
    """
    rows = list(ledger.read_requests(intent))
    units = [row["custom_id"].rpartition("-")[0] for row in rows]
    requests: list[Any] = [{name: row[name] for name in ("custom_id", "params")} for row in rows]
    ledger.append("intent", intent=intent, kind="batch", task=task, model=model, units=units)
    for attempt in range(retries + 1):
        try:
            batch = client.with_options(max_retries=0).messages.batches.create(requests=requests)
        except anthropic.APIError as error:
            _judge_failure(ledger, intent, len(rows), error, last=attempt == retries)
            ledger.append("again", intent=intent)
            continue
        if not isinstance(getattr(batch, "id", None), str):
            raise UserError("the creation of a batch was answered without an id: it may exist")
        ledger.append("created", intent=intent, batch_id=batch.id)
        ledger.write_response_ids()
        return batch.id
    raise AssertionError("unreachable")


def _judge_failure(
    ledger: Ledger, intent: str, n: int, error: anthropic.APIError, *, last: bool
) -> None:
    """Record a creation that failed. Returns, after a pause, where it may be tried again."""
    status = getattr(error, "status_code", None)
    if status is None and not never_sent(error) or status is not None and status not in _REFUSALS:
        raise UserError(
            f"the creation of a batch of {n} requests got no clear answer ({describe(error)}): "
            "it may exist. Run the same command again: it looks for it before it sends anything"
        ) from error
    ledger.append("refused", intent=intent, reason=describe(error))
    if status != 429 or last:
        hint = "; smaller batches: --max_batch_mb, --max_batch_requests" if status == 413 else ""
        raise UserError(f"the API refused a batch of {n} requests ({describe(error)}){hint}")
    pause = _retry_after(error)
    log.info("rate limited: trying again in %.0f s", pause)
    time.sleep(pause)


def _retry_after(error: anthropic.APIError) -> float:
    response = getattr(error, "response", None)
    try:
        seconds = float(response.headers["retry-after"]) if response is not None else 20.0
    except (KeyError, ValueError):
        seconds = 20.0
    return min(max(seconds, 0.0), 600.0)


def cancel_batches(client: anthropic.Anthropic, ledger: Ledger) -> int:
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

    waiting_for: batches that may be it, still running or with results that could not be read.
    """

    intent: Intent
    waiting_for: list[str]

    def __str__(self) -> str:
        n, when = len(self.intent.units), self.intent.time.isoformat(timespec="seconds")
        if self.intent.kind == "live":
            return (
                f"the live test request of {when} was interrupted: it may have been answered and "
                "billed once (a fraction of a cent). --assume_lost sends it again"
            )
        if self.waiting_for:
            return (
                f"a batch of {n} requests was begun at {when} and its id was lost; "
                f"{', '.join(self.waiting_for)} is probably it, which can be told once it has "
                "ended and its results can be read: run "
                "interpret_top_sentences_retrieve_batches.py --wait"
            )
        return (
            f"a batch of {n} requests was begun at {when} and its id was lost; the API lists none "
            "like it. If it was never accepted, --assume_lost sends these requests again"
        )


def reconcile(client: anthropic.Anthropic, ledger: Ledger) -> list[OpenIntent]:
    """Match intents without an id with the batches that the API lists; return the rest.

    A candidate has the same number of requests, is not older than the intent and is in no ledger
    line; the intent's mark in its results' custom_ids proves it, once it has ended.
    """
    still_open = []
    for intent in ledger.state().unresolved:
        found, waiting = None, []
        if intent.kind == "batch":
            found, waiting = _match(client, ledger, intent)
        if found:
            log.info("found the lost batch of %d requests: %s", len(intent.units), found)
            ledger.append("created", intent=intent.id, batch_id=found)
            ledger.write_response_ids()
        else:
            still_open.append(OpenIntent(intent, waiting))
    return still_open


def _match(
    client: anthropic.Anthropic, ledger: Ledger, intent: Intent
) -> tuple[str | None, list[str]]:
    known = ledger.state().batches
    waiting = []
    with api_errors("listing recent batches"):
        for batch in client.messages.batches.list(limit=100):
            if batch.created_at < intent.time - _CLOCK_SKEW:
                break
            if batch.id in known or total_requests(batch) != len(intent.units):
                continue
            mark = _UNREADABLE
            if batch.processing_status == "ended":
                mark = _first_mark(client, batch.id)
            if mark == intent.id:
                return batch.id, []
            if mark == _UNREADABLE:
                waiting.append(batch.id)
    return None, waiting


def _first_mark(client: anthropic.Anthropic, batch_id: str) -> str | None:
    """The intent that an ended batch was made for; None for a stranger's, or `_UNREADABLE`."""
    for line in stream_lines(client, batch_id):
        custom_id = read_custom_id(line)
        if custom_id is not None:
            request = parse_custom_id(custom_id)
            return request.intent if request else None
    return _UNREADABLE


def settle_open_intents(
    ledger: Ledger, still_open: list[OpenIntent], *, assume_lost: bool, settle_s: float
) -> None:
    """Raise UserError for an intent without an id, unless the person says that it was lost.

    settle_s: how long after an intent a batch may still turn up in the API's list.
    """
    for item in still_open:
        if not assume_lost or item.waiting_for:
            raise UserError(f"{item}")
        age = (datetime.now(UTC) - item.intent.time).total_seconds()
        if age < settle_s:
            raise UserError(
                f"the request was begun {age:.0f} s ago and may still turn up in the API's list: "
                f"wait until {settle_s:.0f} s have passed (--settle_s)"
            )
        ledger.append("lost", intent=item.intent.id)
        log.info("taken as lost: %d requests begun at %s", len(item.intent.units), item.intent.time)
