"""Fetching a batch's results so that a dropped connection or a kill loses nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic

from saint.interpretation.client import ApiError, read_row, stream_lines
from saint.interpretation.ledger import Ledger, parse_custom_id
from saint.interpretation.responses import RequestKeys, count, failed_kind, parse_answer, record
from saint.stage.errors import log
from saint.stage.files import atomic_path
from saint.stage.yaml_files import dump_yaml

_ATTEMPTS = 12
_CHUNK_ROWS = 500


@dataclass(frozen=True)
class DownloadPaths:
    """Where the results of one batch lie: raw lines, the readable records, and half a download.

    part: stays as long as a line is missing.
    """

    raw: Path
    records: Path
    part: Path

    @classmethod
    def of(cls, output_dir: Path, batch_id: str) -> DownloadPaths:
        """Name the files of a batch."""
        return cls(
            output_dir / f"{batch_id}.jsonl",
            output_dir / f"{batch_id}.yaml",
            output_dir / f".{batch_id}.jsonl.part",
        )


def download(
    client: anthropic.Anthropic,
    batch_id: str,
    n_requests: int,
    paths: DownloadPaths,
    *,
    pause_s: float,
) -> set[str]:
    """Stream a batch's results to `paths.part`; returns the custom_ids that it holds.

    Results come in any order and may be sent twice or broken: whole lines are kept as they come
    (also over a kill), and the rest is asked for again until every request has its line, or
    nothing new comes. Raises anthropic.APIError, or ApiError when the connection keeps failing.
    """
    paths.part.parent.mkdir(parents=True, exist_ok=True)
    seen = _keep_whole_lines(paths.part)
    fruitless = 0
    for attempt in range(_ATTEMPTS):
        before, problem = len(seen), None
        try:
            _append_new_lines(stream_lines(client, batch_id), paths.part, seen)
        except ConnectionError as error:
            problem = str(error)
        if len(seen) >= n_requests:
            break
        fruitless = 0 if len(seen) > before else fruitless + 1
        if fruitless >= 3 and problem is None:
            break
        if attempt == _ATTEMPTS - 1 or fruitless >= 6:
            raise ApiError(
                f"{len(seen)} of {n_requests} results of {batch_id} came before the connection "
                f"failed for good ({problem or 'damaged lines'}): they are kept, run again",
                passes=True,
            )
        log.info("%s: %d of %d results, again (%s)", batch_id, len(seen), n_requests, problem)
        time.sleep(pause_s)
    with paths.part.open("ab") as file:
        os.fsync(file.fileno())
    return seen


def _keep_whole_lines(part: Path) -> set[str]:
    """Cut a half-written last line off an earlier download; return the custom_ids in the rest."""
    seen: set[str] = set()
    if not part.exists():
        part.touch()
        return seen
    keep = 0
    with part.open("rb") as file:
        for line in file:
            row = read_row(line) if line.endswith(b"\n") else None
            if row is None:
                break
            seen.add(row["custom_id"])
            keep += len(line)
    os.truncate(part, keep)
    return seen


def _append_new_lines(lines: Iterable[bytes], part: Path, seen: set[str]) -> None:
    with part.open("ab") as file:
        for line in lines:
            row = read_row(line)
            if row is not None and row["custom_id"] not in seen:
                file.write(line + b"\n")
                seen.add(row["custom_id"])


def write_records(paths: DownloadPaths, missing: Collection[str]) -> None:
    """Write `<batch id>.yaml` from the lines of `paths.part`, which becomes `paths.raw`.

    missing: custom_ids whose line did not come whole yet; they are recorded as "unreadable", and
    `paths.part` stays, so that they are asked for again.
    """
    with atomic_path(paths.records) as temporary, temporary.open("w", encoding="utf-8") as file:
        for rows in _chunks(_records(paths.part, missing)):
            dump_yaml(rows, file)
    if not missing:
        os.replace(paths.part, paths.raw)


def _records(raw: Path, missing: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with raw.open("rb") as file:
        for line in file:
            row = json.loads(line)
            yield row["custom_id"], record(row["result"])
    for custom_id in missing:
        yield custom_id, record({"type": "unreadable"})


def _chunks(
    rows: Iterator[tuple[str, dict[str, Any]]],
) -> Iterator[dict[str, dict[str, Any]]]:
    chunk: dict[str, dict[str, Any]] = {}
    for custom_id, row in rows:
        chunk[custom_id] = row
        if len(chunk) >= _CHUNK_ROWS:
            yield chunk
            chunk = {}
    if chunk:
        yield chunk


def note_outcome(
    ledger: Ledger, batch_id: str, rows: Iterable[tuple[str, dict[str, Any]]], missing: list[str]
) -> dict[str, int]:
    """Note in the ledger what became of a batch's requests; return how many ended in which way."""
    outcome: dict[str, dict[str, str]] = {"failed": {}, "invalid": {}, "unusable": {}}
    keys, statuses = RequestKeys(ledger), []
    for custom_id, row in rows:
        request, kind = parse_custom_id(custom_id), failed_kind(row)
        status = str(row.get("status", "succeeded"))
        if request and kind:
            outcome[kind][request.unit] = row.get("error") or status
        elif request and status == "succeeded":
            answer = parse_answer(request.task, row, keys.of(request.intent).get(custom_id))
            if answer.kind == "failure":
                outcome["unusable"][request.unit] = answer.reason
                status = "succeeded without a usable answer"
        statuses.append(status)
    if batch_id in ledger.state().batches:
        for unit, reason in list(outcome["invalid"].items())[:3]:
            log.warning("%s is not sent again: %s", unit, reason)
        units = [request.unit for i in missing if (request := parse_custom_id(i))]
        ledger.append("outcome", batch_id=batch_id, missing=units, **outcome)
    return count(statuses)
