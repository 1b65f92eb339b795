"""Random `kill -9` of send and retrieve, with server faults: everything answered and paid once."""

from __future__ import annotations

from pathlib import Path

from tests.support.fault_campaign import campaign


def test_twenty_kills(tmp_path: Path):
    tally = campaign(tmp_path, 20, seed=1)
    assert tally.kills >= 20
    assert not tally.missing and tally.faults["create:hang_after"] > 0
    assert tally.faults["create:hang_before"] > 0 and tally.faults["results:hang_before"] > 0
    assert tally.faults["results:missing"] > 0 and tally.faults["create:outage"] > 0
    assert tally.hands_needed == 0
    assert tally.paid_twice == 0
    assert tally.unanswered == 0
    assert tally.lost_ids == 0
    assert tally.not_recorded == 0
