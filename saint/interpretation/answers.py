"""All answers to one `response_ids.yaml`, each accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saint.interpretation.ledger import Ledger, RequestId, State, parse_custom_id
from saint.interpretation.responses import Answer, parse_answer, read_records
from saint.stage.errors import UserError, log


@dataclass(frozen=True)
class Response:
    """One parsed response and the record that it was read from."""

    custom_id: str
    request: RequestId
    answer: Answer
    record: dict[str, Any]


@dataclass
class Reading:
    """All responses of a run.

    kept: request (whatever the attempt) -> the response that counts. kinds: what became of each
    response. usage: (model, whether it was live) -> [input tokens, output tokens].
    """

    kept: dict[str, Response] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    usage: dict[tuple[str, bool], list[int]] = field(default_factory=dict)


def _responses(
    directory: Path, ids: list[str], state: State
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield (custom_id, record, whether it was live) of everything that was retrieved."""
    found = 0
    for batch_id in ids:
        path = directory / f"{batch_id}.yaml"
        if not path.exists():
            log.warning("%s is not retrieved yet", batch_id)
            continue
        found += 1
        for custom_id, record in read_records(path):
            yield custom_id, record, False
    for custom_id, record in state.live.items():
        yield custom_id, record, True
    if not found and not state.live:
        raise UserError(
            f"none of the {len(ids)} batches is in {directory}: run "
            "interpret_top_sentences_retrieve_batches.py first"
        )


def read_all(directory: Path, ids: list[str], state: State, task: str | None) -> Reading:
    """Parse every response; of several to one request the best counts, and the later of equals.

    task: leave out the responses to other tasks. Raises UserError when nothing was retrieved.
    """
    reading = Reading()
    rank = {"failure": 0, "refusal": 1}
    for custom_id, record, live in _responses(directory, ids, state):
        request = parse_custom_id(custom_id)
        if request is None:
            request = RequestId("unknown", -1, custom_id, 1, "")
            answer = Answer("failure", reason="unknown custom_id")
        else:
            answer = parse_answer(request.task, record)
        if task and request.task.removesuffix("_control") != task:
            continue
        used = reading.usage.setdefault((str(record.get("model")), live), [0, 0])
        used[0] += int(record.get("input_tokens") or 0)
        used[1] += int(record.get("output_tokens") or 0)
        intent = state.intents.get(request.intent)
        if intent is not None and intent.superseded:
            reading.kinds.append("superseded")
            continue
        response = Response(custom_id, request, answer, record)
        earlier = reading.kept.get(request.unit)
        if earlier is not None:
            response, other = sorted(
                (response, earlier), key=lambda r: rank.get(r.answer.kind, 2), reverse=True
            )
            reading.kinds.append("duplicate" if rank.get(other.answer.kind, 2) == 2 else "retried")
        reading.kept[request.unit] = response
    reading.kinds += [response.answer.kind for response in reading.kept.values()]
    return reading


def read_keys(ledger: Ledger, reading: Reading) -> dict[str, dict[str, Any]]:
    """The keys that were stored with the requests: custom_id -> what was shown, or the truth."""
    intents = {r.request.intent for r in reading.kept.values()} - {""}
    return {
        row["custom_id"]: row["key"]
        for intent in sorted(intents)
        if ledger.requests_path(intent).exists()
        for row in ledger.read_requests(intent)
    }
