"""`benchmarks/gpu.sh`: on the day that a card is there, no line of it fails for a typo."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from benchmarks.sae_profile import busy
from tests.support.program import REPO


@pytest.mark.timeout(900)  # half a minute on two idle cores
def test_every_line_runs(tmp_path):
    output = tmp_path / "results.jsonl"
    command = ["bash", "benchmarks/gpu.sh", "--device=cpu", "--tiny", f"--work_dir={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--output_path={output}"],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in output.read_text().splitlines()]
    bad = [line for line in found if line["status"] not in ("ok", "skipped")]
    assert not bad, bad
    left_out = {line["said"].split()[0] for line in found if line["status"] == "skipped"}
    assert left_out <= {"sparsify", "sae_lens", "triton"}, "what other tests may lack too"
    table = done.stdout.split("\n\n")[-2].splitlines()
    assert len(table) == len(found) == len({line["line"] for line in found})
    alike = [line["result"] for line in found if line["line"].startswith("same bits")]
    assert alike and all(r["two_runs_alike"] and r["killed_and_resumed_alike"] for r in alike)


def test_what_fails_or_takes_too_long_stops_nothing(tmp_path, monkeypatch, capsys):
    gpu = pytest.importorskip("benchmarks.gpu")

    def crash(argv):
        print(json.dumps({"half": 1}))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def hang(argv):
        subprocess.run(["sleep", "60"], check=True)

    def fine(argv):
        print(f'{{"device": "{argv[-1]}"}}')

    lines = [gpu.Line(f.__name__, 1, f, shows=("device",)) for f in (crash, hang, fine)]
    monkeypatch.setattr(gpu, "lines", lambda _: iter(lines))
    output = tmp_path / "results.jsonl"
    gpu.main([f"--output_path={output}", "--device=cpu"])
    crashed, hung, last = (json.loads(line) for line in output.read_text().splitlines())
    assert crashed["status"] == "failed (1)" and "illegal memory" in crashed["said"][-1]
    assert hung["status"] == "took more than 1 s"
    assert (last["status"], last["result"]) == ("ok", {"device": "cpu"})
    assert "illegal memory" in capsys.readouterr().out


def test_overlapping_kernels_are_counted_once():
    assert busy([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (6.0, 6.5)]) == 5.0
    assert busy([]) == 0.0
