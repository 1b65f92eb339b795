"""Random `kill -9` of send and retrieve, with server faults: everything answered and paid once."""

from __future__ import annotations

from pathlib import Path

from fault_campaign import campaign


def test_twenty_kills(tmp_path: Path):
    tally = campaign(tmp_path, 20, seed=1)
    assert tally.kills >= 20
    assert sum(tally.faults.values()) > 5
    assert tally.paid_twice == 0
    assert tally.unanswered == 0
    assert tally.lost_ids == 0
    assert tally.not_recorded == 0
