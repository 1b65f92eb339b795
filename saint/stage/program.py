"""A stage as a program: its exit codes, its last words, its progress bars."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import xxhash
from tqdm import tqdm

from saint.stage.errors import (
    UserError,
    first_line,
    is_gpu_full,
    is_out_of_memory,
    is_rank_lost,
    log,
)
from saint.stage.terminal import TerminalFormatter, visible


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
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(TerminalFormatter("%(message)s"))
    # Chatty libraries (HTTP clients, font caches) stay quiet unless something is wrong.
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger().setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
        _leave_process_group()
    except (UserError, OSError, *expected) as error:
        say_once(" ".join(str(error).split()), rank)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if is_rank_lost(error):
            say_once("another rank has ended: its last line, not this one's, says why", rank)
            sys.exit(1)
        if not is_out_of_memory(error):
            raise
        whose = "GPU" if is_gpu_full(error) else "computer"
        remedy = when_full + when_gpu_full * is_gpu_full(error)
        say_once(f"the {whose}'s memory is full: {remedy}: {first_line(error)}", rank)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted: {after_interrupt}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def say_once(text: str, rank: int) -> None:
    """Print an error; under torchrun once per machine, however many ranks have it.

    It goes into torchrun's error file too, which torchrun shows as the failure's reason. A rank
    whose error another one has said waits for torchrun to end it, and so is no failure of its own.
    """
    text = visible(text)
    line, file = "error: " + text, os.environ.get("TORCHELASTIC_ERROR_FILE")
    if rank:
        line = f"error (rank {rank}): {text}"
    if file:
        if rank:
            time.sleep(1.0)  # rank 0 first
        said = Path(file).parent.parent / f"said-{xxhash.xxh3_64_hexdigest(text.encode())}"
        try:
            said.touch(exist_ok=False)
        except FileExistsError:
            time.sleep(30.0)
            return
        except OSError:
            pass
        about = {"timestamp": str(int(time.time())), "py_callstack": line}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": about}}))
    print(line, file=sys.stderr, flush=True)


def _leave_process_group() -> None:
    """Leave torchrun's group after success.

    After an error it is left to the operating system: with NCCL, destroying the group waits for
    what the other ranks still do in it, which may be for ever.
    """
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def log_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Log in one line the settings that differ from the parser's defaults, if any does.

    Paths are left out: who typed the command knows them, and the manifest holds all arguments.
    """
    changed = []
    for name, value in vars(args).items():
        is_path = isinstance(value, Path) or name.endswith(("_dir", "_path", "_filepath"))
        if not is_path and value != parser.get_default(name):
            words = value if isinstance(value, list | tuple) else [value]
            changed.append(" ".join([name, *(str(word) for word in words if word is not True)]))
    if changed:
        log.info("settings: %s, else the defaults", ", ".join(changed))


_FIRST_LINE_SECONDS, _LINE_SECONDS = 20.0, 180.0


_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}{postfix}, {elapsed} gone, {remaining} left"


class _Lines(tqdm):
    """A bar for a log file: a plain line after 20 s, then every few minutes; none before."""

    def __init__(self, **kwargs: Any) -> None:
        self._next_line = time.monotonic() + _FIRST_LINE_SECONDS
        # Every update looks at the clock. What tqdm itself writes (carriage returns) goes nowhere.
        timing = {"mininterval": _FIRST_LINE_SECONDS, "maxinterval": _LINE_SECONDS, "miniters": 1}
        super().__init__(file=io.StringIO(), bar_format=_LINE, leave=False, **timing, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Log a line, if it is time for one; closing the bar (msg is "") shows nothing."""
        now = time.monotonic()
        if msg is None and now >= self._next_line:
            self._next_line = now + _LINE_SECONDS
            log.info("%s", str(self))  # as it is now


def progress(total: int | None, *, unit: str, description: str, **kwargs: Any) -> tqdm:
    """Return a tqdm bar, only on rank 0; where stderr is no terminal, lines now and then."""
    quiet = int(os.environ.get("RANK", "0")) != 0
    options = {"total": total, "unit": unit, "desc": description, "disable": quiet, **kwargs}
    return tqdm(dynamic_ncols=True, **options) if sys.stderr.isatty() else _Lines(**options)
