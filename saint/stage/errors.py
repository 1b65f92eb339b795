"""Errors of the person at the keyboard and of full memory; the log."""

from __future__ import annotations

import logging

log = logging.getLogger("saint")

# What torch says when it cannot allocate for a tensor on the CPU, and the system for a mapped file.
_COMPUTER_FULL = ("DefaultCPUAllocator: ", "Cannot allocate memory", "cudaHostAlloc")
# What CUDA's libraries say where torch's own allocator was not the one that found no memory.
_GPU_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
# What gloo and NCCL say where a process of the group has ended.
_RANK_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
_NCCL_FULL = ("ncclUnhandledCudaError", "out of memory")  # both, in one message


class UserError(ValueError):
    """Something the person at the keyboard can mend; shown as one line, without a traceback."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU or of the computer is full.

    Told by name, since torch may not be imported, and by words: torch has no class for the
    computer's memory, and CUDA's libraries report theirs as a RuntimeError.
    """
    words = any(words in str(error) for words in _COMPUTER_FULL)
    return isinstance(error, MemoryError) or is_gpu_full(error) or _is_runtime(error) and words


def is_gpu_full(error: BaseException) -> bool:
    """Whether it is a GPU's memory that is full."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    said = any(words in text for words in _GPU_FULL) or all(words in text for words in _NCCL_FULL)
    return _is_runtime(error) and said


def is_rank_lost(error: BaseException) -> bool:
    """Whether another process of the group has ended, which is then what is to be looked at."""
    return _is_runtime(error) and any(words in str(error) for words in _RANK_LOST)


def _is_runtime(error: BaseException) -> bool:
    return isinstance(error, RuntimeError)


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
