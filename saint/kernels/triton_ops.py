"""What the training step's Triton kernels share, and the decoder.

Programs have one token or one latent, and a tile of its row's columns. Every sum has one fixed
order, without atomics: a step gives the same bits each time. With TRITON_INTERPRET=1 the kernels
run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae import ActiveLatents
from saint.kernels import torch_ops


@dataclass(frozen=True)
class Tiles:
    """How a kernel that gathers rows is launched.

    columns: of the rows, in one program. A tile's programs follow each other, so that the L2 cache
    can serve what they gather: tokens · columns · 4 bytes of a batch, latents · columns · 4 of
    W_dec. rows: read at once, for enough loads in flight. Sums are taken so many rows at a time: a
    card's bits depend on it.
    """

    columns: int
    rows: int
    warps: int


# By compute capability; chosen by counting, no card has measured them. Of 8,192 tokens 512 columns
# are 17 MB: an A100's and an H100's L2 has two halves of 20 and 25 MB, each with its own copy. The
# 4090's 72 MB and the 5090's 96 hold 256 columns of 65,536 latents too, the 3090 has 6 MB.
_DEFAULT = Tiles(512, 8, 4)
_TILES = {(8, 6): Tiles(128, 16, 4), (8, 9): Tiles(256, 16, 4), (12, 0): Tiles(256, 16, 4)}


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on any device."""
    return not isinstance(round_row, triton.JITFunction)


def tiles_of(capability: tuple[int, int] | None) -> Tiles:
    """Return what a GPU of this compute capability is launched with; None: the interpreter."""
    return _TILES.get(capability, _DEFAULT) if capability else _DEFAULT


def tiles_on(device: torch.device) -> Tiles:
    """Return what a device's kernels are launched with."""
    on_gpu = device.type == "cuda"
    return tiles_of(torch.cuda.get_device_capability(device) if on_gpu else None)


def tile_shape(rows: Tensor) -> tuple[int, dict[str, int]]:
    """Return how many tiles rows (…, d_model) have, and the launch options of their kernel."""
    tiles, d_model = tiles_on(rows.device), rows.shape[-1]
    columns = min(tiles.columns, row_shape(d_model)["BLOCK_D"])
    options = {"ROWS": tiles.rows, "TILE": columns, "num_warps": tiles.warps}
    return triton.cdiv(d_model, columns), options


def row_shape(d_model: int) -> dict[str, int]:
    """Return the launch options of a kernel that holds a whole row: its norm is needed."""
    block = max(16, triton.next_power_of_2(d_model))
    return {"BLOCK_D": block, "num_warps": min(16, max(1, block // 512))}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel's programs, where there are any, on the device of its first argument.

    options: the kernel's constants, and how Triton is to launch it. Whether products and sums are
    fused, which changes bits, is not left to Triton's default.
    """
    if min(grid):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, enable_fp_fusion=True, **options)


@triton.jit
def load_tile(matrix, which, there, at, d_model):
    """Return columns `at` of rows `which` (m,) of a matrix (…, d_model), 0 where not `there`."""
    mask = there[:, None] & (at < d_model)[None, :]
    return tl.load(matrix + which.to(tl.int64)[:, None] * d_model + at[None, :], mask, other=0.0)


@triton.jit
def round_row(row, rounded, norms, number, d_model, BLOCK_D: tl.constexpr):
    """Store row `number` of a matrix in bfloat16, and its 4-norm; row: (BLOCK_D,), 0 past d_model.

    With the largest number taken out, fourth powers neither overflow nor vanish.
    """
    at = tl.arange(0, BLOCK_D)
    tl.store(rounded + number.to(tl.int64) * d_model + at, row.to(tl.bfloat16), at < d_model)
    largest = tl.max(tl.abs(row), axis=0)
    part = row / tl.maximum(largest, 1e-30)
    square = part * part
    tl.store(norms + number, largest * tl.sqrt(tl.sqrt(tl.sum(square * square, axis=0))))


@triton.jit
def _reconstruct(
    x,
    normaliser,
    offsets,
    values,
    indices,
    w_dec,
    b_pre,
    g,
    squared,
    fired,
    factor,
    d_model,
    parts,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n_rows = tl.num_programs(0).to(tl.int64) * parts
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < d_model
    error = tl.load(b_pre + at, inside, other=0.0)
    error -= tl.load(x + token * d_model + at, inside, other=0.0)
    scale = factor / tl.load(normaliser + token)
    for part in range(parts):
        row = token * parts + part
        first, end = tl.load(offsets + row), tl.load(offsets + row + 1)
        for start in range(first, end, ROWS):
            entry = start + tl.arange(0, ROWS)
            value = tl.load(values + entry, entry < end, other=0.0)
            latent = tl.load(indices + entry, entry < end, other=0)
            rows = load_tile(w_dec, latent, value > 0, at, d_model)  # NaN · 0 shows too
            error += tl.sum(value[:, None] * rows, axis=0)
            if tile == 0:
                tl.store(fired + latent, tl.full([ROWS], 1, tl.uint8), value > 0)
        tl.store(squared + tile * n_rows + row, tl.sum(error * error, axis=0))
        tl.store(g + row * d_model + at, error * scale, inside)


def reconstruct(
    x: Tensor,
    active: ActiveLatents,
    w_dec: Tensor,
    b_pre: Tensor,
    factor: float,
    *,
    parts: int = 1,
    at_rest: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `torch_ops.reconstruct`, but ∂loss/∂values is (0,) unless entries of 0 have one too.

    The pass over latents makes it from the rows that it reads anyway.
    """
    (n_tokens, d_model), n_rows = x.shape, len(x) * parts
    n_tiles, shape = tile_shape(x)
    normaliser = x.square().sum(dim=1).clamp_min(torch_ops.MIN_NORMALISER * d_model)
    g, squared = x.new_empty(n_rows, d_model), x.new_empty(n_tiles, n_rows)
    fired = torch.zeros(w_dec.shape[0], dtype=torch.uint8, device=x.device)
    launch(
        *(_reconstruct, (n_tokens, n_tiles), x, normaliser),
        *(active.offsets, active.values, active.indices, w_dec.detach(), b_pre.detach()),
        *(g, squared, fired, factor, d_model, parts),
        **shape,
    )
    if parts > 1:  # what a part adds, the later ones have too
        g = g.view(n_tokens, parts, d_model).flip(1).cumsum(dim=1).flip(1).view(n_rows, d_model)
    g_values = torch_ops.gather_dot(g, active, w_dec) if at_rest else g.new_empty(0)
    squared = squared.sum(dim=0).view(n_tokens, parts)
    return g, g_values, squared, normaliser, fired.view(torch.bool)
