"""Disturb every stage in every way a machine does, and count what was lost: nothing should be.

    python -m benchmarks.faults --kills 200 --work_dir runs/faults

A tiny model's stages (capture, the shuffle in memory, on disk and in place, training on one and two
ranks, top sentences, evaluation, labels, browser, exchange) are killed at random times and before,
in and after random writes, fsyncs, renames and removals; get SIGTERM; meet a disk that is full at
ten sizes, a read-only directory, a second run on the same output, and a clock that was set back.
Whatever happened, the same command must then end with the bytes of an undisturbed run. Then every
kind of file that is read is damaged, and the line that is printed for it is shown in a table. Ends
with one JSON line. Run again with the same --work_dir it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.support.stage_damage import Outcome, damage_table
from tests.support.stage_faults import Campaign, Case, Tally, cases, make_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="over all stages [200]")
    parser.add_argument("--disk_points", type=int, default=10, help="sizes of a full disk [10]")
    parser.add_argument("--seed", type=int, default=0, help="of times and damages [0]")
    parser.add_argument("--work_dir", type=Path, help="to go on after a stop [a temporary one]")
    parser.add_argument("--only", nargs="+", help="stages, by the table's names [all]")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        directory = (args.work_dir or Path(temporary)).resolve()
        total, outcomes = run(args, directory)
    for remark in total.remarks:
        print(f"! {remark}")
    told = {k: v for k, v in asdict(total).items() if k != "remarks"}
    verdicts = {v: sum(o.verdict == v for o in outcomes) for v in {o.verdict for o in outcomes}}
    print(json.dumps({**told, "verdicts": verdicts, "seconds": round(time.monotonic() - began)}))
    sys.exit(1 if total.differences or total.tracebacks or total.lost else 0)


def run(args: argparse.Namespace, directory: Path) -> tuple[Tally, list[Outcome]]:
    """Play what a log in the directory does not hold yet; return all of it."""
    root, log = directory / "inputs", directory / "log.jsonl"
    if not (root / "labels.yaml").exists():
        make_inputs(root)
    known = {}
    if log.exists():
        known = {e["key"]: e["value"] for e in map(json.loads, log.read_text().splitlines())}

    def once(key: str, play: Callable[[], dict | list]) -> dict | list:
        if key not in known:
            known[key] = play()
            with log.open("a") as file:
                file.write(json.dumps({"key": key, "value": known[key]}) + "\n")
        return known[key]

    total, every = Tally(), cases(root)
    for index, case in enumerate(every):
        if args.only and case.name not in args.only:
            continue
        n = (args.kills + index) // len(every)
        key = f"{case.name}, {n} kills, {args.disk_points} points, seed {args.seed}"
        found = Tally(**once(key, lambda case=case, n=n: play(case, directory, n, args)))
        counts = {k: v for k, v in asdict(found).items() if v}
        print(f"{case.name}: {counts}", flush=True)
        total.add(found)
    table = (
        [] if args.only else once(f"damages, {args.seed}", lambda: damage(root, directory, args))
    )
    outcomes = [Outcome(**row) for row in table]
    total.damages += len(outcomes)
    total.tracebacks += sum(outcome.verdict == "traceback" for outcome in outcomes)
    odd = ("refused", "as before", "other data", "traceback")
    total.differences += sum(outcome.verdict not in odd for outcome in outcomes)
    print("\n| file | damage | what came of it | last line |\n|---|---|---|---|")
    for o in outcomes:
        print(f"| {o.kind} | {o.damage} | {o.verdict} | {o.line[:160]} |")
    return total, outcomes


def play(case: Case, directory: Path, n_kills: int, args: argparse.Namespace) -> dict:
    """Disturb one stage in every way."""
    campaign = Campaign(case, directory / case.name.replace(" ", "_"), args.seed)
    campaign.kills(n_kills)
    if case.n_ranks == 1:
        campaign.kills(max(1, n_kills // 6), terminate=True)
        campaign.kills(1, clock_back=True)
        campaign.full_disk(args.disk_points)
        campaign.read_only()
        campaign.two_at_once()
    return asdict(campaign.tally)


def damage(root: Path, directory: Path, args: argparse.Namespace) -> list[dict]:
    """The table's rows."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        return [asdict(o) for o in damage_table(root, Path(place), args.seed)]


if __name__ == "__main__":
    main()
