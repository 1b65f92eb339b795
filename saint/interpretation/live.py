"""Requests that are sent at once, without a batch: the test before the first one."""

from __future__ import annotations

from typing import Any

import anthropic

from saint.interpretation.client import describe, fail, never_sent
from saint.interpretation.ledger import Ledger, new_intent_id
from saint.interpretation.responses import parse_answer, record
from saint.stage.errors import UserError, log


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


def was_tested(ledger: Ledger, task: str) -> bool:
    """Whether a live request of this task was answered usably before."""
    return any(
        parse_answer(task, response).kind != "failure"
        for custom_id, response in ledger.state().live.items()
        if custom_id.split("-")[0] == task
    )


def smoke_test(
    client: anthropic.Anthropic, ledger: Ledger, row: dict[str, Any], *, task: str, model: str
) -> None:
    """Ask one request live; raises UserError when its answer is of no use."""
    answer = parse_answer(task, ask_live(client, ledger, row, task=task, model=model))
    if answer.kind == "failure":
        raise UserError(
            f"the live test request was answered, but not usably ({answer.reason}): no batch was "
            "sent. --no_smoke_test sends them nevertheless"
        )
    text = answer.fields.get("common_semantic") or answer.fields or answer.reason
    log.info("live test of %s: %s", row["unit"], text)
