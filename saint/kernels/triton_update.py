"""The optimiser's pass in Triton: gradients, moments and weights are read once."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from saint.kernels.triton_gradient import LatentGradient
from saint.kernels.triton_ops import launch, round_row, row_shape


@dataclass(frozen=True)
class Codes:
    """What moments in 8 bits have beside their codes; `training.moments` has the format.

    enc, dec: (2, n_latents), the scales of W_enc's and W_dec's moments. keys: (2,) int64, with
    which their rows' numbers are hashed.
    """

    enc: Tensor
    dec: Tensor
    keys: Tensor


@triton.jit
def _adam(
    weight,
    first,
    second,
    gradient,
    step_size,
    inverse_root,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
):
    """Return the moved weight and both moments."""
    first += (1 - BETA1) * (gradient - first)
    second = BETA2 * second + (1 - BETA2) * gradient * gradient
    return weight - step_size * first / (tl.sqrt(second) * inverse_root + EPS), first, second


@triton.jit
def _load_moments(first_at, second_at, mask, scales_at, n_latents, CODED: tl.constexpr):
    """Return both moments of a row."""
    first = tl.load(first_at, mask, other=0).to(tl.float32)
    second = tl.load(second_at, mask, other=0).to(tl.float32)
    if CODED:
        first = first / 127
        first = first * tl.abs(first) * tl.load(scales_at)
        second = (second / 255) * (second / 255)
        second = second * second * tl.load(scales_at + n_latents)
    return first, second


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _share(moment):
    """Return a row's moments (at least 0) as shares of the largest, and that, the scale."""
    scale = tl.max(moment, axis=0)
    scale = tl.where(scale < 1e-30, 0.0, scale)  # pyright: ignore[reportOperatorIssue]
    return tl.where(scale > 0, moment / tl.maximum(scale, 1e-30), 0.0), scale


@triton.jit
def _store_moments(
    first,
    second,
    first_at,
    second_at,
    columns,
    mask,
    scales_at,
    n_latents,
    latent,
    key_at,
    CODED: tl.constexpr,
):
    """Store both moments of a row; key_at: where the hash of step and matrix is, where coded."""
    if CODED:
        key = _mix(tl.load(key_at).to(tl.uint32) ^ latent.to(tl.uint32))
        h = _mix(columns.to(tl.uint32) + key)
        share, scale = _share(tl.abs(first))
        tl.store(scales_at, scale)
        low = tl.minimum(tl.floor(tl.sqrt(share) * 127), 126.0)
        below, above = (low / 127) * (low / 127), ((low + 1) / 127) * ((low + 1) / 127)
        uniform = ((h >> 16).to(tl.float32) + 0.5) / 65536
        low = tl.where(uniform * (above - below) < share - below, low + 1, low)
        first = tl.where(first < 0, -low, low).to(tl.int8)

        share, scale = _share(second)
        tl.store(scales_at + n_latents, scale)
        low = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(share)) * 255), 254.0)
        below, above = (low / 255) * (low / 255), ((low + 1) / 255) * ((low + 1) / 255)
        below, above = below * below, above * above
        uniform = ((h & 0xFFFF).to(tl.float32) + 0.5) / 65536
        low = tl.where(uniform * (above - below) < share - below, low + 1, low)
        second = tl.where(share > 0, tl.maximum(low, 1.0), low).to(tl.uint8)
    tl.store(first_at, first, mask)
    tl.store(second_at, second, mask)


@triton.jit
def _moved_row(
    weight,
    grad,
    first_at,
    second_at,
    columns,
    mask,
    scales,
    n_latents,
    latent,
    key_at,
    step_size,
    inverse_root,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CODED: tl.constexpr,
):
    """Return a row after Adam's step, and store its moments."""
    first, second = _load_moments(first_at, second_at, mask, scales + latent, n_latents, CODED)
    weight, first, second = _adam(
        weight, first, second, grad, step_size, inverse_root, BETA1, BETA2, EPS
    )
    _store_moments(
        first,
        second,
        first_at,
        second_at,
        columns,
        mask,
        scales + latent,
        n_latents,
        latent,
        key_at,
        CODED,
    )
    return weight


@triton.jit
def _update(
    touched,
    dec,
    enc,
    along,
    grad_b,
    w_enc,
    m_enc,
    v_enc,
    b_enc,
    m_b,
    v_b,
    w_dec,
    m_dec,
    v_dec,
    s_enc,
    s_dec,
    keys,
    rounded,
    norms,
    scale_at,
    step_size,
    inverse_root,
    d_model,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    LAZY: tl.constexpr,
    CODED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent, scale = tl.program_id(0).to(tl.int64), tl.load(scale_at)
    n_latents = tl.num_programs(0)
    has_gradient = tl.load(touched + latent) > 0
    if has_gradient | (not LAZY):
        columns = tl.arange(0, BLOCK_D)
        at, inside = latent * d_model + columns, columns < d_model
        there = columns < tl.where(has_gradient, d_model, 0)
        weight = tl.load(w_dec + at, inside, other=0.0)
        grad = tl.load(dec + at, there, other=0.0) - tl.load(along + latent) * weight
        weight = _moved_row(
            weight,
            scale * grad,
            m_dec + at,
            v_dec + at,
            columns,
            inside,
            s_dec,
            n_latents,
            latent,
            keys + 1,
            step_size,
            inverse_root,
            BETA1,
            BETA2,
            EPS,
            CODED,
        )
        weight = weight / tl.maximum(tl.sqrt(tl.sum(weight * weight, axis=0)), 1e-12)
        tl.store(w_dec + at, weight, inside)

        weight = tl.load(w_enc + at, inside, other=0.0)
        grad = tl.load(enc + at, there, other=0.0)
        weight = _moved_row(
            weight,
            scale * grad,
            m_enc + at,
            v_enc + at,
            columns,
            inside,
            s_enc,
            n_latents,
            latent,
            keys + 0,
            step_size,
            inverse_root,
            BETA1,
            BETA2,
            EPS,
            CODED,
        )
        tl.store(w_enc + at, weight, inside)
        round_row(weight, rounded, norms, latent, d_model, BLOCK_D)

        bias, first, second = _adam(
            tl.load(b_enc + latent),
            tl.load(m_b + latent),
            tl.load(v_b + latent),
            scale * tl.load(grad_b + latent),
            step_size,
            inverse_root,
            BETA1,
            BETA2,
            EPS,
        )
        tl.store(m_b + latent, first)
        tl.store(v_b + latent, second)
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
    scale: Tensor,
    step: AdamStep,
    codes: Codes | None,
) -> None:
    """Take one Adam step on scale · gradient and give the decoder directions unit norm again.

    parameters: W_enc, b_enc and W_dec, each with Adam's two moments. rounded: W_enc in bfloat16
    (n_latents, d_model) and its rows' 4-norms (n_latents,), made anew.
    scale: (), clips the gradient. codes: where the matrices' moments are in 8 bits.
    """
    n_latents, d_model = parameters[0][0].shape
    launch(
        *(_update, (n_latents,), gradient.touched, gradient.dec, gradient.enc),
        *(gradient.along, gradient.b),
        *(tensor for parameter in parameters for tensor in parameter),
        *((codes.enc, codes.dec, codes.keys) if codes else (scale, scale, scale)),
        *(*rounded, scale, step.step_size, step.inverse_root, d_model),
        BETA1=step.beta1,
        BETA2=step.beta2,
        EPS=step.eps,
        LAZY=step.lazy,
        CODED=codes is not None,
        **row_shape(d_model),
    )
