"""Manifests: what a stage wrote, from what, and with which arguments.

A stage's output is complete when its manifest is there, and only then. While a stage works, a
`.partial.json` record holds the same arguments, so that a later run knows whether it may resume.
"""

from __future__ import annotations

import enum
import glob
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from saint.stage.errors import UserError, log
from saint.stage.files import write_json
from saint.stage.locks import RunLock, hold
from saint.stage.record_schema import check_manifest, read_record

FORMAT = "saint.manifest"
VERSION = 1
_CHUNK_BYTES = 1 << 22


class State(enum.Enum):
    """What `Output.begin` found: nothing, an interrupted run, or a finished one."""

    NEW = "new"
    RESUME = "resume"
    DONE = "done"


@dataclass(frozen=True)
class Manifest:
    """A finished output.

    arguments: what shapes the bytes. settings: what does not (device, processes); kept for the
    record. sources: fingerprints of the inputs. facts: what later stages learn from this one.
    files: name -> {"bytes", "xxh3"}.
    """

    stage: str
    arguments: dict[str, Any]
    sources: dict[str, str]
    facts: dict[str, Any]
    counts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of everything but `settings`: equal for equal bytes made in the same way."""
        parts = {k: v for k, v in asdict(self).items() if k != "settings"}
        return fingerprint(parts)


def fingerprint(value: Any) -> str:
    """Return a 128-bit hash of a JSON-like value, independent of key order."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def file_checksum(path: Path) -> dict[str, Any]:
    """Return {"bytes", "xxh3"} of a file, read in chunks."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def verify_size(path: Path, expected: Mapping[str, Any]) -> None:
    """Raise UserError when a file is missing or has another size than in its manifest."""
    if not path.exists():
        raise UserError(f"{path} is listed in its manifest but missing")
    if path.stat().st_size != expected["bytes"]:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, its manifest says {expected['bytes']}"
        )


def verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Raise UserError when a file is missing, shortened or changed since its manifest."""
    verify_size(path, expected)
    if file_checksum(path)["xxh3"] != expected["xxh3"]:
        raise UserError(f"{path} is corrupt: its checksum differs from the manifest's")


def read_manifest(output: Path, stage: str) -> Manifest:
    """Read the manifest of a stage's output (a directory or a single file).

    Raises UserError when the output is missing, incomplete, or of a version this code cannot read.
    """
    path = manifest_path(output, stage)
    if not path.exists():
        state = "is incomplete" if output.exists() else "does not exist"
        raise UserError(f"{output} {state} (no {path.name}): run {stage}.py first, to its end")
    return load_manifest(path)


def load_manifest(path: Path) -> Manifest:
    """Read a manifest file. Raises UserError when it is damaged or of another version."""
    raw = read_record(path)
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise UserError(
            f"{path}: format {raw.get('format')} {raw.get('version')} is not known here"
        )
    check_manifest(raw, path)
    names = Manifest.__dataclass_fields__
    return Manifest(**{name: raw[name] for name in names})


def manifest_path(output: Path, stage: str, *, single_file: bool | None = None) -> Path:
    """Return where a manifest lies: in the directory, or beside a single file.

    single_file: which of the two; None, for readers, asks the disk.
    """
    if output.is_file() if single_file is None else single_file:
        return output.with_name(output.name + ".manifest.json")
    return output / f"{stage}.manifest.json"


def recorded_arguments(output: Path, stage: str, *, single_file: bool) -> dict[str, Any]:
    """Return the arguments that a run on an output recorded, ended or not; {} where there is none.

    Raises UserError when the record is damaged.
    """
    path = manifest_path(output, stage, single_file=single_file)
    for candidate in (path, _partial_path(path)):
        if candidate.exists():
            return read_record(candidate)["arguments"]
    return {}


def recorded_numbers(output: Path, stage: str) -> dict[str, int]:
    """Return the whole numbers above 0 among `recorded_arguments` of a directory.

    An automatic value that was resolved then holds for a later run too.
    """
    recorded = recorded_arguments(output, stage, single_file=False)
    return {name: value for name, value in recorded.items() if type(value) is int and value > 0}


def announced(path: Path, stage: str) -> Any:
    """Return what a run that did not finish had announced of a file, None where nothing is."""
    partial = _partial_path(manifest_path(path, stage, single_file=True))
    if not partial.exists():
        return None
    files = read_record(partial).get("files")
    return files.get(path.name) if isinstance(files, dict) else None


def lock_path(manifest: Path) -> Path:
    """Return the file that is locked while a run writes what will have this manifest."""
    return manifest.with_name("." + manifest.name.removesuffix(".manifest.json") + ".lock")


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".manifest.json") + ".partial.json")


@dataclass
class Output:
    """What one stage run makes: a directory or a single file.

    single_file: which of the two; the stage says it.
    own_names, own_patterns: the files that belong to this stage; only those are ever removed. Names
    are taken as they stand; patterns are globs, into which nothing that a person chose may go
    unless through `glob.escape`. By default a single file's own name.
    extendable: arguments that a later run may raise, keeping what is there.
    """

    path: Path
    stage: str
    arguments: dict[str, Any]
    sources: dict[str, str]
    single_file: bool
    own_names: tuple[str, ...] = ()
    own_patterns: tuple[str, ...] = ()
    extendable: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    _lock: RunLock | None = field(default=None, init=False, repr=False)
    _began: float = field(default_factory=time.monotonic, init=False, repr=False)
    _seconds_before: float = field(default=0.0, init=False, repr=False)

    @property
    def manifest_path(self) -> Path:
        """Where the manifest lies once the stage has finished."""
        return manifest_path(self.path, self.stage, single_file=self.single_file)

    @property
    def identity(self) -> str:
        """Eight characters that differ for other arguments or inputs."""
        return fingerprint({"arguments": self.arguments, "sources": self.sources})[:8]

    @property
    def partial_path(self) -> Path:
        """Where the record of an unfinished run lies."""
        return _partial_path(self.manifest_path)

    def begin(self, *, overwrite: bool) -> State:
        """Compare with what is on disk, and record that a run has begun.

        From here to `finish` no other process can begin a run on this output. Raises UserError
        when one has, when an earlier run had other arguments or inputs, naming the difference,
        when files of these names are there that no run of this stage recorded, or where a
        directory is in a file's place or the reverse.
        """
        if self.single_file and self.path.is_dir():
            raise UserError(f"{self.path} is a directory: name the file that is to be written")
        if not self.single_file and self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: name the directory that is to be written")
        self._lock = hold(lock_path(self.manifest_path))
        self._began = time.monotonic()
        state = self._begin(overwrite)
        if state is State.DONE:
            self._unlock()
        return state

    def _begin(self, overwrite: bool) -> State:
        if overwrite:
            self.discard()
        for path in (self.manifest_path, self.partial_path):
            if path.exists():
                return self._continue(path)
        strangers = self._own_files()
        if strangers:
            raise UserError(
                f"{strangers[0]} exists but no {self.stage} run recorded it: "
                "choose another output, or --overwrite to replace it"
            )
        self._record()
        return State.NEW

    def _continue(self, path: Path) -> State:
        earlier = read_record(path)
        if path == self.manifest_path:
            check_manifest(earlier, path)
        extended = self._compare(earlier)
        if path == self.manifest_path and not extended:
            missing = [n for n in earlier["files"] if not (self._base / n).exists()]
            if not missing:
                self.partial_path.unlink(missing_ok=True)
                return State.DONE
            log.info("%s is missing from %s: making it again", missing[0], self.path)
            self.manifest_path.unlink()
        seconds = earlier.get("seconds")
        self._seconds_before = seconds if isinstance(seconds, int | float) else 0.0
        if path == self.partial_path:
            self._seconds_before += self._seconds_of_killed_run()
        self._record()
        return State.RESUME

    def _seconds_of_killed_run(self) -> float:
        """How long a run that never finished was at work: until it last wrote a file."""
        began = self.partial_path.stat().st_mtime
        return max([0.0, *(path.stat().st_mtime - began for path in self._own_files())])

    def _compare(self, earlier: Mapping[str, Any]) -> bool:
        """Return whether an extendable argument grew; raise on any other difference."""
        extended = False
        for kind, mine in (("arguments", self.arguments), ("sources", self.sources)):
            theirs = earlier[kind]
            for name in sorted({*mine, *theirs}):
                old, new = theirs.get(name), json.loads(json.dumps(mine.get(name), default=str))
                if old == new:
                    continue
                if name in self.extendable and isinstance(old, int) and new > old:
                    extended = True
                    continue
                what = f"--{name}" if kind == "arguments" else f"the {name}"
                raise UserError(
                    f"{self.path} was made with {what} {old}, this run has {new}: "
                    "use the same, another output, or --overwrite to start over"
                )
        return extended

    def _record(self) -> None:
        self._base.mkdir(parents=True, exist_ok=True)
        self._remove_torn_files()
        record = {"arguments": self.arguments, "sources": self.sources}
        write_json(self.partial_path, record | {"seconds": round(self._seconds_before, 1)})

    def _remove_torn_files(self) -> None:
        """Remove what a killed run was writing: `atomic_path`'s temporary files."""
        for own in (*self._patterns, *map(glob.escape, self._records)):
            directory, name = os.path.split(own)
            for torn in self._base.glob(os.path.join(directory, f".{name}.*.tmp")):
                torn.unlink()
        for path in self._own_files():
            for torn in path.glob(".*.tmp") if path.is_dir() else ():
                torn.unlink()

    @property
    def _records(self) -> tuple[str, str]:
        return self.manifest_path.name, self.partial_path.name

    @property
    def _patterns(self) -> tuple[str, ...]:
        names = self.own_names
        if self.single_file and not (names or self.own_patterns):
            names = (self.path.name,)
        return (*map(glob.escape, names), *self.own_patterns)

    @property
    def _base(self) -> Path:
        return self.manifest_path.parent

    def _own_files(self) -> list[Path]:
        return sorted(path for own in self._patterns for path in self._base.glob(own))

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def take_back(self) -> None:
        """Remove the record of a run that stopped before it had made anything."""
        self.partial_path.unlink(missing_ok=True)
        self._unlock()
        if self._base == self.path and not any(self.path.iterdir()):
            self.path.rmdir()

    def discard(self) -> None:
        """Remove the manifest first, then this stage's own files: never anybody else's."""
        self.manifest_path.unlink(missing_ok=True)
        self.partial_path.unlink(missing_ok=True)
        for path in self._own_files():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def announce(self, files: Mapping[str, dict[str, Any]]) -> None:
        """Record checksums of files that are about to get their names, until `finish`.

        For stages that a person's edits of their output must not be lost to: a file that differs
        from its manifest is a killed run's, where it is `announced`, and else a person's.
        """
        record = {"arguments": self.arguments, "sources": self.sources}
        write_json(self.partial_path, record | {"files": dict(files)})

    def finish(
        self,
        *,
        facts: dict[str, Any],
        counts: dict[str, Any],
        files: Iterable[str],
        known: Mapping[str, dict[str, Any]] | None = None,
    ) -> Manifest:
        """Write the manifest, last of all.

        files: names below the output's directory. known: checksums that the writer already has.
        """
        known = known or {}
        checksums = {name: known.get(name) or file_checksum(self._base / name) for name in files}
        manifest = Manifest(
            stage=self.stage,
            arguments=self.arguments,
            sources=self.sources,
            facts=facts,
            counts=counts,
            files=dict(sorted(checksums.items())),
            settings=self.settings,
        )
        record = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
        record |= {"fingerprint": manifest.fingerprint}
        record |= {"finished": datetime.now(UTC).isoformat(timespec="seconds")}
        seconds = self._seconds_before + time.monotonic() - self._began
        write_json(self.manifest_path, record | {"seconds": round(seconds, 1)})
        self.partial_path.unlink(missing_ok=True)
        self._unlock()
        return manifest


def model_fingerprint(model_dir: Path) -> str:
    """Identify a language model by its configuration, tokenizer and sampled weight bytes.

    Reads at most 3 MB of each weight file, so it takes no time at any size.
    Raises UserError when the directory does not exist.
    """
    if not model_dir.is_dir():
        raise UserError(f"--model_dir {model_dir} is not a directory")
    parts: list[Any] = []
    for path in sorted(model_dir.iterdir()):
        if path.suffix in {".json", ".model"}:
            parts.append([path.name, file_checksum(path)["xxh3"]])
        elif path.suffix in {".pth", ".safetensors"}:
            parts.append([path.name, path.stat().st_size, _sampled_checksum(path)])
    return fingerprint(parts)


def _sampled_checksum(path: Path, sample_bytes: int = 1 << 20) -> str:
    digest, size = xxhash.xxh3_64(), path.stat().st_size
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - sample_bytes)):
            file.seek(start)
            digest.update(file.read(sample_bytes))
    return digest.hexdigest()
