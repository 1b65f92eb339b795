"""A short form of `python -m benchmarks.faults`: stages disturbed, every kind of file damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.stage_damage import damage_table
from tests.support.stage_faults import Campaign, cases, make_inputs

NAMES = [case.name for case in cases(Path())]
# Files without a checksum, of which another one is as good: it is other text, or another number.
WITHOUT_CHECKSUM = {"dataset", "model", "labels", "SAE", "evidence", "top sentences", "SAELens"}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    make_inputs(root)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_whatever_happens_to_a_stage_its_end_is_the_same(inputs: Path, tmp_path: Path, name: str):
    (case,) = (case for case in cases(inputs) if case.name == name)
    campaign = Campaign(case, tmp_path, seed=1)
    campaign.kills(2)
    if case.n_ranks == 1:
        campaign.kills(1, terminate=True, clock_back=True)
        campaign.full_disk(1)
        campaign.read_only()
        campaign.two_at_once()
    tally = campaign.tally
    assert tally.remarks == [] and tally.kills == 2
    assert tally.resumed_equal == tally.resumes > 0 == tally.tracebacks + tally.lost


def test_a_damaged_file_of_any_kind_is_one_line_or_does_no_harm(inputs: Path, tmp_path: Path):
    outcomes = list(damage_table(inputs, tmp_path, seed=3, only=("cut in half", "anywhere")))
    odd = [o for o in outcomes if o.verdict not in ("refused", "as before", "other data")]
    assert odd == [] and len(outcomes) > 40
    others = {o.kind.split(",")[0] for o in outcomes if o.verdict == "other data"}
    assert others <= WITHOUT_CHECKSUM
    assert sum(o.verdict == "refused" for o in outcomes) > len(outcomes) // 2
