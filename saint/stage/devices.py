"""Devices, precisions and free memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from saint.stage.errors import UserError

if TYPE_CHECKING:
    import torch


def pick_device(device: str, *, local_rank: int = 0) -> torch.device:
    """Resolve a `--device` flag ("auto", "cpu", "cuda", "cuda:N") to a torch device."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: not a device (auto, cpu, cuda, cuda:N)") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: this machine has no CUDA GPU that torch can use")
        index = chosen.index if chosen.index is not None else local_rank
        if index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: there are {torch.cuda.device_count()} GPUs")
        chosen = torch.device("cuda", index)
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Resolve a `--dtype` flag; "auto" is bfloat16 where hardware multiplies it."""
    import torch

    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            dtype
        ]
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32


def available_bytes(device: torch.device) -> int:
    """Return what memory is free now: the GPU's, or the system's without swapping."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_gigabytes(device: torch.device) -> float:
    """Return the most memory that this process has held: the GPU's, or its own on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def peak_memory(device: torch.device) -> str:
    """Say `peak_gigabytes`."""
    whose = "GPU memory" if device.type == "cuda" else "memory"
    return f"{peak_gigabytes(device):.1f} GB of {whose} at most"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions (AVX512-BF16 or AMX); others emulate them."""
    import torch

    named = "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    return named and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
