"""Files of ranks that share the latents: the whole SAE in one, a checkpoint in one per rank."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import TopKSparseAutoencoder, file_tensors, write_sae
from saint.stage.errors import UserError
from saint.stage.workers import Axis

_BLOCK_ROWS = 4096
_PER_LATENT = ("W_enc", "b_enc", "W_dec", "threshold", "tokens_since_fired", "dead")
_DAMAGE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError),
    *(TypeError, AttributeError, zipfile.BadZipFile),
)


@torch.no_grad()
def write_whole(path: Path, part: TopKSparseAutoencoder, ranks: Axis) -> None:
    """Write the file that `save_sae` would write of the ranks' parts as one; each of them calls it.

    The first one writes. Its matrices are memory-mapped scratch files beside `path`, nameless, to
    which it is sent a block of rows at a time.
    """
    config = replace(part.config, n_latents=part.config.n_latents * ranks.size)
    maximum, state = part.max_activations, {}
    if maximum is not None:
        maximum = ranks.gather(maximum).flatten()
    for name, tensor in file_tensors(part).items():
        if tensor.ndim == 1:
            state[name] = (tensor if name == "b_pre" else ranks.gather(tensor).flatten()).cpu()
            continue
        is_decoder = name == "decoder.weight"
        rows = tensor.T if is_decoder else tensor
        if ranks.rank:
            for block in rows.split(_BLOCK_ROWS):
                ranks.send_to_first(block.contiguous())
            continue
        n, d = config.n_latents, config.d_model
        state[name] = _scratch(path.parent, (d, n) if is_decoder else (n, d))
        _collect(state[name].T if is_decoder else state[name], rows, ranks)
    if ranks.rank == 0:
        write_sae(path, config, state, maximum)


def _collect(whole: Tensor, rows: Tensor, ranks: Axis) -> None:
    """Fill whole (n_latents, d_model) with the first rank's rows and those that the others send."""
    n_here = len(rows)
    for rank in range(ranks.size):
        for start in range(0, n_here, _BLOCK_ROWS):
            block = rows[start : start + _BLOCK_ROWS]
            if rank:
                block = ranks.receive(block.new_empty(block.shape), rank)
            at = rank * n_here + start
            whole[at : at + len(block)] = block.cpu()


def _scratch(directory: Path, shape: tuple[int, int]) -> Tensor:
    """Return a float32 tensor in a file without a name, for which there is room on the disk."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, 4 * shape[0] * shape[1])
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))


def part_name(stem: str, step: int, ranks: Axis) -> str:
    """Return the name of a rank's file of a checkpoint; alone it has no part to tell."""
    part = f".{ranks.rank}-of-{ranks.size}" if ranks.size > 1 else ""
    return f"{stem}.step_{step:09d}{part}.pt"


def complete_checkpoints(paths: Sequence[Path]) -> list[list[Path]]:
    """Return the checkpoints of which every rank's file is there, oldest first, files by rank."""
    found: dict[tuple[int, int], dict[int, Path]] = {}
    for path in paths:
        if named := re.search(r"\.step_(\d+)(?:\.(\d+)-of-(\d+))?\.pt$", path.name):
            step, rank, size = named.groups(default="")
            found.setdefault((int(step), int(size or 1)), {})[int(rank or 0)] = path
    return [
        [parts[rank] for rank in range(size)]
        for (_, size), parts in sorted(found.items())
        if parts.keys() == set(range(size))
    ]


def read_part(paths: Sequence[Path], ranks: Axis) -> Any:
    """Return a rank's part of a checkpoint, of which the paths are by rank, however many wrote it.

    On the CPU. Raises UserError naming a file that is damaged.
    """
    n = len(paths)
    if n == ranks.size:
        return _load(paths[ranks.rank], mapped=False)
    # Rank r has the latents from r/size to (r + 1)/size of all, file i those from i/n to (i + 1)/n.
    needed = range(ranks.rank * n // ranks.size, -(-(ranks.rank + 1) * n // ranks.size))
    states = {i: _load(paths[i], mapped=True) for i in needed}
    try:
        return _joined(states, n, ranks)
    except _DAMAGE:
        raise UserError(f"{paths[needed[0]]} is damaged, or another rank's file") from None


def _load(path: Path, *, mapped: bool) -> Any:
    try:
        if mapped:  # nothing is looked at as a whole then
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("its bytes are not those that were written")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _DAMAGE:
        raise UserError(f"{path} is damaged") from None


def _joined(states: dict[int, Any], n: int, ranks: Axis, name: str = "") -> Any:
    """Cut a rank's latents out of n ranks' states, of which there are those that have some."""
    first = next(iter(states.values()))
    if isinstance(first, dict):
        return {
            key: _joined({i: state[key] for i, state in states.items()}, n, ranks, key)
            for key in first
        }
    if name not in _PER_LATENT or not isinstance(first, Tensor) or not first.ndim:
        return first
    rows = len(first)
    start, stop = (place * rows * n // ranks.size for place in (ranks.rank, ranks.rank + 1))
    return torch.cat(
        [t[max(start - i * rows, 0) : max(stop - i * rows, 0)] for i, t in states.items()]
    )
