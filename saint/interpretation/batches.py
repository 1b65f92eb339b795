"""Batches of requests: prepared within the API's limits, quoted, and created exactly once.

Limits and error codes: https://platform.claude.com/docs/en/api/creating-message-batches. The SDK is
asked not to retry a creation, which has no idempotency key.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import anthropic

from saint.interpretation.client import api_errors, describe, fail, never_sent
from saint.interpretation.ledger import Ledger, new_intent_id
from saint.interpretation.prices import (
    CHARS_PER_OWN_TOKEN,
    LIVE_FACTOR,
    PRICES_DATE,
    TOKENS_PER_OWN_TOKEN,
    Quote,
    dollars,
)
from saint.interpretation.responses import record
from saint.stage.errors import UserError, log
from saint.stage.flags import positive_float, positive_int

# Answers after which the API certainly made no batch. Others (5xx, time-outs) leave it open.
_REFUSALS = frozenset({400, 401, 402, 403, 404, 405, 413, 415, 422, 429})


@dataclass(frozen=True)
class Limits:
    """The size of one batch. The API takes 100,000 requests and 256 MB."""

    max_requests: int = 10_000
    max_bytes: int = 200_000_000

    @classmethod
    def of(cls, args: argparse.Namespace) -> Limits:
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
        "--create_retries",
        type=int,
        default=8,
        help="waits for a rate limit (429), which certainly made no batch [8]",
    )
    group.add_argument(
        "--timeout_s",
        type=positive_float,
        default=600,
        help="seconds without a sign of life after which a call has failed [600]",
    )


@dataclass
class Tally:
    """What prepared requests add up to, and a small seeded sample of them."""

    n: int = 0
    chars: int = 0
    sample: list[dict[str, Any]] = field(default_factory=list)
    _rng: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, params: dict[str, Any], *, sample_size: int = 10) -> None:
        """Count one request's parameters."""
        self.n += 1
        self.chars += prompt_chars(params)
        if len(self.sample) < sample_size:
            self.sample.append(params)
        elif (place := self._rng.randrange(self.n)) < sample_size:
            self.sample[place] = params


def prompt_chars(params: dict[str, Any]) -> int:
    """Characters of the system prompt and the user's turn."""
    return len(params["system"]) + sum(len(m["content"]) for m in params["messages"])


def prepare_batches(
    ledger: Ledger, rows: Iterable[dict[str, Any]], limits: Limits, tally: Tally
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


def estimate(
    client: anthropic.Anthropic | None,
    tally: Tally,
    *,
    output_tokens_each: int,
    price: tuple[float, float] | None,
    n_live: int,
) -> Quote:
    """Quote prepared requests: tokens counted by the API on a sample, or by a ratio to our own.

    n_live: requests among them that are sent live, at twice the batch price.
    """
    ratio = CHARS_PER_OWN_TOKEN / TOKENS_PER_OWN_TOKEN
    basis = (
        f"not counted by the API but taken as {TOKENS_PER_OWN_TOKEN:g} times the tokens of our own "
        f"tokenizer, {CHARS_PER_OWN_TOKEN:g} characters each"
    )
    counted = _count_sample(client, tally.sample) if client else None
    if counted:
        ratio = sum(map(prompt_chars, tally.sample)) / counted
        basis = f"from {len(tally.sample)} requests that the API counted"
    tokens_in = round(tally.chars / ratio)
    tokens_out = output_tokens_each * tally.n
    cost = dollars(price, tokens_in, tokens_out)
    if cost is not None and tally.n:
        cost *= 1 + n_live * (LIVE_FACTOR - 1) / tally.n
    return Quote(tally.n, tokens_in, tokens_out, cost, f"{basis}; batch prices of {PRICES_DATE}")


def _count_sample(client: anthropic.Anthropic, sample: list[dict[str, Any]]) -> int | None:
    total = 0
    for params in sample:
        kept = {name: value for name, value in params.items() if name != "max_tokens"}
        try:
            total += client.messages.count_tokens(**kept).input_tokens
        except anthropic.APIError as error:
            if getattr(error, "status_code", None) == 401:
                fail("counting tokens", error)
            log.warning("tokens are estimated: the API does not count them (%s)", describe(error))
            return None
    return total or None


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


def ask_live(
    client: anthropic.Anthropic, ledger: Ledger, row: dict[str, Any], *, task: str, model: str
) -> dict[str, Any]:
    """Send one {"unit", "attempt", "params", "key"} row at once; return its record, kept for good.

    A batch's requests are validated only after it was accepted: this finds a bad one first.
    """
    intent = new_intent_id()
    unit = f"{row['unit']}-{row['attempt']}"
    request = {"custom_id": f"{unit}-{intent}", "params": row["params"], "key": row["key"]}
    ledger.write_requests(intent, [request])
    ledger.append("intent", intent=intent, kind="live", task=task, model=model, units=[unit])
    try:
        message = client.with_options(max_retries=0).messages.create(**row["params"])
    except anthropic.APIError as error:
        if getattr(error, "status_code", None) is None and not never_sent(error):
            raise UserError(f"the live test request got no answer ({describe(error)})") from error
        # An error is not billed, whatever its status.
        ledger.append("refused", intent=intent, reason=describe(error))
        fail("the live test request (nothing else was sent)", error)
    result = record({"type": "succeeded", "message": message.model_dump(mode="json")})
    ledger.append("answered", intent=intent, response=result)
    return result


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
