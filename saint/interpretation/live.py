"""Requests that are sent at once, without a batch: the first one of a run, or all of them.

Endpoint: https://platform.claude.com/docs/en/api/messages, which vLLM, llama.cpp, Ollama and
litellm serve, too. An error is not billed, whatever its status; a request without an answer may be.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

import anthropic

from saint.interpretation.client import (
    ApiError,
    Client,
    describe,
    fail,
    never_sent,
    passes,
    patiently,
)
from saint.interpretation.ledger import Ledger, new_intent_id
from saint.interpretation.responses import Answer, parse_answer, record
from saint.stage.errors import UserError, log
from saint.stage.program import progress

_GROUP = 200  # requests that are written down together
_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
Row = dict[str, Any]  # {"unit", "attempt", "params", "key"}


class NotTaken(UserError):
    """The endpoint refused the very form of a request (400 or 422)."""


def was_tested(ledger: Ledger, task: str) -> bool:
    """Whether a live request of this task was answered usably before."""
    state = ledger.state()
    return any(
        custom_id.split("-")[0] == task
        and state.status.get(custom_id.rsplit("-", 2)[0]) != "unusable"
        and parse_answer(task, response).kind != "failure"
        for custom_id, response in state.live.items()
    )


def smoke_test(client: Client, ledger: Ledger, row: Row, *, task: str, model: str) -> None:
    """Ask one request live; raises UserError when its answer is of no use.

    A batch's requests are validated only after it was accepted: this finds a bad one first.
    Raises NotTaken where the endpoint does not know what the request holds.
    """
    intent = _write_down(ledger, [row], task=task, model=model)
    answer = _ask(client, ledger, intent, row, task=task)
    if answer.kind == "failure":
        raise UserError(
            f"the live test request was answered, but not usably ({answer.reason}): nothing more "
            "was sent. A server that keeps to no JSON schema wants a model that does; "
            "--no_smoke_test sends the rest nevertheless"
        )
    text = answer.fields.get("common_semantic") or answer.fields or answer.reason
    log.info("live test of %s: %s", row["unit"], text)


def ask_all(
    client: Client,
    ledger: Ledger,
    rows: Iterable[Row],
    *,
    task: str,
    model: str,
    n_at_once: int,
    n_total: int,
) -> dict[str, int]:
    """Ask all requests live, n_at_once at a time; return how many ended in which way.

    Every answer is in the ledger before the next request goes out. What the endpoint refuses for
    good is noted as invalid; busy and broken servers are waited for. Raises UserError when the
    connection drops without an answer; the other answers are kept.
    """
    kinds: dict[str, int] = {}
    with progress(n_total, unit="request", description="answered") as bar:
        for kind in _answers(client, ledger, rows, task=task, model=model, n=n_at_once):
            kinds[kind] = kinds.get(kind, 0) + 1
            bar.update()
    return kinds


def _answers(
    client: Client, ledger: Ledger, rows: Iterable[Row], *, task: str, model: str, n: int
) -> Iterator[str]:
    rows = iter(rows)
    stop = threading.Event()

    def ask(intent: str, row: Row) -> str | None:
        if stop.is_set():
            return None
        try:
            return _ask(client, ledger, intent, row, task=task).kind
        except NotTaken as error:
            ledger.append("released", intent=intent, units=[row["unit"]], invalid=str(error))
            return "invalid"

    pool = ThreadPoolExecutor(n)
    running: set[Future[str | None]] = set()
    try:
        while group := list(islice(rows, _GROUP)):
            intent = _write_down(ledger, group, task=task, model=model)
            for row in group:
                running.add(pool.submit(ask, intent, row))
                if len(running) >= 2 * n:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from filter(None, (future.result() for future in done))
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from filter(None, (future.result() for future in done))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _write_down(ledger: Ledger, rows: list[Row], *, task: str, model: str) -> str:
    """Note live requests before the first of them is sent; return the mark of their group."""
    intent = new_intent_id()
    units = [f"{row['unit']}-{row['attempt']}" for row in rows]
    pairs = zip(units, rows, strict=True)
    ledger.write_requests(
        intent,
        ({"custom_id": f"{u}-{intent}", "params": r["params"], "key": r["key"]} for u, r in pairs),
    )
    about = {"kind": "live_group", "task": task, "model": model, "units": units}
    ledger.append("intent", intent=intent, **about)
    return intent


def _ask(client: Client, ledger: Ledger, intent: str, row: Row, *, task: str) -> Answer:
    """Send one request that was noted; its answer is in the ledger when this returns."""
    ledger.append("asking", intent=intent, unit=row["unit"])
    what = f"the live request {row['unit']}"

    def call() -> anthropic.types.Message:
        try:
            return client.with_options(max_retries=0).messages.create(**row["params"])
        except anthropic.APIError as error:
            status = getattr(error, "status_code", None)
            if status is None and not never_sent(error):
                raise UserError(f"{what} got no answer ({describe(error)})") from error
            if status in (400, 422):
                raise NotTaken(f"{what} was refused ({describe(error)})") from error
            if not passes(error):
                ledger.append("released", intent=intent, units=[row["unit"]])
            fail(what, error)

    try:
        message = patiently(call, pause_s=_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
    except (NotTaken, ApiError):
        raise
    response = record({"type": "succeeded", "message": message.model_dump(mode="json")})
    answer = parse_answer(task, response, row["key"])
    unusable = {"unusable": answer.reason} if answer.kind == "failure" else {}
    ledger.append("answered", intent=intent, unit=row["unit"], response=response, **unusable)
    return answer
