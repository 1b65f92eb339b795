"""What preprocessing learns about rows while they pass by: their mean, variance and norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saint.stage.errors import UserError
from saint.stage.files import atomic_path
from saint.store.row_format import Stored, decode_rows

MASSIVE_NORM_FACTOR = 20
_EPS = 1e-6  # as in sae.standardise
_SCRATCH_BYTES = 4 << 20
_N_FINE_BINS = 8192
_N_BINS = 40
_N_NAMED = 10


@dataclass
class RowStatistics:
    """Sums over standardised training rows, and every row's raw norm, in the order of the rows.

    total: (d_model,) float64, the sum of z (see `sae.standardise`). squares: sum of |z|^2.
    """

    total: np.ndarray | None = None
    squares: float = 0.0
    norm_parts: list[np.ndarray] = field(default_factory=list)

    @property
    def norms(self) -> np.ndarray:
        """(n_rows,) float32."""
        return np.concatenate([np.zeros(0, np.float32), *self.norm_parts])

    def refuse_infinite(self, path: Path) -> None:
        """Raise UserError, naming the shard, where a row was not finite."""
        if not all(np.isfinite(part).all() for part in self.norm_parts):
            raise UserError(f"{path} holds activations that are not finite")

    @classmethod
    def of(cls, rows: Stored, is_train: np.ndarray, scratch: Tensor) -> RowStatistics:
        """Count n stored rows. is_train: (n,) bool. scratch: from `make_scratch`.

        z is never made: from a row's sum and norm follow its mean and deviation, and sums of z
        are products with the raw rows; float32 over as many rows as scratch holds, float64 beyond.
        """
        n_rows, d_model = rows["activations"].shape
        total, squares, norm_parts = np.zeros(d_model), 0.0, []
        ones = torch.ones(d_model)
        for start in range(0, n_rows, len(scratch)):
            block = slice(start, start + len(scratch))
            part = decode_rows({name: tensor[block] for name, tensor in rows.items()})
            raw = scratch[: len(part)].copy_(part)
            norms = torch.linalg.vector_norm(raw, dim=1)
            mean = torch.mv(raw, ones).double() / d_model
            centred = (norms.double().square() - d_model * mean.square()).clamp_min(0)
            scale = (centred / (d_model - 1)).sqrt() + _EPS
            weight = torch.where(torch.from_numpy(is_train[block]), 1 / scale, 0.0)
            total += torch.mv(raw.T, weight.float()).double().numpy()
            total -= float((weight * mean).sum())
            squares += float((weight.square() * centred).sum())
            norm_parts.append(norms.numpy())
        return cls(total, squares, norm_parts)

    def append(self, following: RowStatistics) -> None:
        """Count the rows that follow."""
        self.total = following.total if self.total is None else self.total + following.total
        self.squares += following.squares
        self.norm_parts += following.norm_parts

    def save(self, path: Path) -> None:
        """Write atomically."""
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            arrays = {"total": self.total, "squares": self.squares, "norms": self.norms}
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> RowStatistics:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["total"], float(arrays["squares"]), [arrays["norms"]])


def make_scratch(d_model: int) -> Tensor:
    """Return memory (n, d_model) float32 that fits into a processor's cache."""
    return torch.empty(max(1, _SCRATCH_BYTES // (4 * d_model)), d_model)


def combine_sums(parts: Iterable[RowStatistics], n_rows: int) -> tuple[Tensor, float]:
    """Return the mean (d_model,) of the standardised training rows, and their total variance."""
    total, squares = np.zeros(1), 0.0
    for part in parts:
        if part.total is not None:
            total, squares = total + part.total, squares + part.squares
    mean = total / n_rows
    return torch.from_numpy(mean).float(), float(squares / n_rows - np.square(mean).sum())


def describe_norms(norms: Callable[[], Iterable[np.ndarray]]) -> dict[str, Any]:
    """Return the raw norms' median (to a thousandth) and histogram; norms yields them by shard."""
    lows, highs = zip(*((n.min(), n.max()) for n in norms() if len(n)), strict=True)
    low, high = max(float(min(lows)), 1e-6), float(max(highs)) * (1 + 1e-6) + 1e-6
    fine, coarse = (np.geomspace(low, high, n + 1) for n in (_N_FINE_BINS, _N_BINS))
    fine[0] = coarse[0] = min(low, float(min(lows)))
    counts, shown = np.zeros(_N_FINE_BINS, np.int64), np.zeros(_N_BINS, np.int64)
    for part in norms():
        counts += np.histogram(part, fine)[0]
        shown += np.histogram(part, coarse)[0]
    middle = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return {
        "norm_median": float(np.sqrt(max(fine[middle], 1e-12) * fine[middle + 1])),
        "norm_histogram": {"edges": coarse.tolist(), "counts": shown.tolist()},
    }


def massive_tokens(
    norms: Iterable[np.ndarray], token_ids: Iterable[np.ndarray], median: float, texts: list[str]
) -> dict[str, int]:
    """Return {token text: count} of the commonest tokens whose norm is over 20 x the median."""
    counts = np.zeros(len(texts), np.int64)
    for shard_norms, ids in zip(norms, token_ids, strict=True):
        massive = shard_norms > MASSIVE_NORM_FACTOR * median
        counts += np.bincount(ids[massive], minlength=len(texts))
    common = [i for i in np.argsort(-counts, kind="stable")[:_N_NAMED] if counts[i]]
    return {texts[i]: int(counts[i]) for i in common}
