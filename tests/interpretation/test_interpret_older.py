"""A ledger and outputs that an older version left in the middle of its work go on."""

from __future__ import annotations

import gzip
import json
import shutil
from datetime import datetime
from pathlib import Path

import yaml

from tests.support.interpretation_data import judge
from tests.support.interpretation_workplace import Workplace
from tests.support.mock_batches import Batch

OLDER = Path(__file__).resolve().parent / "older_ledger"


def test_an_older_ledger_is_finished(tmp_path: Path):
    """older_ledger: two latents labelled and tested, and a third whose batch's id was lost."""
    work = Workplace(tmp_path, n_latents=3)
    shutil.copytree(OLDER, tmp_path, dirs_exist_ok=True)
    work.api.answer = judge(1.0)
    for line in (work.tops / "response_ids.ledger.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "intent" and event["kind"] == "batch":
            with gzip.open(work.tops / f"response_ids.requests/{event['intent']}.jsonl.gz") as file:
                requests = [json.loads(row) for row in file]
            made, name = (
                datetime.fromisoformat(event["time"]),
                f"msgbatch_{len(work.api.batches):04d}",
            )
            work.api.batches[name] = Batch(name, requests, made)
    assert "found the lost batch of 1 requests: msgbatch_0002" in work.retrieve().stderr
    done = work.parse()
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(work.labels.read_text())
    assert {i: row["common_semantic"] for i, row in found.items()} == {
        i: f"the word topic{i}" for i in range(3)
    }
    assert found[0]["score"]["detect"]["control"] == 0.5 and "score" not in found[2]
    assert found[1]["score"]["detect"]["balanced_accuracy"] == 1.0
    # Everything has its answer: nothing is paid again.
    assert "sent already" in work.send("--no_smoke_test").stderr
    assert len(work.api.batches) == 3
    work.api.close()
