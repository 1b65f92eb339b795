"""What a stage says of its settings."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from saint.stage import program, workers
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


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, caplog, capsys):
    caplog.set_level("INFO", logger="saint")

    def work(total):
        with program.progress(total, unit="tok", description="encode", unit_scale=True) as bar:
            bar.refresh()
            for _ in range(4):
                clock[0] += 100.0
                bar.update(500)
                bar.set_postfix(loss=1)
        return [message for message in caplog.messages if "encode" in message]

    clock = [0.0]
    monkeypatch.setattr(program.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(program.tqdm, "monitor_interval", 0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    lines = work(4000)
    assert len(lines) == 2 and capsys.readouterr().err == ""
    assert lines[0].startswith("encode: 500/4.00k tok, 5.00tok/s")  # after 20 s, then 180
    assert "01:40 gone, 11:40 left" in lines[0] and "05:00 gone, 08:19 left" in lines[1]
    assert "500/? tok" in work(None)[2]
    caplog.clear()
    monkeypatch.setattr(program, "_FIRST_LINE_SECONDS", 500.0)
    assert work(4000) == []
    monkeypatch.setattr(program, "_FIRST_LINE_SECONDS", 1.0)
    monkeypatch.setenv("RANK", "1")
    assert work(4000) == []


def test_a_bar_of_ranks_says_whose_it_is():
    def label(world_size: int, model_parallel_size: int) -> str:
        place = workers.Workers(0, world_size, torch.device("cpu"), model_parallel_size)
        return place.label("capture")

    assert label(1, 1) == label(4, 4) == "capture"
    assert label(4, 1) == "capture (rank 0's 1/4)"
