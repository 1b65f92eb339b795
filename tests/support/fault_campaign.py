"""Kill send and retrieve with `kill -9` again and again, and count what the server was paid for."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import yaml

from saint.interpretation.ledger import Ledger
from tests.support.interpretation_data import row, write_evidence
from tests.support.mock_batches import FAULTS, MockApi
from tests.support.program import Finished, finished, start

_SETTLE_S = 1.5
# More than a stage has fsyncs, renames and socket calls, counted before and after.
_LAST_EVENT = 160
_MAX_RUNS = 80
_MAX_ROUNDS = 1000
_TIMEOUT_S = 1.0
_OUTAGE_S = 0.8
# What must have happened before a campaign ends: faults of the server, and fates of requests.
KINDS = FAULTS | {"row:expired", "row:errored", "row:canceled", "rows:out of order", "batch:slow"}


@dataclass
class Campaign:
    """What happened. Each of the last five must stay 0, and `missing` be empty in the end.

    due_outages: lengths of long outages that are still to come, in seconds; outages_s: that were.
    """

    kills: int = 0
    runs: int = 0
    rounds: int = 0
    batches: int = 0
    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    due_outages: list[float] = field(default_factory=list)
    outages_s: list[float] = field(default_factory=list)
    taken_as_lost: int = 0
    found_again: int = 0
    hands_needed: int = 0
    paid_twice: int = 0
    unanswered: int = 0
    lost_ids: int = 0
    not_recorded: int = 0

    @property
    def missing(self) -> list[str]:
        """Kinds of faults that did not happen yet."""
        return sorted(KINDS - set(+self.faults))


class Round:
    """One directory, one server: kills and faults until everything is answered."""

    def __init__(self, directory: Path, seed: int, tally: Campaign, n_latents: int) -> None:
        self.rng = random.Random(seed)
        self.tally, self.n_latents, self.directory = tally, n_latents, directory
        self.api = MockApi(
            seed=seed,
            fault_rate=0.12,
            accept_delay_s=0.004,
            polls_until_ended=2,
            random_kinds={"expired": 0.06, "errored": 0.06, "canceled": 0.04},
            patience_s=0.9 * _TIMEOUT_S,
            outage_s=_OUTAGE_S,
            skew=timedelta(minutes=self.rng.choice((-30, 0, 30))),
        )
        self.long_outages: list[float] = []
        due = sorted(FAULTS & set(tally.missing))
        self.api.faults = self.rng.sample(due, min(8, len(due)))
        if tally.due_outages:
            self.long_outages = [tally.due_outages.pop()]
            self.api.long_outages = list(self.long_outages)
            self.api.faults.append(self.rng.choice(("create:outage", "read:outage")))
        write_evidence(directory / "evidence.parquet", [row(i, n=8) for i in range(n_latents)])
        self.ids = directory / "response_ids.yaml"
        self.output = directory / "output"
        self.usual_s = 0.3

    def send(self, kill: str | None, *args: object) -> Finished | None:
        files = ("--top_sentences_dict_filepath", self.directory / "top_sentences_max.yaml")
        batches = ("--no_smoke_test", "--max_batch_requests", 4, "--max_attempts", 99)
        return self._run(
            kill,
            "interpret_top_sentences_send_batches",
            *files,
            "--response_ids_filepath",
            self.ids,
            *batches,
            *args,
        )

    def retrieve(self, kill: str | None) -> Finished | None:
        files = ("--response_ids_filepath", self.ids, "--response_output_dir", self.output)
        waiting = ("--wait", "--poll_interval_s", 0.01, "--max_poll_interval_s", 0.05)
        again = ("--resend_failed", "--max_attempts", 99, "--max_batch_requests", 4)
        return self._run(kill, "interpret_top_sentences_retrieve_batches", *files, *waiting, *again)

    def _run(self, kill: str | None, stage: str, *args: object) -> Finished | None:
        """Run a stage; None when it was killed. kill: at a random "time", or "event"."""
        args = (*args, "--timeout_s", _TIMEOUT_S, "--settle_s", _SETTLE_S)
        self.tally.runs += 1
        assert self.tally.runs < _MAX_RUNS * (self.tally.rounds + 1), "no end in sight"
        event = self.rng.randrange(2, _LAST_EVENT) if kill == "event" else None
        output = self.directory / "terminal"
        began = time.monotonic()
        process = start(stage, *args, env=self.api.env, output=output, die_at=event)
        if kill == "time":
            process.join(self.rng.uniform(0, 1.2 * self.usual_s))
            process.kill()
        process.join(90 + 5 * max(self.long_outages, default=0))
        if process.exitcode == -signal.SIGKILL:
            self.tally.kills += 1
            return None
        self.usual_s = 0.8 * self.usual_s + 0.2 * (time.monotonic() - began)
        done = finished(process, output)
        assert "Traceback" not in done.stderr, done.stderr
        self.tally.found_again += done.stderr.count("found the lost batch")
        return done

    def play(self, kinds: list[str]) -> None:
        """Send and retrieve until everything is answered; no person says anything in between."""
        for _ in range(_MAX_RUNS):
            done = self.send(kinds.pop() if kinds else None)
            if done is not None:
                self.tally.taken_as_lost += done.stderr.count("taken as lost")
            fetched = self.retrieve(kinds.pop() if kinds else None) if self.ids.exists() else None
            finished = done is not None and done.returncode == 0
            finished = finished and fetched is not None and fetched.returncode == 0
            if finished and not kinds and self._all_answered():
                break
        else:
            self.tally.hands_needed += 1
        self._check()
        self.api.close()

    def _all_answered(self) -> bool:
        status = Ledger(self.ids).state().status
        return len(status) == self.n_latents and set(status.values()) == {"answered"}

    def _check(self) -> None:
        tally, api = self.tally, self.api
        paid = api.paid()
        tally.rounds += 1
        tally.batches += len(api.batches)
        tally.requests += sum(len(batch.requests) for batch in api.batches.values())
        tally.faults += api.injected
        tally.outages_s += self.long_outages[len(api.long_outages) :]
        for batch in api.batches.values():
            ids = [row["custom_id"] for row in batch.results]
            tally.faults["rows:out of order"] += ids != [r["custom_id"] for r in batch.requests]
            tally.faults["batch:slow"] += batch.polls >= api.polls_until_ended
            tally.faults.update(f"row:{row['result']['type']}" for row in batch.results)
        tally.paid_twice += sum(n - 1 for n in paid.values())
        tally.unanswered += self.n_latents - len(paid)
        listed = yaml.safe_load(self.ids.read_text())
        tally.lost_ids += len(set(api.batches) ^ set(listed)) + len(listed) - len(set(listed))
        recorded: Counter[str] = Counter()
        for batch_id in listed:
            rows = yaml.safe_load((self.output / f"{batch_id}.yaml").read_text())
            recorded.update(
                "-".join(custom_id.split("-")[:2])
                for custom_id, record in rows.items()
                if record["status"] == "succeeded"
            )
        tally.not_recorded += sum((paid - recorded).values()) + sum((recorded - paid).values())


def campaign(
    directory: Path,
    n_kills: int,
    *,
    seed: int = 0,
    kills_per_round: int = 5,
    n_latents: int = 10,
    long_outages: Sequence[float] = (),
) -> Campaign:
    """Play rounds until n_kills processes were killed, at random times and at random calls.

    And until every kind of fault has happened: rounds without kills follow where one is missing.
    long_outages: seconds of outages that come one a round; the others last less than a second.
    """
    tally = Campaign(due_outages=list(long_outages))
    while tally.kills < n_kills or tally.missing or tally.due_outages:
        assert tally.rounds < _MAX_ROUNDS, f"never happened: {tally.missing}"
        place = directory / f"round_{tally.rounds}"
        place.mkdir(parents=True)
        left = min(kills_per_round, n_kills - tally.kills)
        kinds = [("time", "event")[(seed + i) % 2] for i in range(left)]
        Round(place, seed * 1000 + tally.rounds, tally, n_latents).play(kinds)
    return tally
