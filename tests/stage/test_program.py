"""What a stage says of its settings."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from saint.stage.program import log_arguments


def told(words: list[str], caplog: pytest.LogCaptureFixture) -> str:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_dir")
    parser.add_argument("--html", type=Path)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--no_bos", action="store_true")
    parser.add_argument("--steer", nargs="+")
    caplog.set_level("INFO", logger="saint")
    log_arguments(parser.parse_args(words), parser)
    return "".join(caplog.messages)


def test_the_first_line_names_only_what_differs_from_the_defaults(caplog: pytest.LogCaptureFixture):
    assert told([], caplog) == ""
    paths = ["--model_dir", "some/where", "--html", "page.html"]
    assert told([*paths, "--k", "64"], caplog) == ""
    words = [*paths, "--k", "32", "--no_bos", "--steer", "3=+1", "5=off"]
    assert told(words, caplog) == "settings: k 32, no_bos, steer 3=+1 5=off, else the defaults"
