"""Errors of the person at the keyboard and of full memory; the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


log = logging.getLogger("saint")


# What torch says when it cannot allocate for a tensor on the CPU, and the system for a mapped file.
_FULL = ("DefaultCPUAllocator: ", "Cannot allocate memory")


class UserError(ValueError):
    """Something the person at the keyboard can mend; shown as one line, without a traceback."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU or of the computer is full.

    Told by name, since torch may not be imported, and by words: torch has no class for the
    computer's memory.
    """
    return (
        isinstance(error, MemoryError)
        or _is_gpu_full(error)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL))
    )


def _is_gpu_full(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
