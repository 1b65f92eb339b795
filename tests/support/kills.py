"""Kill a stage again and again, at random moments, and let it end."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

from tests.support.program import call


def kill_and_resume(
    stage: str, arguments: list[object], directory: Path, seed: int, n_calls: int, made: str = ""
) -> None:
    """Ten kills at random writes, fsyncs, renames and removals, then a run to the end.

    n_calls: about as many as a run makes. made: what to remove to start over if one comes through.
    """
    rng, kills = random.Random(seed), 0
    while kills < 10:
        died = call(stage, *arguments, die_at=rng.randint(2, 2 * n_calls))
        kills += died.returncode == -signal.SIGKILL
        assert died.returncode in (0, -signal.SIGKILL), died.stderr
        if died.returncode == 0 and made:
            shutil.rmtree(directory / made)
        elif died.returncode == 0:
            break
    finished = call(stage, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert kills > 4 and not list(directory.rglob(".*"))
