"""Errors, logging, devices, torchrun workers and atomic writes, shared by every stage."""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

if TYPE_CHECKING:
    import torch

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


def run_stage(
    main: Callable[[], None],
    *,
    expected: tuple[type[BaseException], ...] = (),
    after_interrupt: str = "the same command resumes",
    when_full: str = "lower --micro_batch_size (training) or --batch_tokens (capture, evaluation)",
    when_gpu_full: str = "",
) -> NoReturn:
    """Run a stage's `main` as a program: expected errors become one line and exit code 1.

    expected: error classes of libraries that the stage calls, beside `UserError` and `OSError`
    (missing files, full disk). Anything else keeps its traceback: it is a bug. Ctrl-C and SIGTERM
    exit with 130 and 143. after_interrupt: what is so after Ctrl-C; most stages resume from what is
    on disk. when_full: what to do when memory does not suffice; when_gpu_full is appended to it
    when that is the GPU's.
    """
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(message)s",
    )
    # Chatty libraries (HTTP clients, font caches) stay quiet unless something is wrong.
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger().setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except (UserError, OSError, *expected) as error:
        prefix = f"error (rank {rank}): " if rank else "error: "
        print(prefix + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        whose = "GPU" if _is_gpu_full(error) else "computer"
        remedy = when_full + when_gpu_full * _is_gpu_full(error)
        print(
            f"error: the {whose}'s memory is full: {remedy}: {first_line(error)}", file=sys.stderr
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted: {after_interrupt}", file=sys.stderr)
        sys.exit(130)
    finally:
        _leave_process_group()
    sys.exit(0)


def _leave_process_group() -> None:
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def log_arguments(args: argparse.Namespace) -> None:
    """Log all arguments once, as one JSON line."""
    log.info("arguments %s", json.dumps(vars(args), default=str, sort_keys=True))


_LINE_SECONDS = 180.0
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}{postfix}, {elapsed} gone, {remaining} left"


class _Lines(tqdm):
    """A bar for a log file: one plain line every few minutes, and none for short work."""

    def __init__(self, **kwargs: Any) -> None:
        self._last_line = time.monotonic()
        # Every update looks at the clock. What tqdm itself writes (carriage returns) goes nowhere.
        timing = {"mininterval": _LINE_SECONDS, "maxinterval": _LINE_SECONDS, "miniters": 1}
        super().__init__(file=io.StringIO(), bar_format=_LINE, leave=False, **timing, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Log a line, if the last one is long ago; closing the bar (msg is "") shows nothing."""
        now = time.monotonic()
        if msg is None and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            log.info("%s", str(self))  # as it is now


def progress(total: int | None, *, unit: str, description: str, **kwargs: Any) -> tqdm:
    """Return a tqdm bar, only on rank 0; where stderr is no terminal, a line every few minutes."""
    quiet = int(os.environ.get("RANK", "0")) != 0
    options = {"total": total, "unit": unit, "desc": description, "disable": quiet, **kwargs}
    return tqdm(dynamic_ncols=True, **options) if sys.stderr.isatty() else _Lines(**options)


@dataclass(frozen=True)
class Workers:
    """The process's place among torchrun's (one process without torchrun) and its device.

    model_parallel_size: consecutive ranks that share one language model's weights and see the same
    data; only the first of them writes.
    """

    rank: int
    world_size: int
    device: torch.device
    model_parallel_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes shared files and talks."""
        return self.rank == 0

    @property
    def is_writer(self) -> bool:
        """Whether this is the first rank of its tensor-parallel group: the others only compute."""
        return self.rank % self.model_parallel_size == 0

    def label(self, description: str) -> str:
        """Return a bar's description that says whose work it shows, where ranks share the work."""
        n_groups = self.world_size // self.model_parallel_size
        return description if n_groups == 1 else f"{description} (rank 0's 1/{n_groups})"

    def owns(self, index: int) -> bool:
        """Whether piece `index` of the data is this rank's (tensor-parallel group's) to do."""
        n_groups = self.world_size // self.model_parallel_size
        return index % n_groups == self.rank // self.model_parallel_size

    def barrier(self) -> None:
        """Wait for all ranks; does nothing for a single process."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable `value` on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 and return its result on every rank.

        An expected error on rank 0 is raised on all ranks, so that none waits for ever.
        """
        outcome: tuple[bool, Any] = (True, None)
        if self.is_main:
            try:
                outcome = (True, action())
            except (UserError, OSError) as error:
                outcome = (False, str(error))
        succeeded, value = self.broadcast(outcome)
        if not succeeded:
            raise UserError(value)
        return value


# Ranks wait while one verifies or writes what may be terabytes.
_PATIENCE = timedelta(hours=2)


def start_workers(
    device: str, *, model_parallel_size: int = 1, data_parallel: bool = True
) -> Workers:
    """Join torchrun's process group where there is one, and choose this process's device.

    device: "auto" (CUDA when there is a GPU, else CPU), "cpu", "cuda" or "cuda:N".
    model_parallel_size: of fairscale's groups, over which `llama_3.load_llama` splits a model.
    data_parallel: whether several such groups can share the work.
    Raises UserError when CUDA is asked for and absent, or the processes do not make whole groups.
    """
    import torch
    import torch.distributed as dist

    rank, world_size = (
        int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if world_size % model_parallel_size:
        raise UserError(
            f"--model_parallel_size {model_parallel_size} does not divide the number of processes, "
            f"{world_size}: start with torchrun --nproc_per_node={model_parallel_size}"
        )
    if world_size > model_parallel_size and not data_parallel:
        raise UserError(
            f"this stage needs no more processes than --model_parallel_size {model_parallel_size}, "
            f"torchrun started {world_size}"
        )
    chosen = pick_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    if model_parallel_size > 1:
        from fairscale.nn.model_parallel.initialize import initialize_model_parallel

        with redirect_stdout(io.StringIO()):  # it prints; stdout belongs to the stage's results
            initialize_model_parallel(model_parallel_size)
    return Workers(rank, world_size, chosen, model_parallel_size)


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


def add_device_flags(parser: argparse.ArgumentParser, *, dtype: bool = False) -> None:
    """Add `--device` (and `--dtype`), which every computing stage has."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device",
        default="auto",
        help="auto (CUDA when there is a GPU), cpu, cuda or cuda:N [auto]",
    )
    if dtype:
        group.add_argument(
            "--dtype",
            default="auto",
            choices=["auto", "float32", "bfloat16", "float16"],
            help="the language model's precision; auto: bfloat16 where the hardware has it",
        )


def add_model_parallel_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--model_parallel_size`, for language models that one device cannot hold."""
    parser.add_argument(
        "--model_parallel_size",
        type=positive_int,
        default=1,
        metavar="N",
        help="split the language model over every N of torchrun's processes [1]",
    )


def add_overwrite_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite`, which starts a stage over."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start over, removing what this stage wrote before; without it a run resumes",
    )


def positive_int(text: str) -> int:
    """Argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def positive_float(text: str) -> float:
    """Argparse type: a finite number above 0."""
    value = float(text)
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{value} is not a finite number above 0")
    return value


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
        _fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_space(directory: Path, n_bytes: int, remedy: str) -> None:
    """Raise UserError when the disk under an existing directory cannot hold n_bytes more."""
    free = shutil.disk_usage(directory).free
    if n_bytes > free:
        raise UserError(
            f"{directory} needs about {n_bytes / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free: "
            f"{remedy}, then run the same command"
        )


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


def _fsync_directory(directory: Path) -> None:
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


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in their given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
