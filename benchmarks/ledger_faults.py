"""Kill send and retrieve a few hundred times against a faulty local server; count double payments.

    python -m benchmarks.ledger_faults --kills 200

The server's clock is half an hour early, late or right. It answers with 429, 500, 529, is away for
a while (once in each of the first rounds for a full minute), drops connections before and after it
accepted a batch, or says nothing until the client's time-out, cuts, breaks, doubles and leaves out
result lines, and lets requests expire, fail and be canceled; the campaign goes on until each of
these has happened. Half of the kills fall at uniformly random times, half before or after a random
fsync, rename or socket call. At the end of a round everything must be answered once, paid once, and
every batch id known, without a word from a person. Ends with one JSON line: kills, paid_twice, lost
(ids, answers or records), hands_needed and longest_outage_s.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.support.fault_campaign import campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="processes to kill [200]")
    parser.add_argument("--kills_per_round", type=int, default=5, help="in one directory [5]")
    parser.add_argument("--n_latents", type=int, default=10, help="requests in one round [10]")
    parser.add_argument(
        "--long_outages", type=float, nargs="*", default=[60, 60], help="seconds each [60 60]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of kills and faults [0]")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        found = campaign(
            Path(directory),
            args.kills,
            seed=args.seed,
            kills_per_round=args.kills_per_round,
            n_latents=args.n_latents,
            long_outages=args.long_outages,
        )
    everything = {**asdict(found), "faults": dict(found.faults)}
    print(json.dumps({**everything, "seconds": round(time.monotonic() - began)}, indent=2))
    lost = found.unanswered + found.lost_ids + found.not_recorded
    told = {"kills": found.kills, "paid_twice": found.paid_twice, "lost": lost}
    told |= {
        "hands_needed": found.hands_needed,
        "longest_outage_s": max(found.outages_s, default=0),
    }
    print(json.dumps(told))
    sys.exit(1 if found.paid_twice or lost or found.hands_needed or found.missing else 0)


if __name__ == "__main__":
    main()
