"""Every numeric flag of every stage has a range, and says so when a number lies outside."""

from __future__ import annotations

import argparse
import importlib

import pytest

from tests.support.program import REPO

STAGES = sorted(path.stem for path in REPO.glob("*.py") if "def build_parser" in path.read_text())
NONSENSE = ("nan", "inf", "-inf", "1e400", "-1", "9" * 30, "x", "")


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_out_of_range_are_refused_by_the_parser(stage: str):
    parser = importlib.import_module(stage).build_parser()
    for action in parser._actions:
        assert action.type not in (int, float), f"{action.dest} takes any number"
        kind = getattr(action.type, "__module__", "")
        if kind != "saint.stage.flags" or action.type.__name__ in ("existing_path",):
            continue
        for text in NONSENSE:
            with pytest.raises(argparse.ArgumentTypeError):
                action.type(text)
