"""What several benchmarks share: shapes, drawn sentences, timing in turn, processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llama_3 import LlamaArgs

REPO = Path(__file__).resolve().parent.parent
SHAPES = {
    "embedded": LlamaArgs(
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        ffn_dim=1536,
        vocab_size=49152,
        rope_theta=100000.0,
        tied=True,
    ),
    "3b": LlamaArgs(
        dim=3072,
        n_layers=28,
        n_heads=24,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=8192,
        vocab_size=128256,
        tied=True,
    ),
    "tiny": LlamaArgs(64, 3, 4, 2, 16, 128, 512, tied=True),
}


def draw_sentences(n_sentences: int, n_vocab: int) -> list[list[int]]:
    """Random ids, as long as sentences of news are (mean 28, 95th percentile 58, cut at 192)."""
    rng = random.Random(0)
    lengths = [min(192, max(4, round(rng.lognormvariate(3.2, 0.5)))) for _ in range(n_sentences)]
    return [[rng.randrange(1, n_vocab) for _ in range(n)] for n in lengths]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def medians(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Run every way in turn, several times; returns each one's median figure."""
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            figures[name].append(way())
            print(f"{name} {repeat + 1}/{repeats}: {figures[name][-1]:,.1f}", flush=True)
    return {name: statistics.median(values) for name, values in figures.items()}


@contextmanager
def served_demo(model_dir: Path, sae_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the demo on a free port by its own command; gives its address and process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, REPO / "llama_3_inference_text_completion_gradio.py"]
    command += ["--llama_model_dir", model_dir, "--sae_model_path", sae_path, "--port", port]
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True) as it:
        try:
            assert it.stdout is not None
            if not any(line.startswith("open http") for line in it.stdout):
                raise SystemExit("the demo did not start")
            yield f"http://127.0.0.1:{port}", it
        finally:
            it.kill()


def in_child(work: Callable[[], object], limit: float | None = None) -> int | None:
    """Do work in a process forked from this one; return its exit code, None where it was killed.

    It is killed with all that it started after `limit` seconds. This process must neither have
    used a GPU, which the child could not then, nor computed by several threads, for which the
    child would wait.
    """

    def whole() -> None:
        if limit is not None:
            os.setsid()  # a group of its own, which its children belong to
        work()

    child = multiprocessing.get_context("fork").Process(target=whole)
    child.start()
    child.join(limit)
    if child.exitcode is None:
        assert child.pid is not None
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
        return None
    return child.exitcode


class PrivatePeak:
    """The most memory of its own (RssAnon) that this process holds inside `with`, in bytes.

    Looked at every 5 ms. before: at the beginning. Mapped files do not count.
    """

    def __enter__(self) -> PrivatePeak:
        self.before = self.highest = _private_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, _private_bytes())


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
