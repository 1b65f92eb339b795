"""The ledger of paid requests: what was about to be sent, what was accepted, and how it ended.

One JSON object per line, append-only and fsynced, beside `response_ids.yaml`. An `intent` line is
on disk before a batch is created and its `created` line right after, so that a crash in between
leaves an intent without an id: nothing of it is sent again until it is matched with a batch that
the API lists (`saint.interpretation.batches.reconcile`), or is known to have made none.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from saint.stage.errors import UserError
from saint.stage.files import atomic_path, sync_directory, write_text
from saint.stage.yaml_files import DUMPER

_CUSTOM_ID = re.compile(
    r"(?P<task>[a-z_]+)-(?P<latent>\d+)(?:-(?P<label>h[0-9a-f]{8}))?(?:-p(?P<part>\d+))?"
    r"-(?P<attempt>\d+)-(?P<intent>[0-9a-f]{10})"
)
_BATCH_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_TORN = b"#torn"


class RequestId(NamedTuple):
    """What a `custom_id` says: the task, the latent, the label's hash and part (of a test), …."""

    task: str
    latent: int
    label: str | None
    attempt: int
    intent: str
    part: int | None = None

    @property
    def unit(self) -> str:
        """The piece of work, whatever the attempt: "explain-12" or "detect-12-h0a1b2c3d-p3"."""
        return unit_name(self.task, self.latent, self.label, self.part)

    @property
    def custom_id(self) -> str:
        """The id as it is sent: at most 64 characters of [A-Za-z0-9_-]."""
        return f"{self.unit}-{self.attempt}-{self.intent}"


def unit_name(task: str, latent: int, label: str | None, part: int | None) -> str:
    """Name a piece of work: what is asked, of which latent, label (by its hash) and part."""
    return "-".join(filter(None, (task, str(latent), label, f"p{part}" if part else None)))


def parse_custom_id(custom_id: str) -> RequestId | None:
    """Read a `custom_id`; a bare integer is a latent of an older run; None when it is neither."""
    if match := _CUSTOM_ID.fullmatch(custom_id):
        task, latent, label, part, attempt, intent = match.groups()
        n_part = int(part) if part else None
        return RequestId(task, int(latent), label, int(attempt), intent, n_part)
    if custom_id.isascii() and custom_id.isdigit():
        return RequestId("explain", int(custom_id), None, 1, "")
    return None


def new_intent_id() -> str:
    """Return ten random hex digits: they mark every request of one batch in its `custom_id`."""
    return secrets.token_hex(5)


@dataclass
class Intent:
    """A batch (or a group of live requests) that was about to be sent.

    units: unit -> attempt. resolution: None while nobody knows whether the API accepted it, else
    "created", "answered" (live), "refused" or "lost". superseded: a later `--overwrite` began anew.
    server_time, failed: when it was written, and when its request failed, by the server's clock
    (None where that is not known). newest: the batch that the API listed first just before it.
    asked, done: of live requests, those that were begun, and those that ended (or never began).
    """

    id: str
    kind: str
    task: str
    model: str
    time: datetime
    units: dict[str, int]
    resolution: str | None = None
    batch_id: str | None = None
    retrieved: bool = False
    superseded: bool = False
    server_time: datetime | None = None
    failed: datetime | None = None
    newest: str | None = None
    asked: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)

    @property
    def is_live(self) -> bool:
        """Whether it went out without a batch ("live": one request, of an older version)."""
        return self.kind in ("live", "live_group")

    @property
    def in_flight(self) -> set[str]:
        """Live requests of which nobody knows whether they were answered (and billed)."""
        return (set(self.units) if self.kind == "live" else self.asked) - self.done

    @property
    def is_paid_for(self) -> bool:
        """Whether the API accepted it, as far as anybody knows."""
        return self.resolution in ("created", "answered") or bool(self.is_live and self.done)


@dataclass
class LedgerState:
    """The ledger's events added up.

    status: unit -> "out", "answered", "failed" (not billed), "invalid" (would fail again) or
    "unusable" (billed, and of no use). reasons: unit -> why, where it is one of the last three.
    """

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    intents: dict[str, Intent] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    live: dict[str, dict[str, Any]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)

    @property
    def unresolved(self) -> list[Intent]:
        """Intents of which nobody knows yet whether the API accepted them."""
        return [intent for intent in self.intents.values() if intent.resolution is None]

    @property
    def batches(self) -> dict[str, Intent]:
        """Batch id -> intent of every batch that exists, in the order of creation."""
        return {i.batch_id: i for i in self.intents.values() if i.batch_id is not None}


def replay(events: Iterable[dict[str, Any]]) -> LedgerState:
    """Add up a ledger's events."""
    state = LedgerState()
    for event in events:
        _APPLY[event["event"]](state, event)
    return state


def _apply_run(state: LedgerState, event: dict[str, Any]) -> None:
    task = event["task"]
    state.runs[task] = event["config"]
    for intent in state.intents.values():
        if intent.task == task:
            intent.superseded = True
    for unit in [u for u in state.status if u.split("-")[0] in (task, f"{task}_control")]:
        del state.status[unit]


def _apply_intent(state: LedgerState, event: dict[str, Any]) -> None:
    units = {}
    for text in event["units"]:
        unit, _, attempt = text.rpartition("-")
        units[unit] = int(attempt)
    time = datetime.fromisoformat(event["time"])
    intent = Intent(event["intent"], event["kind"], event["task"], event["model"], time, units)
    intent.server_time, intent.newest = _time(event.get("server_time")), event.get("newest")
    state.intents[intent.id] = intent
    for unit, attempt in units.items():
        state.status[unit] = "out"
        state.attempts[unit] = attempt


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _apply_unclear(state: LedgerState, event: dict[str, Any]) -> None:
    state.intents[event["intent"]].failed = _time(event.get("server_time"))


def _apply_created(state: LedgerState, event: dict[str, Any]) -> None:
    intent = state.intents[event["intent"]]
    intent.resolution, intent.batch_id = "created", event["batch_id"]


def _apply_asking(state: LedgerState, event: dict[str, Any]) -> None:
    state.intents[event["intent"]].asked.add(event["unit"])


def _apply_answered(state: LedgerState, event: dict[str, Any]) -> None:
    intent = state.intents[event["intent"]]
    for unit in [event["unit"]] if "unit" in event else list(intent.units):
        _end(intent, unit)
        state.live[f"{unit}-{intent.units[unit]}-{intent.id}"] = event["response"]
        if intent.superseded:
            continue
        state.status[unit] = "answered"
        if reason := event.get("unusable"):
            state.status[unit], state.reasons[unit] = "unusable", reason


def _apply_released(state: LedgerState, event: dict[str, Any]) -> None:
    """Live requests that were not answered: never begun, lost, or refused for good ("invalid")."""
    intent = state.intents[event["intent"]]
    for unit in event["units"]:
        _end(intent, unit)
        if intent.superseded:
            continue
        state.status.pop(unit, None)
        if reason := event.get("invalid"):
            state.status[unit], state.reasons[unit] = "invalid", reason


def _end(intent: Intent, unit: str) -> None:
    intent.done.add(unit)
    if intent.done >= set(intent.units):
        intent.resolution = "answered"


def _apply_not_sent(state: LedgerState, event: dict[str, Any]) -> None:
    intent = state.intents[event["intent"]]
    intent.resolution = event["event"]
    for unit in intent.units:
        if not intent.superseded:
            state.status.pop(unit, None)


def _apply_again(state: LedgerState, event: dict[str, Any]) -> None:
    intent = state.intents[event["intent"]]
    intent.resolution = None
    state.status |= dict.fromkeys(intent.units, "out")


def _apply_outcome(state: LedgerState, event: dict[str, Any]) -> None:
    intent = state.batches.get(event["batch_id"])
    if intent is None:
        return
    missing = set(event.get("missing", ()))
    intent.retrieved = not missing
    if intent.superseded:
        return
    for unit in set(intent.units) - missing:
        state.status[unit] = "answered"
    for kind in ("failed", "invalid", "unusable"):
        for unit, reason in event.get(kind, {}).items():
            state.status[unit], state.reasons[unit] = kind, reason


def _apply_cancel(state: LedgerState, event: dict[str, Any]) -> None:
    state.cancelled.add(event["batch_id"])


_APPLY = {
    "run": _apply_run,
    "intent": _apply_intent,
    "unclear": _apply_unclear,
    "created": _apply_created,
    "asking": _apply_asking,
    "answered": _apply_answered,
    "released": _apply_released,
    "refused": _apply_not_sent,
    "lost": _apply_not_sent,
    "again": _apply_again,
    "outcome": _apply_outcome,
    "cancel": _apply_cancel,
}


# Of a run's config: what does not change the question, and what every version of it has.
_NOT_ASKED = {"form", "plain_requests"}
_LASTING = {"model", "made_from", "ranking", "source"}


def _version(config: dict[str, Any]) -> int:
    return int(str(config.get("prompt", "1")).partition(".")[0])


_REPAIR = "it records what was paid for, so nothing is sent before it is repaired from a backup"


class Ledger:
    """The ledger beside one `response_ids.yaml`, and the requests that it sent.

    `<stem>.ledger.jsonl` holds the events, `<stem>.requests/<intent>.jsonl.gz` every request of a
    batch as it was sent, with the key to its answers where it was a test.
    """

    def __init__(self, response_ids_path: Path) -> None:
        self.response_ids_path = response_ids_path
        stem = response_ids_path.with_suffix("")
        self.path = stem.with_name(stem.name + ".ledger.jsonl")
        self.requests_dir = stem.with_name(stem.name + ".requests")

    def state(self) -> LedgerState:
        """Read the events. Raises UserError when one that was written whole is damaged."""
        try:
            return replay(self._events())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}, an event is damaged ({error!r}): {_REPAIR}") from None

    def _events(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        raw = self.path.read_bytes()
        lines = raw.split(b"\n")
        # Without its newline the last line was never fsynced: what it announces did not happen.
        for number, line in enumerate(lines[:-1], start=1):
            if not line or line.endswith(_TORN):
                continue
            try:
                event = json.loads(line)
                if event["event"] not in _APPLY:
                    raise KeyError(event["event"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}, line {number}, is damaged: {_REPAIR}") from None
            yield event

    @contextmanager
    def sender_lock(self) -> Iterator[None]:
        """Hold the right to send from this directory; raises UserError when another process has it.

        The directory itself is locked (flock), so that nothing is written before anything is sent.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(
                f"another process is sending from {self.path.parent}: wait until it has ended"
            ) from None
        finally:
            os.close(descriptor)

    def append(self, event: str, **fields: Any) -> None:
        """Write one event and fsync it (and, for a new file, its directory)."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"event": event, "time": now, **fields}).encode() + b"\n"
        new = not self.path.exists()
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    line = _TORN + b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_directory(self.path.parent)

    def write_response_ids(self) -> list[str]:
        """Rewrite `response_ids.yaml`: the ids of all batches that exist, oldest first."""
        ids = list(self.state().batches)
        write_text(self.response_ids_path, yaml.dump(ids, Dumper=DUMPER))
        return ids

    def begins_anew(self, task: str, config: dict[str, Any], *, overwrite: bool) -> bool:
        """Whether a task is sent for the first time, or all over again (`overwrite`).

        Raises UserError when it was sent with another config, naming the difference, or when the
        list of batch ids is not this ledger's.
        """
        ids = self.response_ids_path
        if ids.exists() and not self.path.exists() and read_response_ids(ids):
            raise UserError(f"{ids} lists batches but has no ledger: choose another file")
        state = self.state()
        last = state.runs.get(task)
        if last is None:
            return True
        if overwrite:
            out = [b for b, i in state.batches.items() if i.task == task and not i.retrieved]
            if out:
                raise UserError(
                    f"--overwrite would pay again for what is out ({', '.join(out)}): retrieve "
                    "these batches first (after --cancel, if their answers are not wanted)"
                )
            return True
        names = sorted({*last, *config} - _NOT_ASKED)
        if _version(last) < _version(config):
            # What was asked in an older version's words keeps its answers.
            names = [name for name in names if name in _LASTING]
        for name in names:
            old, new = last.get(name), config.get(name)
            if old != new:
                raise UserError(
                    f"{ids} was sent with {name} {old}, this run has {new}: "
                    "use the same, another file, or --overwrite to ask, and pay, anew"
                )
        return False

    def requests_path(self, intent: str) -> Path:
        """Where the requests of an intent lie."""
        return self.requests_dir / f"{intent}.jsonl.gz"

    def write_requests(self, intent: str, requests: Iterable[dict[str, Any]]) -> None:
        """Write {"custom_id", "params", "key"} rows, atomically."""
        with atomic_path(self.requests_path(intent)) as temporary:
            with gzip.open(temporary, "wt", encoding="utf-8", compresslevel=4) as file:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in requests)

    def read_requests(self, intent: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of `write_requests`; raises UserError when the file is gone or damaged."""
        path = self.requests_path(intent)
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                yield from map(json.loads, file)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: it holds what was sent") from None
        except (ValueError, EOFError, gzip.BadGzipFile):
            raise UserError(f"{path} is damaged: it holds what was sent") from None

    def remove_unsent_requests(self) -> None:
        """Remove request files that no intent names (an interrupted run prepared them)."""
        known = self.state().intents
        if self.requests_dir.exists():
            for path in self.requests_dir.iterdir():
                if path.name.split(".")[0] not in known:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_response_ids(path: Path) -> list[str]:
    """Read a `response_ids.yaml`; raises UserError unless it is a list of batch ids."""
    if not path.exists():
        raise UserError(f"{path} does not exist: run interpret_top_sentences_send_batches.py first")
    try:
        ids = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is not YAML") from None
    ids = [] if ids is None else ids
    if not isinstance(ids, list) or not all(
        isinstance(i, str) and _BATCH_ID.fullmatch(i) for i in ids
    ):
        raise UserError(f"{path} is not a plain list of batch ids")
    return ids
