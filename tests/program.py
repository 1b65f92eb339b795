"""Run stages as programs, each in a process of its own, without paying for their imports each time.

A fork server imports the stages once; what it forks behaves like `python stage.py …`, can be
killed, and leaves its output in files.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
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
    for number, ending in ((1, ".out"), (2, ".err")):
        descriptor = os.open(output + ending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    module = importlib.import_module(stage)
    run_stage(lambda: module.main(argv), expected=(CheckpointError,))


def start(
    stage: str, *args: object, output: Path, env: dict[str, str] | None = None
) -> BaseProcess:
    process = _context().Process(
        target=_child, args=(stage, [str(a) for a in args], env or {}, str(output))
    )
    process.start()
    return process


def fork(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start `target`, a function of a module, in a process of its own."""
    process = _context().Process(target=target, args=args)
    process.start()
    return process


def call(stage: str, *args: object, env: dict[str, str] | None = None) -> Finished:
    return call_ranks(1, stage, *args, env=env)[0]


def call_ranks(
    n_ranks: int, stage: str, *args: object, env: dict[str, str] | None = None
) -> list[Finished]:
    """Run a stage on ranks that find each other as torchrun's do (by its environment)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    place |= {"WORLD_SIZE": str(n_ranks)}
    finished, processes = [], []
    with tempfile.TemporaryDirectory() as directory:
        for rank in range(n_ranks):
            own = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if n_ranks > 1 else {}
            output = Path(directory) / f"output{rank}"
            processes.append(start(stage, *args, output=output, env=own | (env or {})))
        for rank, process in enumerate(processes):
            process.join(120)
            assert process.exitcode is not None, "the stage hangs"
            output = Path(directory) / f"output{rank}"
            texts = [Path(f"{output}{ending}").read_text() for ending in (".out", ".err")]
            finished.append(Finished(process.exitcode, *texts))
    return finished
