"""Stages that are killed, or whose disk is full: nothing torn is left, the end is the same."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

import capture_top_activating_sentences
from saint.stage.errors import UserError
from saint.store.__main__ import find_problems
from saint.store.activation_store import open_store, shard_name
from tests.support.kills import kill_and_resume
from tests.support.pipeline import (
    OVER_DISK,
    capture,
    capture_args,
    outputs,
    preprocess,
    preprocess_args,
    rows_of,
    top_args,
    top_sentences,
    train_args,
    tree_bytes,
)
from tests.support.program import call


def test_capture_killed_at_random_moments_ends_with_the_same_bytes(root, tmp_path):
    arguments = capture_args(root, tmp_path / "acts")
    kill_and_resume("capture_activations", arguments, tmp_path, 1, 100, "acts")
    assert tree_bytes(tmp_path / "acts") == tree_bytes(root / "acts")
    assert find_problems(tmp_path / "acts") == []


def test_training_killed_at_random_moments_ends_with_the_same_bytes(root, tmp_path):
    flags = {"data_dir": root / "acts_batched", "b_pre_path": root / "acts_mean.pt"}
    flags |= {"checkpoint_minutes": 1e-6, "num_epochs": 2, "dead_tokens": 128}
    # So high a rate that the best SAE is an early one.
    flags |= {"learning_rate": 2, "lr_floor": 1, "warmup_fraction": 1, "decay_fraction": 0}
    runs = [train_args(root, tmp_path / name / "sae.pt", **flags) for name in ("whole", "killed")]
    assert call("sae_training", *runs[0]).returncode == 0
    kill_and_resume("sae_training", runs[1], tmp_path, 2, 60, "killed")
    whole, killed = (tree_bytes(tmp_path / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and len(whole) == 5
    logs = []
    for files in (whole, killed):
        del files["sae.training.html"]
        lines = files.pop("sae.metrics.jsonl").splitlines()
        logs.append([json.loads(line) | {"tokens_per_s": None} for line in lines])
    assert killed == whole and logs[0] == logs[1]
    assert max(e["train/aux_loss"] for e in logs[0]) > 0
    losses = [e["val/loss"] for e in logs[0] if "val/loss" in e]
    assert losses.index(min(losses)) < len(losses) // 2


def test_the_shuffle_killed_at_random_moments_ends_with_the_same_bytes(root, tmp_path):
    arguments = preprocess_args(root, **outputs(tmp_path), **OVER_DISK)
    kill_and_resume("sae_preprocessing", arguments, tmp_path, 0, 60, "rows")
    assert tree_bytes(tmp_path / "rows") == tree_bytes(root / "acts_batched")
    assert (tmp_path / "mean.pt").read_bytes() == (root / "acts_mean.pt").read_bytes()


def test_in_place_survives_kills_and_top_sentences_still_works(root, tmp_path):
    store_dir = tmp_path / "acts"
    shutil.copytree(root / "acts", store_dir)
    before = rows_of(open_store(store_dir))
    arguments = [*preprocess_args(root, input_dir=store_dir, **outputs(tmp_path)), "--in_place"]
    died = call("sae_preprocessing", *arguments, die_at=90)
    assert died.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="finish sae_preprocessing.py --in_place"):
        open_store(store_dir)
    (store_dir / "layer_2" / f".{shard_name(1)}.1.tmp").write_bytes(b"half a shard")
    (problem,) = find_problems(store_dir)
    assert "layer_2 is being preprocessed in place: finish sae_preprocessing.py" in problem
    assert "the same command resumes" in problem
    foreign = store_dir / "layer_2" / shard_name(88)
    foreign.write_bytes(b"?")
    assert f"{foreign} is foreign" in find_problems(store_dir)[1]
    foreign.unlink()
    kill_and_resume("sae_preprocessing", arguments, tmp_path, 3, 60)
    plain = tree_bytes(root / "acts_batched")
    moved = tree_bytes(tmp_path / "rows")
    assert {name: moved[name] for name in plain} == plain
    store = open_store(store_dir)
    assert torch.equal(rows_of(store), before)
    assert (
        store.shard_path(0).stat().st_size
        < 0.4 * open_store(root / "acts").shard_path(0).stat().st_size
    )
    assert find_problems(store_dir) == []
    assert top_sentences(tmp_path, store_dir, tmp_path / "a") == top_sentences(
        tmp_path, root / "acts", tmp_path / "b"
    )
    assert "done already" in call("sae_preprocessing", *arguments).last_line
    held = (tmp_path / "mean.pt").read_bytes()
    for lost in (tmp_path / "mean.pt", tmp_path / "rows" / "train_00000.safetensors"):
        content = lost.read_bytes()
        lost.unlink()
        refused = call("sae_preprocessing", *arguments)
        assert refused.returncode == 1 and f"{lost.name} is missing" in refused.last_line
        lost.write_bytes(content)
    assert (tmp_path / "mean.pt").read_bytes() == held
    assert torch.equal(rows_of(open_store(store_dir)), before)


def test_training_on_a_full_disk_stops_cleanly_and_resumes(root, tmp_path):
    """The limit bites in the page of curves, in a checkpoint's body, and in its end."""
    whole, save = tmp_path / "whole.pt", tmp_path / "sae.pt"
    flags = {"data_dir": root / "acts_batched", "b_pre_path": root / "acts_mean.pt"}
    runs = [train_args(root, path, **flags) for path in (whole, save)]
    arguments = [*runs[1], "--checkpoint_minutes", 1e-6]
    assert call("sae_training", *runs[0]).returncode == 0
    (checkpoint,) = (tmp_path / "sae_checkpoints").glob("whole.step_*")
    size = checkpoint.stat().st_size
    for limit in (4000, size // 2, size - 1):
        stopped = call("sae_training", *arguments, file_bytes=limit)
        assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
        assert f"no space left for {tmp_path} (File too large): make" in stopped.last_line
        assert not list(tmp_path.rglob(".sae.*.tmp")) and not save.exists()
    finished = call("sae_training", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert save.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("stage", ["capture_activations", "sae_preprocessing"])
def test_a_full_disk_stops_cleanly_and_the_run_resumes(root, tmp_path, stage):
    if stage == "capture_activations":
        out, whole = tmp_path / "acts", root / "acts"
        arguments = capture_args(root, out)
        sizes = [p.stat().st_size for p in sorted(whole.glob("layer_2/*"))]
        assert sizes[0] < max(sizes)
    else:
        out, whole = tmp_path / "rows", root / "acts_batched"
        arguments = preprocess_args(root, **outputs(tmp_path))
        sizes = [p.stat().st_size for p in whole.glob("train_*")]
    stopped = call(stage, *arguments, file_bytes=max(sizes) - 1)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert "no space left for" in stopped.last_line and "run the same command" in stopped.last_line
    assert not list(out.rglob("*.tmp")) and not list(out.glob("*.manifest.json"))
    kept = {p: p.stat().st_mtime_ns for p in out.glob("layer_2/*")}
    assert kept or stage != "capture_activations"
    finished = call(stage, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert tree_bytes(out) == tree_bytes(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_full_disk_stops_top_sentences_cleanly_and_they_resume(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(capture_top_activating_sentences.shutil, "rmtree", lambda _: None)
        top_sentences(tmp_path, root / "acts", tmp_path / "kept")
    wanted = {n: d for n, d in tree_bytes(tmp_path / "kept").items() if "work" not in n}
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "kept").rglob("*")}
    sparse = max(size for name, size in sizes.items() if name.startswith("sparse"))
    limits = {"sparse": sparse - 1, "evidence": sizes["evidence.parquet"] - 1}
    assert limits["sparse"] < limits["evidence"], "the first limit is hit first"
    stage, arguments = (
        "capture_top_activating_sentences",
        top_args(tmp_path, root / "acts", tmp_path / "top"),
    )
    for limit in limits.values():
        stopped = call(stage, *arguments, file_bytes=limit)
        assert stopped.returncode == 1 and "Traceback" not in stopped.stderr, stopped.stderr
        assert f"no space left for {tmp_path / 'top'}" in stopped.last_line
        assert "run the same command" in stopped.last_line
        assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.glob("top/*.manifest.json"))
    finished = call(stage, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert tree_bytes(tmp_path / "top") == wanted


def test_too_little_space_is_said_before_the_work(root, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GB more, 0.0 GB are free: make room"):
        capture(root, tmp_path / "acts")
    assert not list(tmp_path.glob("acts/layer_2/*"))
    with pytest.raises(UserError, match="make room"):
        preprocess(root, **outputs(tmp_path))
    with pytest.raises(UserError, match="make room"):
        top_sentences(tmp_path, root / "acts", tmp_path / "top")


def resume(stage: str, arguments: list[object], output: Path) -> str:
    """The summary of a run that finds all data and only the record of a begun run."""
    (output / f"{stage}.manifest.json").rename(output / f"{stage}.partial.json")
    finished = call(stage, *arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.last_line


def test_summaries_tell_only_of_what_this_run_did(root, tmp_path, monkeypatch, caplog):
    shutil.copytree(root / "acts", tmp_path / "acts")
    line = resume("capture_activations", capture_args(root, tmp_path / "acts"), tmp_path / "acts")
    assert "an earlier run captured all of them" in line
    assert "tokens/s" not in line and "BOS" not in line
    caplog.set_level("INFO", logger="saint")
    with monkeypatch.context() as patch:
        patch.setattr(capture_top_activating_sentences.shutil, "rmtree", lambda _: None)
        top_sentences(tmp_path, root / "acts", tmp_path / "top")
    assert " sentences/s encoded and ranked" in caplog.messages[-1]
    line = resume(
        "capture_top_activating_sentences",
        top_args(tmp_path, root / "acts", tmp_path / "top"),
        tmp_path / "top",
    )
    assert "an earlier run encoded all of them" in line and "sentences/s" not in line
