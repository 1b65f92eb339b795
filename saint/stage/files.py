"""Atomic writes, and a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saint.stage.errors import UserError

MOST_JSON_BYTES = 64 << 20


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`.

    On an exception the temporary file is removed and `path` keeps its old content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner reads
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_torn(directory: Path, name: str = "") -> None:
    """Remove what killed processes of this machine left there of files named `name`… [any name].

    For programs without a manifest; `Output.begin` does it for the others.
    """
    for path in directory.glob(".*.tmp"):
        found = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", path.name)
        if found and found[1].startswith(name) and not _is_running(int(found[2])):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    with suppress(ProcessLookupError, OverflowError):
        with suppress(PermissionError):
            os.kill(process, 0)
        return True
    return False


def require_space(directory: Path, n_bytes: int, remedy: str) -> None:
    """Raise UserError when the disk under an existing directory cannot hold n_bytes more."""
    free = shutil.disk_usage(directory).free
    if n_bytes > free:
        raise UserError(
            f"{directory} needs about {n_bytes / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free: "
            f"{remedy}, then run the same command"
        )


def try_directory(directory: Path) -> None:
    """Make a directory and a file in it, removed again. Raises OSError where that cannot be.

    The file has one name, so that what a killed run left goes with the next.
    """
    directory.mkdir(parents=True, exist_ok=True)
    trial = directory / ".trial.tmp"
    try:
        trial.touch()
    finally:
        trial.unlink(missing_ok=True)


@contextmanager
def naming_full_disk(directory: Path) -> Iterator[None]:
    """Turn the errors of a full disk, quota or file size limit into one UserError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"no space left for {directory} ({error.strerror}): make room, then run the same "
            "command; what is finished is kept"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_file(path: Path) -> None:
    """Wait until what was written to a file, by whoever, is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Wait until a directory's entries are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_torch(path: Path, value: Any) -> None:
    """Write with `torch.save`, atomically; equal values give equal bytes.

    Raises OSError where the disk does: torch covers it with a RuntimeError when closing its file.
    """
    import torch

    # Given a path, torch.save would write that (temporary) name into the file.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError when it is too large for one of ours, or damaged."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise UserError(f"{path} is larger than {MOST_JSON_BYTES >> 20} MB: damaged")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not readable JSON: the file is damaged") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in their given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
