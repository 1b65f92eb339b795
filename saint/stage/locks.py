"""One run at a time on one output: a lock that the system drops with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import weakref
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from saint.stage.errors import UserError, log

# What file systems without locks answer (some network mounts).
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_held: weakref.WeakValueDictionary[Path, RunLock] = weakref.WeakValueDictionary()


class RunLock:
    """A lock on what a run writes, held until `release`, or until nobody refers to it."""

    def __init__(self, path: Path, descriptor: int):
        self.release = weakref.finalize(self, _release, path, descriptor, os.getpid())


def hold(path: Path) -> RunLock | None:
    """Lock the file `path`, which appears for the time; None where the file system has no locks.

    A process that holds it already gets the same lock. A read-only directory is not locked: no run
    can write there. Raises UserError naming the process and host that hold it.
    """
    path = path.absolute()
    if (mine := _held.get(path)) is not None and mine.release.alive:
        return mine
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return None
        if error.errno not in _NO_LOCKS:
            raise
        log.warning(
            "warning: %s is on a file system without locks: make sure that no other run writes "
            "there",
            path.parent,
        )
        path.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # a full disk: the lock holds without its words
        os.ftruncate(descriptor, 0)
        since = datetime.now().strftime("%Y-%m-%d %H:%M")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        os.write(descriptor, holder.encode())
    _held[path] = lock = RunLock(path, descriptor)
    return lock


def _lock(path: Path) -> int:
    """Return the locked descriptor of the file that lies at `path` now."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # its holder removed it while we opened it
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(
                f"{path.parent} is being written to by another run ({holder}): wait for its end, "
                "or stop it"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:  # a child that was forked with it
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)
    os.close(descriptor)
