"""Which errors mean that a memory is full, and whose."""

from __future__ import annotations

import pytest

from saint.stage.errors import UserError, is_gpu_full, is_out_of_memory
from saint.stage.workers import start_workers

GPU = (
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "NCCL error in: x.cpp, unhandled cuda error, ncclUnhandledCudaError: Call to CUDA function "
    "failed. Last error: Cuda failure 2 'out of memory'",
)
COMPUTER = (
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    "unable to mmap 8 bytes: Cannot allocate memory (12)",
    "cudaHostAlloc failed",
)


@pytest.mark.parametrize("text", GPU)
def test_a_full_gpu_is_told_by_its_libraries_words(text):
    assert is_out_of_memory(RuntimeError(text)) and is_gpu_full(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))


@pytest.mark.parametrize("text", COMPUTER)
def test_the_computers_memory_is_another(text):
    assert is_out_of_memory(RuntimeError(text)) and not is_gpu_full(RuntimeError(text))


def test_other_errors_of_cuda_keep_their_traceback():
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(RuntimeError("NCCL error: ncclUnhandledCudaError: peer access"))


def test_ranks_do_not_share_a_gpu_that_was_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:0 would put all 2 processes on one GPU"):
        start_workers("cuda:0")
