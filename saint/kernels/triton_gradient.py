"""The gradient by latent, in Triton: rows of tokens gathered once for each matrix, and stored.

A latent's decoder direction meets the rows ∂loss/∂x̂ of its tokens where their sum is made: their
dot products are ∂loss/∂activation, which the encoder's sum needs. A latent with many tokens has
several programs, whose parts are added in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from saint.kernels import torch_ops
from saint.kernels.pieces import AuxGradient, SparseGradient
from saint.kernels.triton_ops import launch, load_tile, tile_shape

_SPLIT = 512  # entries of a latent that one program adds up
_DOTS = 256  # entries whose dot products are finished together


@dataclass(frozen=True)
class Entries:
    """A batch's active entries by latent.

    tokens, values: (n_entries,), each latent's one after the other; what is not active comes last.
    starts: (n_latents + 2,) where each latent's begin. extra_starts: (n_latents + 1,) the numbers
    of each latent's parts but its first. owners: (n_extra,) whose these are; n_latents is no one.
    touched: (n_latents,) uint8, which have entries or are `dead`. dead: (n_latents,) a latent's
    position among AuxK's, or -1; a placeholder without AuxK.
    """

    tokens: Tensor
    values: Tensor
    starts: Tensor
    extra_starts: Tensor
    owners: Tensor
    touched: Tensor
    dead: Tensor


def group_by_latent(n_latents: int, whole: SparseGradient, dead: Tensor | None) -> Entries:
    """Sort a batch's active entries by latent, tokens ascending; dead: (n_dead,) AuxK's latents."""
    active = whole.active
    indices = torch.where(active.values > 0, active.indices, n_latents)
    by_latent = torch_ops.group_by_latent(replace(active, indices=indices), n_latents + 1)
    counts = by_latent.row_starts.diff()[:n_latents]
    extra_starts = F.pad(((counts - 1).clamp_min(0) // _SPLIT).cumsum(0), (1, 0))
    numbers = torch.arange(len(indices) // _SPLIT, device=indices.device)  # as many as can be
    owners = torch.searchsorted(extra_starts[1:], numbers, right=True)
    touched, position = (counts > 0).to(torch.uint8), counts
    if dead is not None:
        touched[dead] = 1
        position = torch.full_like(counts, -1)
        position[dead] = torch.arange(len(dead), device=dead.device)
    values = active.values[by_latent.order]
    starts = by_latent.row_starts
    return Entries(by_latent.tokens, values, starts, extra_starts, owners, touched, position)


@triton.jit
def _sum_part(
    tokens,
    weights,
    rows,
    starts,
    latent,
    number,
    parts,
    direction,
    dots,
    at,
    d_model,
    DOTS: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return (TILE,): Σ weight · rows[token // parts] over a latent's part of the given number.

    DOTS: also store the rows' products with a direction (TILE,).
    """
    first = tl.load(starts + latent) + number * SPLIT
    end = tl.minimum(first + SPLIT, tl.load(starts + latent + 1))
    total = tl.zeros([TILE], tl.float32)
    for start in range(first, end, ROWS):
        entry = start + tl.arange(0, ROWS)
        there = entry < end
        token = tl.load(tokens + entry, there, other=0) // parts
        weight = tl.load(weights + entry, there, other=0.0)
        part = load_tile(rows, token, there, at, d_model)
        total += tl.sum(weight[:, None] * part, axis=0)
        if DOTS:
            tl.store(dots + entry, tl.sum(part * direction[None, :], axis=1), there)
    return total


@triton.jit
def _extra_parts(
    owners,
    extra_starts,
    starts,
    tokens,
    weights,
    rows,
    w_dec,
    dots,
    extra,
    n_latents,
    n_entries,
    parts,
    d_model,
    DOTS: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store the sum of each part but a latent's first, (n_extra, d_model)."""
    mine, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    latent = tl.load(owners + mine)
    if latent < n_latents:
        number = 1 + mine - tl.load(extra_starts + latent)
        at = tile * TILE + tl.arange(0, TILE)
        direction = tl.zeros([TILE], tl.float32)
        if DOTS:
            direction = tl.load(w_dec + latent * d_model + at, at < d_model, other=0.0)
        here = dots + tile.to(tl.int64) * n_entries
        total = _sum_part(
            tokens,
            weights,
            rows,
            starts,
            latent,
            number,
            parts,
            direction,
            here,
            at,
            d_model,
            DOTS,
            SPLIT,
            ROWS,
            TILE,
        )
        tl.store(extra + mine * d_model + at, total, at < d_model)


@triton.jit
def _whole_rows(
    touched,
    extra_starts,
    starts,
    tokens,
    weights,
    rows,
    w_dec,
    dots,
    extra,
    dead,
    aux_rows,
    out,
    products,
    squares,
    n_latents,
    n_entries,
    parts,
    d_model,
    DECODER: tl.constexpr,
    HAS_AUX: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store a latent's gradient of one matrix, and its tiles' squares (n_tiles, n_latents).

    DECODER: also their products with the decoder direction, which are yet to be projected out.
    """
    latent, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(touched + latent) > 0:
        at = tile * TILE + tl.arange(0, TILE)
        here, inside = latent * d_model + at, at < d_model
        direction = tl.zeros([TILE], tl.float32)
        if DECODER:
            direction = tl.load(w_dec + here, inside, other=0.0)
        total = _sum_part(
            tokens,
            weights,
            rows,
            starts,
            latent,
            0,
            parts,
            direction,
            dots + tile.to(tl.int64) * n_entries,
            at,
            d_model,
            DECODER,
            SPLIT,
            ROWS,
            TILE,
        )
        part, n_parts = tl.load(extra_starts + latent), tl.load(extra_starts + latent + 1)
        while part < n_parts:
            total += tl.load(extra + part * d_model + at, inside, other=0.0)
            part += 1
        if HAS_AUX:
            position = tl.load(dead + latent)
            mask = at < tl.where(position >= 0, d_model, 0)
            total += tl.load(aux_rows + position * d_model + at, mask, other=0.0)
        tl.store(out + here, total, inside)
        tl.store(squares + tile * n_latents + latent, tl.sum(total * total, axis=0))
        if DECODER:
            tl.store(products + tile * n_latents + latent, tl.sum(total * direction, axis=0))


@triton.jit
def _finish_dots(
    touched,
    starts,
    dots,
    products,
    dead,
    aux_b,
    g_values,
    grad_b,
    along,
    n_latents,
    n_entries,
    n_tiles,
    HAS_AUX: tl.constexpr,
    DOTS: tl.constexpr,
):
    """Add up what the tiles found: ∂loss/∂activation, b_enc's gradient, the part to project out."""
    latent = tl.program_id(0).to(tl.int64)
    if tl.load(touched + latent) > 0:
        start, end = tl.load(starts + latent), tl.load(starts + latent + 1)
        total = tl.zeros([DOTS], tl.float32)
        for first in range(start, end, DOTS):
            entry = first + tl.arange(0, DOTS)
            value = tl.zeros([DOTS], tl.float32)
            for tile in range(n_tiles):
                value += tl.load(dots + tile * n_entries + entry, entry < end, other=0.0)
            tl.store(g_values + entry, value, entry < end)
            total += value
        bias = tl.sum(total, axis=0)
        if HAS_AUX:
            position = tl.load(dead + latent)
            bias += tl.load(aux_b + position, position >= 0, other=0.0)
        tl.store(grad_b + latent, bias)
        product = 0.0
        for tile in range(n_tiles):
            product += tl.load(products + tile * n_latents + latent)
        tl.store(along + latent, product)


@dataclass(frozen=True)
class LatentGradient:
    """A batch's gradient by latent.

    dec, enc: (n_latents, d_model), rows that are not touched hold anything. along: (n_latents,) how
    much of its own decoder direction is to be taken off a row of dec. b: (n_latents,) b_enc's.
    touched: (n_latents,) uint8, which latents have a gradient. squared_norm: () float64, of all of
    it, dec as it will be.
    """

    dec: Tensor
    enc: Tensor
    along: Tensor
    b: Tensor
    touched: Tensor
    squared_norm: Tensor


def gradient_by_latent(whole: SparseGradient, w_dec: Tensor, dead: Tensor | None) -> LatentGradient:
    """Sum a batch's gradient over its tokens; dead: (n_dead,) AuxK's latents."""
    n_latents, d_model = w_dec.shape
    aux = whole.aux if dead is not None else None
    entries = group_by_latent(n_latents, whole, dead if aux is not None else None)
    dec, enc = torch.empty_like(w_dec), torch.empty_like(w_dec)
    along, grad_b = w_dec.new_zeros(2, n_latents)
    aux_of = aux or AuxGradient(w_dec, w_dec, grad_b)  # placeholders
    gather = _Gather(entries, w_dec, aux is not None)
    gather(entries.values, whole.g, aux_of.dec, dec, decoder=True)
    g_values = gather.finish_dots(aux_of.b, grad_b, along)
    gather(g_values, whole.a, aux_of.enc, enc, parts=len(whole.g) // max(1, len(whole.a)))
    # A decoder direction has unit norm. What is left of a row that lies almost along it is known
    # less well, but then enc's row is as long: its product with W_enc's is `along`, without b_enc.
    squares = gather.squares.double().sum() + grad_b.double().square().sum()
    squares = (squares - along.double().square().sum()).clamp_min(0)
    return LatentGradient(dec, enc, along, grad_b, entries.touched, squares)


class _Gather:
    """Launches the kernels of both matrices on a batch's entries."""

    def __init__(self, entries: Entries, w_dec: Tensor, has_aux: bool) -> None:
        self.entries, self.w_dec, self.has_aux = entries, w_dec, has_aux
        self.n_tiles, self.shape = tile_shape(w_dec)
        n_entries, n_latents = len(entries.tokens), len(w_dec)
        self.dots = w_dec.new_empty(self.n_tiles, n_entries)
        self.products = w_dec.new_empty(self.n_tiles, n_latents)
        self.squares = w_dec.new_zeros(2, self.n_tiles, n_latents)
        self.extra = w_dec.new_empty(len(entries.owners), w_dec.shape[1])

    def __call__(
        self,
        weights: Tensor,
        rows: Tensor,
        aux_rows: Tensor,
        out: Tensor,
        *,
        decoder: bool = False,
        parts: int = 1,
    ) -> None:
        """Fill out (n_latents, d_model) with sums of weights (n_entries,) · rows[token // parts].

        decoder: whether the products with W_dec's rows are wanted too.
        """
        entries, (n_latents, d_model) = self.entries, self.w_dec.shape
        sums = (entries.extra_starts, entries.starts, entries.tokens, weights, rows)
        dots = (self.w_dec, self.dots, self.extra)
        numbers = (n_latents, len(entries.tokens), parts, d_model)
        grid, constants = (len(entries.owners), self.n_tiles), {"SPLIT": _SPLIT, **self.shape}
        launch(
            *(_extra_parts, grid, entries.owners, *sums, *dots, *numbers),
            DOTS=decoder,
            **constants,
        )
        launch(
            *(_whole_rows, (n_latents, self.n_tiles), entries.touched, *sums, *dots),
            *(entries.dead, aux_rows, out, self.products, self.squares[int(decoder)], *numbers),
            DECODER=decoder,
            HAS_AUX=self.has_aux,
            **constants,
        )

    def finish_dots(self, aux_b: Tensor, grad_b: Tensor, along: Tensor) -> Tensor:
        """Return ∂loss/∂activation (n_entries,); fill grad_b and along (n_latents,)."""
        entries, n_latents = self.entries, len(self.w_dec)
        g_values = torch.empty_like(entries.values)
        launch(
            *(_finish_dots, (n_latents,), entries.touched, entries.starts, self.dots),
            *(self.products, entries.dead, aux_b, g_values, grad_b, along),
            *(n_latents, len(entries.tokens), self.n_tiles),
            HAS_AUX=self.has_aux,
            DOTS=_DOTS,
        )
        return g_values
