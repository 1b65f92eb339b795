"""Fixtures of several test files."""

from pathlib import Path

import pytest

from tests.support.interpretation_workplace import Workplace


@pytest.fixture
def work(tmp_path: Path):
    place = Workplace(tmp_path)
    yield place
    place.api.close()
