"""Fetch the answers of the batches in `response_ids.yaml`, each once, as raw JSONL and as YAML.

`output/<batch id>.jsonl` holds the API's lines, `output/<batch id>.yaml` what became of every
request: succeeded, errored, canceled or expired. Results are streamed from ANTHROPIC_BASE_URL, so a
proxy serves them too and the key goes nowhere else. The API keeps results for 29 days.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from anthropic.types.messages import MessageBatch

from saint.interpretation.batches import (
    BatchLimits,
    OpenIntent,
    add_batch_flags,
    create_batches,
    prepare_batches,
    reconcile,
    say_what_is_out,
)
from saint.interpretation.client import (
    ApiError,
    Client,
    api_errors,
    open_client,
    total_requests,
)
from saint.interpretation.download import DownloadPaths, download, note_outcome, write_records
from saint.interpretation.ledger import Ledger, parse_custom_id, read_response_ids
from saint.interpretation.prices import RequestTally
from saint.interpretation.prompts import TASKS
from saint.interpretation.responses import (
    read_records,
)
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


@dataclass
class _Round:
    """What one look at all batches found. problems: batch id -> why its results are not to be had.

    waiting: whether something may come by waiting, beside the batches that run.
    """

    running: dict[str, MessageBatch] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    open_intents: list[OpenIntent] = field(default_factory=list)
    waiting: bool = False


def _fetch_all(args: argparse.Namespace, ledger: Ledger, client: Client) -> None:
    pause, last_counts = args.poll_interval_s, {}
    seen = _Round()
    with progress(None, unit="request", description="answered") as bar:
        while True:
            seen = _look(args, ledger, client, seen.problems)
            if not seen.running and not seen.waiting:
                break
            if last_counts != (last_counts := {i: _counts(b) for i, b in seen.running.items()}):
                _show(bar, seen.running)
            if not args.wait:
                break
            time.sleep(pause)
            pause = min(pause * 1.5, args.max_poll_interval_s)
    for item in seen.open_intents:
        log.warning("%s", item)
    _finish(args, ledger, seen)


def _look(
    args: argparse.Namespace, ledger: Ledger, client: Client, problems: dict[str, str]
) -> _Round:
    """Fetch all that has ended; what fails for now is waited for, or ends a run without --wait."""
    found = _Round(problems=problems)
    with _patience(args, found):
        found.open_intents = reconcile(client, ledger)
    for batch_id in _batch_ids(args, ledger):
        if batch_id in problems or _is_done(args, ledger, batch_id):
            continue
        with _patience(args, found):
            with api_errors(f"asking for batch {batch_id}"):
                batch = client.messages.batches.retrieve(batch_id)
            if batch.processing_status == "ended":
                _fetch(args, ledger, client, batch, problems)
            else:
                found.running[batch_id] = batch
    if args.resend_failed and not found.waiting and _resend(args, ledger, client):
        found.waiting = True
    found.waiting |= any(item.running for item in found.open_intents)
    return found


@contextmanager
def _patience(args: argparse.Namespace, found: _Round) -> Iterator[None]:
    """With --wait, an error that passes (429, 5xx, no answer) is something to wait for."""
    try:
        yield
    except ApiError as error:
        if not (args.wait and error.passes):
            raise
        log.info("not now: %s", error)
        found.waiting = True


def _batch_ids(args: argparse.Namespace, ledger: Ledger) -> list[str]:
    known = ledger.state().batches
    path = args.response_ids_filepath
    listed = read_response_ids(path) if path.exists() else []
    ids = list(dict.fromkeys([*listed, *known]))
    if args.task is None:
        return ids
    return [i for i in ids if i in known and known[i].task == args.task]


def _is_done(args: argparse.Namespace, ledger: Ledger, batch_id: str) -> bool:
    """Whether a batch's records are written (and, after a kill in between, noted in the ledger).

    A batch of which lines are still missing has the part of a download, and is not.
    """
    paths = DownloadPaths.of(args.response_output_dir, batch_id)
    if not paths.records.exists() or paths.part.exists():
        return False
    intent = ledger.state().batches.get(batch_id)
    if intent is not None and not intent.retrieved:
        note_outcome(ledger, batch_id, read_records(paths.records), [])
    return True


def _fetch(
    args: argparse.Namespace,
    ledger: Ledger,
    client: Client,
    batch: MessageBatch,
    problems: dict[str, str],
) -> None:
    paths = DownloadPaths.of(args.response_output_dir, batch.id)
    if batch.archived_at or datetime.now(UTC) - batch.created_at > _RESULTS_KEPT:
        when = f"archived on {batch.archived_at:%Y-%m-%d}" if batch.archived_at else "it was made"
        when += "" if batch.archived_at else f" on {batch.created_at:%Y-%m-%d}"
        problems[batch.id] = (
            f"the results of {batch.id} are gone: the API keeps them for 29 days, and {when}"
        )
        return
    n = total_requests(batch)
    with api_errors(f"fetching the results of {batch.id}"):
        seen = download(client, batch.id, n, paths, pause_s=min(args.poll_interval_s, 5))
    intent = ledger.state().batches.get(batch.id)
    expected = [f"{u}-{a}-{intent.id}" for u, a in intent.units.items()] if intent else []
    missing = [i for i in expected if i not in seen]
    missing += [f"line {i}" for i in range(n - len(seen) - len(missing))]
    write_records(paths, missing)
    kinds = note_outcome(ledger, batch.id, read_records(paths.records), missing)
    log.info("%s: %s", batch.id, ", ".join(f"{v} {k}" for k, v in kinds.items()))
    if missing:
        problems[batch.id] = (
            f"{len(missing)} of {n} results of {batch.id} came damaged or not at all: the same "
            "command asks for them again"
        )


def _resend(args: argparse.Namespace, ledger: Ledger, client: Client) -> bool:
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
            create_batches(client, ledger, prepared, task=task, model=model, settle_s=args.settle_s)
    return bool(groups)


def _counts(batch: MessageBatch) -> tuple[str, int]:
    return batch.processing_status, batch.request_counts.processing


def _show(bar: Any, running: dict[str, MessageBatch]) -> None:
    total = sum(total_requests(b) for b in running.values())
    left = sum(b.request_counts.processing for b in running.values())
    bar.total, bar.n = total, total - left
    bar.refresh()
    log.info("%d batches run: %d of %d requests are being processed", len(running), left, total)


def _finish(args: argparse.Namespace, ledger: Ledger, seen: _Round) -> None:
    ids = _batch_ids(args, ledger)
    done = [i for i in ids if _is_done(args, ledger, i)]
    names = [name for i in done for name in (f"{i}.jsonl", f"{i}.yaml")]
    names = [name for name in names if (args.response_output_dir / name).exists()]
    status = list(ledger.state().status.values())
    if n := status.count("failed"):
        log.info("%d requests failed: --resend_failed sends them again", n)
    if n := status.count("unusable"):
        log.info("%d answers are of no use: send --again failures asks again", n)
    if seen.problems:
        raise UserError("; ".join(seen.problems.values()))
    if len(done) < len(ids) or seen.open_intents:
        lost = f", and {len(seen.open_intents)} of which no id is known" * bool(seen.open_intents)
        place = args.response_output_dir
        log.info(
            "%d of %d batches%s are in %s: run again, or --wait", len(done), len(ids), lost, place
        )
        return
    args.response_output_dir.mkdir(parents=True, exist_ok=True)
    sources = {"batches": fingerprint(ids)}
    output = Output(args.response_output_dir, STAGE, {}, sources, single_file=False)
    output.finish(facts={}, counts={"batches": len(ids)}, files=names)
    place = args.response_output_dir
    script = "interpret_top_sentences_parse_responses.py"
    log.info("all %d batches are in %s; next: %s", len(ids), place, script)


if __name__ == "__main__":
    run_stage(main)
