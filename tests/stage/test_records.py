"""Manifests and outputs: whatever is on disk is checked, locked, and never taken for a pattern."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saint.stage import locks
from saint.stage.errors import UserError
from saint.stage.manifests import Output, State, read_manifest, recorded_numbers
from saint.store.activation_store import open_stores
from saint.store.shuffled_rows import open_batched_rows
from tests.support.program import fork

NAMES = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=30
).filter(lambda name: name.strip(".") and len(name.encode()) < 100)


def output(path: Path, **options: Any) -> Output:
    options = {"arguments": {"n": 1}, "sources": {}, "single_file": True} | options
    return Output(path, "a_stage", **options)


@given(name=NAMES, other=NAMES)
@settings(max_examples=60, deadline=None)
def test_no_name_of_a_file_is_a_pattern(tmp_path_factory, name, other):
    """A run resumes, ends and starts over under any name, and leaves files of other names alone."""
    directory = tmp_path_factory.mktemp("names")
    path, stranger = directory / f"{name}.pt", directory / f"{other}.bin"
    stranger.write_text("mine")
    assert output(path).begin(overwrite=False) is State.NEW
    assert output(path).begin(overwrite=False) is State.RESUME
    path.write_text("made")
    run = output(path)
    run.begin(overwrite=False)
    run.finish(facts={}, counts={}, files=[path.name])
    assert output(path).begin(overwrite=False) is State.DONE
    assert output(path).begin(overwrite=True) is State.NEW
    assert not path.exists() and stranger.read_text() == "mine"


def test_a_file_and_a_directory_are_not_confused(tmp_path: Path):
    (tmp_path / "sae").mkdir()
    with pytest.raises(UserError, match="sae is a directory: name the file"):
        output(tmp_path / "sae").begin(overwrite=False)
    (tmp_path / "rows").write_text("")
    with pytest.raises(UserError, match="rows is a file: name the directory"):
        output(tmp_path / "rows", single_file=False).begin(overwrite=False)
    run = output(tmp_path / "no_suffix")
    run.begin(overwrite=False)
    run.path.write_text("made")
    run.finish(facts={}, counts={}, files=["no_suffix"])
    assert read_manifest(tmp_path / "no_suffix", "a_stage").files.keys() == {"no_suffix"}


def hold_and_wait(path: str) -> None:
    run = output(Path(path))  # the lock is held as long as the run is
    run.begin(overwrite=False)
    Path(path + ".held").touch()
    time.sleep(60)


def test_a_second_run_is_told_who_holds_the_output(tmp_path: Path):
    path = tmp_path / "sae.pt"
    process = fork(hold_and_wait, str(path))
    while not (tmp_path / "sae.pt.held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"another run \(process {process.pid} on .* since 20"):
        output(path).begin(overwrite=True)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    mine = output(path)
    assert mine.begin(overwrite=False) is State.RESUME
    path.write_text("made")
    mine.finish(facts={}, counts={}, files=["sae.pt"])
    assert not list(tmp_path.glob(".*"))


def test_without_locks_a_run_goes_on_with_a_warning(tmp_path: Path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with caplog.at_level("WARNING", logger="saint"):
        assert output(tmp_path / "a.pt").begin(overwrite=False) is State.NEW
    assert "file system without locks" in caplog.text
    assert fcntl.LOCK_EX and not list(tmp_path.glob(".*.lock"))


CAPTURED = {
    "format": "saint.manifest", "version": 1, "stage": "capture_activations",
    "arguments": {"num_samples": 3}, "sources": {"model": "a"}, "settings": {},
    "facts": {"d_model": 4, "layers": {"layer_1": {"layer": 1, "hook_point": "resid_pre"}}},
    "counts": {"n_shards": 1, "n_sentences": 3, "n_tokens": 9},
    "files": {"layer_1/shard_00000.safetensors": {"bytes": 10, "xxh3": "0123456789abcdef"}},
}  # fmt: skip
ROWS = CAPTURED | {
    "stage": "sae_preprocessing",
    "facts": {"d_model": 4, "layer": 1, "hook_point": "a", "rows": {"train": [9], "val": [0]}},
}
DAMAGES: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "facts are null": (("facts",), None, "facts: Input should be a valid dict"),
    "a string for a number": (("facts", "d_model"), "4", "facts.d_model: Input should be a valid"),
    "a missing count": (("counts",), {"n_shards": 1}, "counts.n_sentences: Field required"),
    "a layer outside": (
        ("facts", "layers"),
        {"../../x": {"layer": 1, "hook_point": "resid_pre"}},
        "no name of a layer's directory",
    ),
    "a file outside": (
        ("files",),
        {"../x": {"bytes": 1, "xxh3": "0123456789abcdef"}},
        "a path that leaves its directory",
    ),
    "an absolute file": (
        ("files",),
        {"/etc/passwd": {"bytes": 1, "xxh3": "0123456789abcdef"}},
        "a path that leaves its directory",
    ),
    "a negative size": (
        ("files", "layer_1/shard_00000.safetensors", "bytes"),
        -1,
        "greater than or equal to 0",
    ),
    "another version": (("version",), 99, "format saint.manifest 99 is not known"),
}


def write(directory: Path, record: Any) -> Path:
    stage = record["stage"] if isinstance(record, dict) else "capture_activations"
    path = directory / f"{stage}.manifest.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


@pytest.mark.parametrize("place, value, message", DAMAGES.values(), ids=DAMAGES)
def test_a_manifest_of_another_shape_is_one_line(tmp_path: Path, place, value, message):
    record: Any = copy.deepcopy(CAPTURED)
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    write(tmp_path, record)
    with pytest.raises(UserError, match=re.escape(message)):
        read_manifest(tmp_path, "capture_activations")


def test_what_is_no_manifest_at_all_is_one_line(tmp_path: Path):
    for text in ("[]", "7", "", "{", "\0", "[" * 100_000, '{"arguments": []}', "9" * 10_000):
        path = tmp_path / "capture_activations.manifest.json"
        path.write_text(text)
        for read in (
            lambda: read_manifest(tmp_path, "capture_activations"),
            lambda: recorded_numbers(tmp_path, "capture_activations"),
            lambda: Output(tmp_path, "capture_activations", {}, {}, single_file=False).begin(
                overwrite=False
            ),
        ):
            with pytest.raises(UserError, match="manifest.json"):
                read()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="larger than"):
        read_manifest(tmp_path, "capture_activations")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
def test_any_change_of_a_manifest_is_read_or_refused(tmp_path_factory, data):
    """One entry anywhere in it replaced by any JSON value, or left out."""
    record: Any = copy.deepcopy(data.draw(st.sampled_from([CAPTURED, ROWS])))
    stage, inner = record["stage"], record
    while True:
        key = data.draw(st.sampled_from(sorted(inner)))
        if not (isinstance(inner[key], dict) and inner[key] and data.draw(st.booleans())):
            break
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[key] = data.draw(JSON)
    else:
        del inner[key]
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / f"{stage}.manifest.json").write_text(json.dumps(record))
    for read in (
        lambda: [store.facts for store in open_stores(directory)],
        lambda: open_batched_rows(directory),
        lambda: output(directory, single_file=False).begin(overwrite=False),
        lambda: Output(
            directory, stage, {"num_samples": 4}, {}, single_file=False, extendable=("num_samples",)
        ).begin(overwrite=False),
    ):
        try:
            read()
        except UserError as error:
            assert len(str(error)) < 1500


def test_what_a_killed_run_left_of_its_records_is_removed(tmp_path):
    strangers = tmp_path / ".other.manifest.json.1.tmp"
    torn = [tmp_path / f".stage.{name}.json.1.tmp" for name in ("manifest", "partial")]
    for path in (strangers, *torn):
        path.write_text("{")
    Output(
        tmp_path, "stage", arguments={}, sources={}, single_file=False, own_names=("data",)
    ).begin(overwrite=False)
    assert not any(path.exists() for path in torn) and strangers.exists()


def test_a_manifest_holds_the_seconds_at_work_those_of_a_killed_run_included(tmp_path):
    def begun() -> Output:
        output = Output(tmp_path / "out.bin", "stage", {}, {}, single_file=True)
        output.begin(overwrite=False)
        return output

    first = begun()
    (tmp_path / "out.bin").write_bytes(b"half")
    os.utime(first.partial_path, (1000, 1000))
    os.utime(tmp_path / "out.bin", (1030, 1030))  # it wrote for half a minute, then it was killed
    first._unlock()
    begun().finish(facts={}, counts={}, files=["out.bin"])
    record = json.loads((tmp_path / "out.bin.manifest.json").read_text())
    assert 30 <= record["seconds"] < 60
