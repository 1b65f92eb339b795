"""The training step's Triton kernels beside the encoder: decode, gradients by latent, Adam.

One program has one token or one latent, and its whole row (d_model numbers) in registers. Every sum
has one fixed order, without atomics: a step gives the same bits each time. With TRITON_INTERPRET=1
the kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae import ActiveLatents
from saint.kernels import torch_ops
from saint.kernels.pieces import SparseGradient

_ROWS = 4  # rows of d_model numbers that a program reads at once: enough loads in flight


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on any device."""
    return not isinstance(round_row, triton.JITFunction)


def row_shape(d_model: int) -> dict[str, int]:
    """Return the launch options of a kernel that holds rows of d_model numbers."""
    block = max(16, triton.next_power_of_2(d_model))
    return {"ROWS": _ROWS, "BLOCK_D": block, "num_warps": min(16, max(1, block // 512))}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel's programs, where there are any, on the device of its first argument.

    options: the kernel's constants, and how Triton is to launch it.
    """
    if min(grid):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **options)


@triton.jit
def load_rows(matrix, which, there, d_model, BLOCK_D: tl.constexpr):
    """Return rows `which` (m,) of a matrix (…, d_model), 0 where not `there` and past d_model."""
    at = tl.arange(0, BLOCK_D)
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
    values,
    indices,
    w_dec,
    b_pre,
    g,
    g_values,
    squared,
    normaliser,
    fired,
    factor,
    least_normaliser,
    d_model,
    k,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_D)
    inside = at < d_model
    wanted = tl.load(x + token * d_model + at, inside, other=0.0)
    error = tl.load(b_pre + at, inside, other=0.0) - wanted
    for start in range(0, k, ROWS):
        entry = start + tl.arange(0, ROWS)
        value = tl.load(values + token * k + entry, entry < k, other=0.0)
        latent = tl.load(indices + token * k + entry, entry < k, other=0)
        rows = load_rows(w_dec, latent, value > 0, d_model, BLOCK_D)  # NaN · 0 shows too
        error += tl.sum(value[:, None] * rows, axis=0)
    size = tl.maximum(tl.sum(wanted * wanted, axis=0), least_normaliser)
    tl.store(squared + token, tl.sum(error * error, axis=0))
    tl.store(normaliser + token, size)
    error = error * (factor / size)
    tl.store(g + token * d_model + at, error, inside)
    for start in range(0, k, ROWS):
        entry = start + tl.arange(0, ROWS)
        value = tl.load(values + token * k + entry, entry < k, other=0.0)
        latent = tl.load(indices + token * k + entry, entry < k, other=0)
        rows = load_rows(w_dec, latent, value > 0, d_model, BLOCK_D)
        tl.store(g_values + token * k + entry, tl.sum(rows * error[None, :], axis=1), entry < k)
        tl.store(fired + latent, tl.full([ROWS], 1, tl.uint8), value > 0)


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
    """As `torch_ops.reconstruct`, with int32 indices; and by it where there is no kernel."""
    if parts > 1 or at_rest:
        how = {"parts": parts, "at_rest": at_rest}
        return torch_ops.reconstruct(x, active, w_dec, b_pre, factor, **how)
    values, indices = active.matrices()
    (n_tokens, d_model), k = x.shape, values.shape[1]
    g, g_values = torch.empty_like(x), torch.empty_like(values)
    squared, normaliser = x.new_empty(n_tokens), x.new_empty(n_tokens)
    fired = torch.zeros(w_dec.shape[0], dtype=torch.uint8, device=x.device)
    launch(
        *(_reconstruct, (n_tokens,), x, values, indices, w_dec.detach(), b_pre.detach()),
        *(g, g_values, squared, normaliser, fired),
        *(factor, torch_ops.MIN_NORMALISER * d_model, d_model, k),
        **row_shape(d_model),
    )
    if active.k is None:  # leave out what only fills the rows up
        g_values = g_values[torch.arange(k, device=x.device) < active.offsets.diff().unsqueeze(1)]
    return g, g_values.reshape(-1), squared.unsqueeze(1), normaliser, fired.view(torch.bool)


@dataclass(frozen=True)
class LatentGradient:
    """A batch's gradient by latent: what `_gradient_row` adds up.

    order: (n_latents,) the busiest first, so that none is begun last. starts: (n_latents + 2,)
    where each latent's active entries begin among tokens, values and g_values.
    a, g: (n_rows, d_model), a row being a token or a part of one. aux: each latent's position among
    the dead ones or -1 (n_latents,), and AuxK's gradients of W_dec, W_enc (n_dead, d_model) and
    b_enc (n_dead,); placeholders without AuxK.
    """

    order: Tensor
    starts: Tensor
    tokens: Tensor
    values: Tensor
    g_values: Tensor
    a: Tensor
    g: Tensor
    aux: tuple[Tensor, Tensor, Tensor, Tensor]
    has_aux: bool

    def arguments(self) -> tuple[Tensor, ...]:
        """Return the tensors in the order in which the kernels take them."""
        entries = (self.order, self.starts, self.tokens, self.values, self.g_values)
        return (*entries, self.a, self.g, *self.aux)


def group_by_latent(n_latents: int, whole: SparseGradient, dead: Tensor | None) -> LatentGradient:
    """Sort a batch's active entries by latent, tokens ascending; dead: (n_dead,) AuxK's latents."""
    active, parts = whole.active, len(whole.g) // max(1, len(whole.a))
    a = whole.a.repeat_interleave(parts, dim=0) if parts > 1 else whole.a
    indices = torch.where(active.values > 0, active.indices, n_latents)  # those at rest come last
    by_latent = torch_ops.group_by_latent(replace(active, indices=indices), n_latents + 1)
    values, g_values = (v[by_latent.order] for v in (active.values, whole.g_values))
    counts = by_latent.row_starts.diff()[:n_latents]
    order = torch.argsort(counts, descending=True, stable=True)
    aux = (counts, whole.g, whole.g, whole.g)
    has_aux = whole.aux is not None and dead is not None
    if whole.aux is not None and dead is not None:
        position = torch.full_like(counts, -1)
        position[dead] = torch.arange(len(dead), device=dead.device)
        aux = (position, whole.aux.dec, whole.aux.enc, whole.aux.b)
    entries = (by_latent.row_starts, by_latent.tokens, values, g_values)
    return LatentGradient(order, *entries, a, whole.g, aux, has_aux)


@triton.jit
def _gradient_row(
    tokens,
    weights,
    rows,
    start,
    end,
    aux_rows,
    aux_position,
    d_model,
    HAS_AUX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return (BLOCK_D,): Σ weight · rows[token] over a latent's entries, and AuxK's part."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, end, ROWS):
        entry = first + tl.arange(0, ROWS)
        token = tl.load(tokens + entry, entry < end, other=0)
        weight = tl.load(weights + entry, entry < end, other=0.0)
        part = load_rows(rows, token, entry < end, d_model, BLOCK_D)
        total += tl.sum(weight[:, None] * part, axis=0)
    if HAS_AUX:
        at = tl.arange(0, BLOCK_D)
        mask = at < tl.where(aux_position >= 0, d_model, 0)
        total += tl.load(aux_rows + aux_position * d_model + at, mask, other=0.0)
    return total


@triton.jit
def _project(gradient, direction):
    """Return the gradient without its component along a unit direction."""
    return gradient - tl.sum(gradient * direction, axis=0) * direction


@triton.jit
def _squares(
    order,
    starts,
    tokens,
    values,
    g_values,
    a,
    g,
    aux_positions,
    aux_dec,
    aux_enc,
    aux_b,
    w_dec,
    grad_b,
    squares,
    d_model,
    HAS_AUX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.load(order + tl.program_id(0))
    start, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    position = start * 0 - 1
    if HAS_AUX:
        position = tl.load(aux_positions + latent)
    if (end > start) | (position >= 0):
        at = tl.arange(0, BLOCK_D)
        parts = tl.zeros([BLOCK_D], tl.float32)
        for first in range(start, end, BLOCK_D):
            parts += tl.load(g_values + first + at, first + at < end, other=0.0)
        grad_bias = tl.sum(parts, axis=0)
        if HAS_AUX:
            grad_bias += tl.load(aux_b + position, position >= 0, other=0.0)
        direction = tl.load(w_dec + latent * d_model + at, at < d_model, other=0.0)
        dec = _gradient_row(
            tokens, values, g, start, end, aux_dec, position, d_model, HAS_AUX, ROWS, BLOCK_D
        )
        dec = _project(dec, direction)
        enc = _gradient_row(
            tokens, g_values, a, start, end, aux_enc, position, d_model, HAS_AUX, ROWS, BLOCK_D
        )
        total = tl.sum(dec * dec, axis=0) + tl.sum(enc * enc, axis=0) + grad_bias * grad_bias
        tl.store(grad_b + latent, grad_bias)
        tl.store(squares + latent, total)


def gradient_squares(gradient: LatentGradient, w_dec: Tensor) -> tuple[Tensor, Tensor]:
    """Return b_enc's gradient (n_latents,), and each latent's squared norm of all its gradients."""
    n_latents, d_model = w_dec.shape
    grad_b, squares = w_dec.new_zeros(n_latents), w_dec.new_zeros(n_latents)
    launch(
        *(_squares, (n_latents,), *gradient.arguments(), w_dec, grad_b, squares, d_model),
        HAS_AUX=gradient.has_aux,
        **row_shape(d_model),
    )
    return grad_b, squares


@triton.jit
def _adam(
    weight,
    gradient,
    first_at,
    second_at,
    mask,
    step_size,
    inverse_root,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
):
    """Move both moments, and return the moved weight."""
    first = tl.load(first_at, mask, other=0.0)
    second = tl.load(second_at, mask, other=0.0)
    first += (1 - BETA1) * (gradient - first)
    second = BETA2 * second + (1 - BETA2) * gradient * gradient
    tl.store(first_at, first, mask)
    tl.store(second_at, second, mask)
    return weight - step_size * first / (tl.sqrt(second) * inverse_root + EPS)


@triton.jit
def _update(
    order,
    starts,
    tokens,
    values,
    g_values,
    a,
    g,
    aux_positions,
    aux_dec,
    aux_enc,
    aux_b,
    w_enc,
    m_enc,
    v_enc,
    b_enc,
    m_b,
    v_b,
    w_dec,
    m_dec,
    v_dec,
    rounded,
    norms,
    grad_b,
    scale_at,
    step_size,
    inverse_root,
    d_model,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    LAZY: tl.constexpr,
    HAS_AUX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.load(order + tl.program_id(0))
    start, end, scale = tl.load(starts + latent), tl.load(starts + latent + 1), tl.load(scale_at)
    position = start * 0 - 1
    if HAS_AUX:
        position = tl.load(aux_positions + latent)
    if (end > start) | (position >= 0) | (not LAZY):
        columns = tl.arange(0, BLOCK_D)
        at, inside = latent * d_model + columns, columns < d_model
        weight = tl.load(w_dec + at, inside, other=0.0)
        grad = _gradient_row(
            tokens, values, g, start, end, aux_dec, position, d_model, HAS_AUX, ROWS, BLOCK_D
        )
        grad = scale * _project(grad, weight)
        weight = _adam(
            weight, grad, m_dec + at, v_dec + at, inside, step_size, inverse_root, BETA1, BETA2, EPS
        )
        weight = weight / tl.maximum(tl.sqrt(tl.sum(weight * weight, axis=0)), 1e-12)
        tl.store(w_dec + at, weight, inside)

        weight = tl.load(w_enc + at, inside, other=0.0)
        grad = scale * _gradient_row(
            tokens, g_values, a, start, end, aux_enc, position, d_model, HAS_AUX, ROWS, BLOCK_D
        )
        weight = _adam(
            weight, grad, m_enc + at, v_enc + at, inside, step_size, inverse_root, BETA1, BETA2, EPS
        )
        tl.store(w_enc + at, weight, inside)
        round_row(weight, rounded, norms, latent, d_model, BLOCK_D)

        bias, grad_bias = tl.load(b_enc + latent), scale * tl.load(grad_b + latent)
        bias = _adam(
            bias,
            grad_bias,
            m_b + latent,
            v_b + latent,
            latent >= 0,
            step_size,
            inverse_root,
            BETA1,
            BETA2,
            EPS,
        )
        tl.store(b_enc + latent, bias)


@dataclass(frozen=True)
class AdamStep:
    """Adam's constants at one step: step_size is lr / (1 − β₁ᵗ), inverse_root 1 / √(1 − β₂ᵗ).

    lazy: latents without a gradient stay as they are, weights and moments.
    """

    beta1: float
    beta2: float
    eps: float
    step_size: float
    inverse_root: float
    lazy: bool = False

    def move(self, weight: Tensor, first: Tensor, second: Tensor, gradient: Tensor) -> None:
        """Take the step on a small parameter, with torch."""
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        divisor = second.sqrt().mul_(self.inverse_root).add_(self.eps)
        weight.addcdiv_(first, divisor, value=-self.step_size)


def update(
    gradient: LatentGradient,
    parameters: list[tuple[Tensor, Tensor, Tensor]],
    rounded: tuple[Tensor, Tensor],
    grad_b: Tensor,
    scale: Tensor,
    step: AdamStep,
) -> None:
    """Take one Adam step on scale · gradient and give the decoder directions unit norm again.

    parameters: W_enc, b_enc and W_dec, each with Adam's two moments. rounded: W_enc in bfloat16
    (n_latents, d_model) and its rows' 4-norms (n_latents,), made anew. grad_b: (n_latents,).
    scale: (), clips the gradient.
    """
    n_latents, d_model = parameters[0][0].shape
    launch(
        *(_update, (n_latents,), *gradient.arguments()),
        *(tensor for parameter in parameters for tensor in parameter),
        *(*rounded, grad_b, scale, step.step_size, step.inverse_root, d_model),
        BETA1=step.beta1,
        BETA2=step.beta2,
        EPS=step.eps,
        LAZY=step.lazy,
        HAS_AUX=gradient.has_aux,
        **row_shape(d_model),
    )
