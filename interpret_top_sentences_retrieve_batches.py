"""Fetch the answers of the batches in `response_ids.yaml`, each once, as raw JSONL and as YAML.

`output/<batch id>.jsonl` holds the API's lines, `output/<batch id>.yaml` what became of every
request: succeeded, errored, canceled or expired. Results are streamed from ANTHROPIC_BASE_URL, so a
proxy serves them too and the key goes nowhere else. The API keeps results for 29 days.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anthropic
from anthropic.types.messages import MessageBatch

from saint.interpretation.batches import (
    BatchLimits,
    add_batch_flags,
    create_batches,
    prepare_batches,
    reconcile,
    say_what_is_out,
)
from saint.interpretation.client import api_errors, describe, open_client, total_requests
from saint.interpretation.download import Paths, download, write_records
from saint.interpretation.ledger import Ledger, parse_custom_id, read_response_ids
from saint.interpretation.prices import RequestTally
from saint.interpretation.prompts import TASKS
from saint.interpretation.responses import count, failed_kind, read_records
from saint.stage.errors import UserError, log
from saint.stage.flags import positive_float
from saint.stage.manifests import Output, fingerprint
from saint.stage.program import log_arguments, progress, run_stage

_RESULTS_KEPT = timedelta(days=29)
STAGE = "interpret_top_sentences_retrieve_batches"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument(
        "--response_ids_filepath", type=Path, required=True, help="list of batch ids, from send"
    )
    files.add_argument(
        "--response_output_dir", type=Path, required=True, help="where <batch id>.yaml go"
    )
    files.add_argument("--task", choices=TASKS, help="only the batches of this task [all]")
    wait = parser.add_argument_group("waiting")
    wait.add_argument("--wait", action="store_true", help="poll until every batch has ended")
    wait.add_argument(
        "--poll_interval_s",
        type=positive_float,
        default=10,
        help="first pause between polls, s [10]",
    )
    wait.add_argument(
        "--max_poll_interval_s",
        type=positive_float,
        default=300,
        help="longest pause between polls, s [300]",
    )
    again = parser.add_argument_group("failed requests")
    again.add_argument(
        "--resend_failed",
        action="store_true",
        help="send expired, canceled and server-error requests again (invalid ones never)",
    )
    add_batch_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch what has ended; with --wait until everything has."""
    args = build_parser().parse_args(argv)
    log_arguments(args, build_parser())
    ledger = Ledger(args.response_ids_filepath)
    if not ledger.path.exists():
        read_response_ids(args.response_ids_filepath)  # says what is wrong with it
    client = open_client(args.timeout_s)
    if ledger.state().batches:  # a killed send may have left the list behind
        ledger.write_response_ids()
    try:
        _fetch_all(args, ledger, client)
    except KeyboardInterrupt:
        say_what_is_out(ledger)
        raise


def _fetch_all(args: argparse.Namespace, ledger: Ledger, client: anthropic.Anthropic) -> None:
    pause, problems, last_counts = args.poll_interval_s, {}, {}
    with progress(None, unit="request", description="answered") as bar:
        while True:
            running, waiting = _round(args, ledger, client, problems)
            if not running and not waiting:
                break
            if last_counts != (last_counts := {i: _counts(b) for i, b in running.items()}):
                _show(bar, running)
            if not args.wait:
                log.info("%d batches still run: run again, or with --wait", len(running))
                break
            time.sleep(pause)
            pause = min(pause * 1.5, args.max_poll_interval_s)
    if problems:
        raise UserError("; ".join(problems.values()))
    if not running:
        _finish(args, ledger)


def _round(
    args: argparse.Namespace,
    ledger: Ledger,
    client: anthropic.Anthropic,
    problems: dict[str, str],
) -> tuple[dict[str, MessageBatch], bool]:
    """Fetch all that has ended. Returns what still runs, and whether there is more to wait for."""
    open_intents = reconcile(client, ledger)
    pending = [
        i for i in _batch_ids(args, ledger) if i not in problems and not _is_done(args, ledger, i)
    ]
    batches = {batch_id: _status(client, batch_id, patient=args.wait) for batch_id in pending}
    for batch in batches.values():
        if batch is not None and batch.processing_status == "ended":
            _fetch(args, ledger, client, batch, problems)
    running = {i: b for i, b in batches.items() if b is not None and b.processing_status != "ended"}
    resent = args.resend_failed and not open_intents and _resend(args, ledger, client)
    for item in open_intents:
        log.warning("%s", item)
    unknown = any(b is None for b in batches.values())
    return running, bool(resent or unknown or any(i.waiting_for for i in open_intents))


def _batch_ids(args: argparse.Namespace, ledger: Ledger) -> list[str]:
    known = ledger.state().batches
    path = args.response_ids_filepath
    listed = read_response_ids(path) if path.exists() else []
    ids = list(dict.fromkeys([*listed, *known]))
    if args.task is None:
        return ids
    return [i for i in ids if i in known and known[i].task == args.task]


def _is_done(args: argparse.Namespace, ledger: Ledger, batch_id: str) -> bool:
    """Whether a batch's records are written (and, after a kill in between, noted in the ledger)."""
    paths = Paths.of(args.response_output_dir, batch_id)
    if not paths.records.exists():
        return False
    intent = ledger.state().batches.get(batch_id)
    if intent is not None and not intent.retrieved:
        rows = read_records(paths.records)
        _note_outcome(ledger, batch_id, {i: row for i, row in rows if failed_kind(row)})
    return True


def _status(client: anthropic.Anthropic, batch_id: str, *, patient: bool) -> MessageBatch | None:
    """Ask how a batch is; None when the API does not answer now and we are patient."""
    try:
        return client.messages.batches.retrieve(batch_id)
    except anthropic.APIError as error:
        status = getattr(error, "status_code", None)
        if patient and (status is None or status == 429 or status >= 500):
            log.info("no status of %s now: %s", batch_id, describe(error))
            return None
        with api_errors(f"asking for batch {batch_id}"):
            raise


def _fetch(
    args: argparse.Namespace,
    ledger: Ledger,
    client: anthropic.Anthropic,
    batch: MessageBatch,
    problems: dict[str, str],
) -> None:
    paths = Paths.of(args.response_output_dir, batch.id)
    if batch.archived_at or datetime.now(UTC) - batch.created_at > _RESULTS_KEPT:
        problems[batch.id] = (
            f"the results of {batch.id} are gone: the API keeps them for 29 days, and it was made "
            f"on {batch.created_at:%Y-%m-%d}"
        )
        return
    n = total_requests(batch)
    pause = min(args.poll_interval_s, 5)
    with api_errors(f"fetching the results of {batch.id}"):
        seen = download(client, batch.id, n, paths, pause_s=pause)
    intent = ledger.state().batches.get(batch.id)
    expected = [f"{u}-{a}-{intent.id}" for u, a in intent.units.items()] if intent else []
    missing = [i for i in expected if i not in seen]
    failed = write_records(paths, missing)
    _note_outcome(ledger, batch.id, failed)
    kinds = count(row["status"] for row in failed.values())
    lost = n - len(seen) - len(missing)
    told = [f"{n - sum(kinds.values()) - lost} succeeded", *(f"{v} {k}" for k, v in kinds.items())]
    log.info("%s: %s", batch.id, ", ".join(told + ([f"{lost} without a line"] if lost else [])))


def _note_outcome(ledger: Ledger, batch_id: str, failed: dict[str, dict[str, Any]]) -> None:
    if batch_id not in ledger.state().batches:
        return
    outcome: dict[str, dict[str, str]] = {"failed": {}, "invalid": {}}
    for custom_id, row in failed.items():
        request, kind = parse_custom_id(custom_id), failed_kind(row)
        if request and kind:
            outcome[kind][request.unit] = row.get("error") or row["status"]
    for unit, reason in list(outcome["invalid"].items())[:3]:
        log.warning("%s is not sent again: %s", unit, reason)
    ledger.append("outcome", batch_id=batch_id, **outcome)


def _resend(args: argparse.Namespace, ledger: Ledger, client: anthropic.Anthropic) -> bool:
    """Send failed requests again, as they were, under the next attempt's number."""
    with ledger.sender_lock():
        state = ledger.state()
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for intent in state.batches.values():
            again = {
                unit
                for unit, attempt in intent.units.items()
                if state.status.get(unit) == "failed"
                and not intent.superseded
                and attempt == state.attempts[unit] < args.max_attempts
            }
            for row in ledger.read_requests(intent.id) if again else ():
                request = parse_custom_id(row["custom_id"])
                if request and request.unit in again:
                    attempt = request.attempt + 1
                    renamed = {**row, "unit": request.unit, "attempt": attempt}
                    groups.setdefault((intent.task, intent.model), []).append(renamed)
        for (task, model), rows in groups.items():
            log.info("%d failed requests are sent again", len(rows))
            prepared = prepare_batches(ledger, rows, BatchLimits.of(args), RequestTally())
            create_batches(
                client, ledger, prepared, task=task, model=model, retries=args.create_retries
            )
    return bool(groups)


def _counts(batch: MessageBatch) -> tuple[str, int]:
    return batch.processing_status, batch.request_counts.processing


def _show(bar: Any, running: dict[str, MessageBatch]) -> None:
    total = sum(total_requests(b) for b in running.values())
    left = sum(b.request_counts.processing for b in running.values())
    bar.total, bar.n = total, total - left
    bar.refresh()
    log.info("%d batches run: %d of %d requests are being processed", len(running), left, total)


def _finish(args: argparse.Namespace, ledger: Ledger) -> None:
    ids = _batch_ids(args, ledger)
    names = [name for i in ids for name in (f"{i}.jsonl", f"{i}.yaml")]
    names = [name for name in names if (args.response_output_dir / name).exists()]
    args.response_output_dir.mkdir(parents=True, exist_ok=True)
    output = Output(
        args.response_output_dir, STAGE, {}, {"batches": fingerprint(ids)}, single_file=False
    )
    output.finish(facts={}, counts={"batches": len(ids)}, files=names)
    state = ledger.state()
    failed = [unit for unit, status in state.status.items() if status == "failed"]
    log.info(
        "all %d batches are in %s; next: interpret_top_sentences_parse_responses.py",
        len(ids),
        args.response_output_dir,
    )
    if failed:
        log.info("%d requests failed: --resend_failed sends them again", len(failed))


if __name__ == "__main__":
    run_stage(main)
