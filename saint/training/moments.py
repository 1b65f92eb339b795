"""Adam's moments: in float32, or in 8 bits with a float32 scale per row and moment.

The 8-bit format, which `cpu_moments.h` shares. A row's scale s is the largest magnitude in it, or 0
where that is under 1e-30: all its moments are then 0. The first moment is s · sign(c) · (|c|/127)²
for a code c in [-127, 127]. The second is s · (c/255)⁴ for a code c in [0, 255], at least 1 where
the moment was above 0 (Adam divides by its root).

Rounding is stochastic and right on average, since with β₂ = 0.999 the nearest code would never
move; and it depends on step, tensor, row and column alone, so that a resumed run has the same bits.
In 32-bit unsigned arithmetic `mix` is "lowbias32" (github.com/skeeto/hash-prospector);
h = mix(mix(mix(2 · step + tensor) ^ row) + column), tensor 0 for W_enc and 1 for W_dec. The first
moment's uniform number is ((h >> 16) + ½) / 2¹⁶, the second's ((h & 0xffff) + ½) / 2¹⁶. A value x
between neighbours `below` and `above` becomes `above` where
uniform · (above − below) < x − below.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae import TopKSparseAutoencoder

MOMENT_KINDS = ("float32", "int8")
BETA1 = 0.9
EPS = 6.25e-10
MATRICES = ("W_enc", "W_dec")  # the position is the tensor's number in the hash
_LEAST_SCALE = 1e-30
_BLOCK_ELEMENTS = 1 << 22
_WORD = 0xFFFFFFFF


class Moments:
    """Adam's state: two moments of each parameter, and the steps taken.

    kind: one of MOMENT_KINDS. "int8" holds codes of W_enc and W_dec, int8 in `first`, uint8 in
    `second`, and in `scales` their (2, n_latents) scales, the first moment's and the second's; all
    else is float32, and without codes `scales` is empty. lazy: a step leaves latents without a
    gradient as they are, weights and moments. threshold_rate: how many times the others' rate
    JumpReLU's thresholds move at.
    """

    def __init__(
        self,
        sae: TopKSparseAutoencoder,
        kind: str = "float32",
        *,
        beta2: float = 0.999,
        lazy: bool = False,
        threshold_rate: float = 1.0,
    ):
        self.threshold_rate = threshold_rate
        self.n_steps, self.betas, self.lazy = 0, (BETA1, beta2), lazy
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        for name, parameter in sae.named_parameters():
            coded = kind == "int8" and name in MATRICES
            like = parameter.detach()
            self.first[name] = torch.zeros_like(like, dtype=torch.int8 if coded else None)
            self.second[name] = torch.zeros_like(like, dtype=torch.uint8 if coded else None)
            if coded:
                self.scales[name] = like.new_zeros(2, len(like))

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes."""
        state = {"n_steps": self.n_steps, "first": self.first, "second": self.second}
        return state | ({"scales": self.scales} if self.scales else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from another run's moments of the same kind."""
        self.n_steps = state["n_steps"]
        for mine in ("first", "second", "scales"):
            for name, tensor in getattr(self, mine).items():
                assert state[mine][name].dtype == tensor.dtype, f"moments of another kind: {name}"
                tensor.copy_(state[mine][name])

    def advance(self, learning_rate: float) -> tuple[float, float]:
        """Count a step; return lr / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ)."""
        self.n_steps += 1
        correction1, correction2 = (1 - beta**self.n_steps for beta in self.betas)
        return learning_rate / correction1, correction2**-0.5

    def blocks(
        self, name: str, touched: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows of a parameter, and both moments of these in float32; changes are kept.

        touched: (n_rows,) bool, the rows whose codes may change, by default all.
        """
        first, second = self.first[name], self.second[name]
        n_rows = max(1, _BLOCK_ELEMENTS * len(first) // first.numel())
        for start in range(0, len(first), n_rows):
            rows = slice(start, min(start + n_rows, len(first)))
            if name not in self.scales:
                yield rows, first[rows], second[rows]
                continue
            kept = (first[rows], second[rows], self.scales[name][:, rows])
            m, v = from_codes(kept[0], kept[1], kept[2].unsqueeze(2))
            yield rows, m, v
            numbers = torch.arange(rows.start, rows.stop, device=m.device)
            new = to_codes(m, v, *uniform(self.n_steps, MATRICES.index(name), numbers, m))
            for mine, theirs, some in zip(kept, new, _masks(touched, rows), strict=True):
                mine.copy_(theirs if some is None else torch.where(some, theirs, mine))


def _masks(touched: Tensor | None, rows: slice) -> tuple[Tensor | None, ...]:
    """Return which of both moments' codes and of their scales may change."""
    if touched is None:
        return None, None, None
    some = touched[rows]
    return some.unsqueeze(1), some.unsqueeze(1), some


def from_codes(first: Tensor, second: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return both moments (n, d) of codes (n, d) and scales (2, n, 1)."""
    m = first.float().div_(127)
    return m.mul_(m.abs()).mul_(scales[0]), second.float().div_(255).pow_(4).mul_(scales[1])


def to_codes(
    m: Tensor, v: Tensor, uniform_m: Tensor, uniform_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Round moments (n, d); return their codes (n, d) and scales (2, n)."""
    scales = torch.stack([m.abs().amax(dim=1), v.amax(dim=1)])
    scales.masked_fill_(scales < _LEAST_SCALE, 0)
    share_m, share_v = (
        (moment / scale.clamp_min(_LEAST_SCALE).unsqueeze(1)).mul_(scale.unsqueeze(1) > 0)
        for moment, scale in zip((m.abs(), v), scales, strict=True)
    )
    first = _round(share_m, share_m.sqrt(), uniform_m, top=127, power=2)
    second = _round(share_v, share_v.sqrt().sqrt_(), uniform_v, top=255, power=4)
    second = torch.maximum(second, (share_v > 0).float())
    return first.copysign_(m).to(torch.int8), second.to(torch.uint8), scales


def _round(share: Tensor, root: Tensor, uniform: Tensor, *, top: int, power: int) -> Tensor:
    """Return codes c for which (c / top) ** power is the share (0 to 1) on average."""
    low = (root * top).floor_().clamp_(max=top - 1)
    below, above = (low / top).pow_(power), ((low + 1) / top).pow_(power)
    return low + (uniform * (above - below) < share - below)


def uniform(step: int, tensor: int, rows: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (n, d) numbers in (0, 1) that both moments of rows (n,) are rounded with."""
    row = _mix(key(step, tensor, like.device) ^ rows)
    columns = torch.arange(like.shape[1], device=like.device)
    h = _mix((row.unsqueeze(1) + columns).bitwise_and_(_WORD))
    first, second = (part.float().add_(0.5).div_(1 << 16) for part in (h >> 16, h & 0xFFFF))
    return first, second


def key(step: int, tensor: int, device: torch.device) -> Tensor:
    """Return what a tensor's row numbers are hashed with at a step, ()."""
    return _mix(torch.full((), (2 * step + tensor) & _WORD, device=device))


def _mix(h: Tensor) -> Tensor:
    """Scramble 32-bit numbers; int64, of which a product's low 32 bits are always right."""
    h = (h ^ (h >> 16)) * 0x7FEB352D & _WORD
    h = (h ^ (h >> 15)) * 0x846CA68B & _WORD
    return h ^ (h >> 16)
