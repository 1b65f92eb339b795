"""Run stages as programs, each in a process of its own, without paying for their imports each time.

A fork server imports the stages once; what it forks behaves like `python stage.py …`, can be
killed, and leaves its output in files.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
STAGES = (
    "capture_activations",
    "sae_preprocessing",
    "sae_training",
    "sae_evaluation",
    "capture_top_activating_sentences",
)


@dataclass
class Finished:
    returncode: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        return (self.stderr.strip().splitlines() or [""])[-1]


def _context() -> Any:
    # The server's own process inherits sys.path through the environment.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(STAGES))
    return context


def _child(stage: str, argv: list[str], env: dict[str, str], output: str) -> None:
    import torch

    from llama_3 import CheckpointError
    from saint.runtime import run_stage

    torch.set_num_threads(1)
    os.environ.update(env)
    if "DIE_AT" in env:
        die_at(int(env["DIE_AT"]))
    if "FILE_BYTES" in env:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(env["FILE_BYTES"]), int(env["FILE_BYTES"])))
    for number, ending in ((1, ".out"), (2, ".err")):
        descriptor = os.open(output + ending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    module = importlib.import_module(stage)
    run_stage(lambda: module.main(argv), expected=(CheckpointError,))


def die_at(n_calls: int) -> None:
    """Make this process vanish at its n-th write, fsync, rename or removal, half-way through."""
    lock, calls = threading.Lock(), itertools.count(1)

    def dying(name: str, half: Callable[..., object]) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                if next(calls) >= n_calls:
                    half(original, *args)
                    os._exit(137)
            return original(*args, **kwargs)

        return call

    def half_write(write: Any, descriptor: int, data: Any, offset: int) -> None:
        write(descriptor, data[: len(data) // 2], offset)

    os.pwrite = dying("pwrite", half_write)
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, dying(name, lambda *_: None))


def start(
    stage: str, *args: object, output: Path, env: dict[str, str] | None = None
) -> BaseProcess:
    process = _context().Process(
        target=_child, args=(stage, [str(a) for a in args], env or {}, str(output))
    )
    process.start()
    return process


def call(stage: str, *args: object, env: dict[str, str] | None = None) -> Finished:
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output"
        process = start(stage, *args, output=output, env=env)
        process.join(120)
        assert process.exitcode is not None, "the stage hangs"
        texts = [Path(f"{output}{ending}").read_text() for ending in (".out", ".err")]
    return Finished(process.exitcode, *texts)
