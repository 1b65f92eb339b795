"""Finding the batches whose ids were lost between their creation and the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import anthropic

from saint.interpretation.client import api_errors, read_custom_id, stream_lines, total_requests
from saint.interpretation.ledger import Intent, Ledger, parse_custom_id
from saint.stage.errors import UserError, log

# Clocks differ: a batch may seem older than the intent it came from.
_CLOCK_SKEW = timedelta(minutes=10)
_UNREADABLE = "unreadable"  # no intent has this id


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
