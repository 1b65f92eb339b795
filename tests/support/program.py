"""Run stages as programs, each in a process of its own, without paying for their imports each time.

A fork server imports the stages once (`stage_warmup`); what it forks behaves like
`python stage.py …`, can be killed, and leaves its output in files.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

REPO = Path(__file__).resolve().parents[2]


@dataclass
class Finished:
    returncode: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        return (self.stderr.strip().splitlines() or [""])[-1]


def fork(target: Callable[..., None], *args: object) -> BaseProcess:
    """Run `target`, a function of a module, in a process of its own."""
    # The server's own process inherits sys.path through the environment.
    os.environ["PYTHONPATH"] = str(REPO)
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["tests.support.stage_warmup"])
    process = forkserver.Process(target=target, args=args)
    # Without this every child would import the program that called us: pytest.
    with mock.patch.dict(sys.modules, {"__main__": ModuleType("__main__")}):
        process.start()
    return process


def _die_at(event: int) -> None:
    """Kill this process at its (event // 2)-th write, fsync, rename, removal or socket call.

    Half-way through it for an even event, right after it for an odd one.
    """
    lock, calls = threading.Lock(), itertools.count(1)

    def wrap(owner: Any, name: str, half: Callable[..., object] = lambda *_: None) -> None:
        plain = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with lock:
                is_last = next(calls) == event // 2
            if is_last and event % 2 == 0:
                half(plain, *args)
                os.kill(os.getpid(), signal.SIGKILL)
            result = plain(*args, **kwargs)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)

    def half_write(write: Any, descriptor: int, data: Any, offset: int) -> None:
        write(descriptor, data[: len(data) // 2], offset)

    wrap(os, "pwrite", half_write)
    for name in ("fsync", "replace", "truncate", "unlink"):
        wrap(os, name)
    for name in ("send", "sendall", "recv"):
        wrap(socket.socket, name)


def _child(
    stage: str,
    argv: list[str],
    env: dict[str, str],
    output: str,
    die_at: int | None,
    file_bytes: int | None,
) -> None:
    import torch

    from llama_3 import CheckpointError
    from saint.stage.program import run_stage

    torch.set_num_threads(1)
    # Where the tests run in a shell's background, SIGINT is ignored by all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if die_at is not None:
        _die_at(die_at)
    private = [k for k in os.environ if k.upper().startswith("ANTHROPIC") or "proxy" in k.lower()]
    for name in private:
        del os.environ[name]
    os.environ.update(env)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    for number, ending in ((1, ".out"), (2, ".err")):
        descriptor = os.open(output + ending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    module = importlib.import_module(stage)
    run_stage(lambda: module.main(argv), expected=(CheckpointError,))


def start(
    stage: str,
    *args: object,
    output: Path,
    env: dict[str, str] | None = None,
    die_at: int | None = None,
    file_bytes: int | None = None,
) -> BaseProcess:
    """Start `stage`.py; its output goes to `output`.out and `output`.err.

    die_at: see `_die_at`. file_bytes: as if the disk were full once a file has that many.
    """
    words = [str(a) for a in args]
    return fork(_child, stage, words, env or {}, str(output), die_at, file_bytes)


def call(stage: str, *args: object, **options: Any) -> Finished:
    """Run `stage`.py to its end. options: those of `start`."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output"
        process = start(stage, *args, output=output, **options)
        process.join(120)
        return finished(process, output)


def call_ranks(
    n_ranks: int, stage: str, *args: object, die_at: dict[int, int] | None = None
) -> list[Finished]:
    """Run `stage`.py as `n_ranks` ranks of one process group, as torchrun would.

    die_at: by rank, see `_die_at`; where one fails, the others are then killed, as torchrun does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n_ranks)}
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory) / str(rank) for rank in range(n_ranks)]
        ranks = [
            start(
                stage,
                *args,
                output=output,
                env={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                die_at=(die_at or {}).get(rank),
            )
            for rank, output in enumerate(outputs)
        ]
        if die_at:
            _kill_with_the_first(ranks)
        for process in ranks:
            process.join(120)
        return [finished(*pair) for pair in zip(ranks, outputs, strict=True)]


def _kill_with_the_first(ranks: list[BaseProcess]) -> None:
    while running := [process for process in ranks if process.exitcode is None]:
        if not wait([process.sentinel for process in running], timeout=120):
            break
        for process in running if any(process.exitcode for process in ranks) else ():
            process.kill()
            process.join()


def finished(process: BaseProcess, output: Path) -> Finished:
    """Return what an ended process left behind."""
    code = process.exitcode
    process.kill()
    assert code is not None, "the stage hangs"
    texts = [Path(f"{output}{ending}").read_text() for ending in (".out", ".err")]
    return Finished(code, *texts)
