"""Several trainers at work on the same rows at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from saint.stage.workers import Workers


def _n_at_once(workers: Workers, n_threads: int) -> int:
    return min(2, n_threads) if workers.world_size == 1 and workers.device.type == "cpu" else 1


class Together:
    """Lets each of several do its part of the work, in one process on a CPU two of them at once.

    A step is partly serial: what one leaves of the processors, another takes. Each has as many
    threads as it would have alone, since sums are cut by their number: so its bits are the same.
    Ranks and GPUs take one after the other: collectives must come in one order, and a GPU is busy
    with one.
    """

    def __init__(self, workers: Workers | None, n_trainers: int = 1):
        self._pool: ThreadPoolExecutor | None = None
        n_threads = torch.get_num_threads()
        if workers is not None and n_trainers > 1 and _n_at_once(workers, n_threads) > 1:
            self._pool = ThreadPoolExecutor(
                _n_at_once(workers, n_threads),
                initializer=torch.set_num_threads,
                initargs=(n_threads,),
            )

    def each(self, work: Callable[..., Any], *parts: Iterable[Any]) -> list[Any]:
        """Return work(*part) of every part, in order; what one raises is raised."""
        rows = list(zip(*parts, strict=True))
        if self._pool is None or len(rows) < 2:
            return [work(*row) for row in rows]
        futures = [self._pool.submit(work, *row) for row in rows]
        return [future.result() for future in futures]


ALONE = Together(None)
