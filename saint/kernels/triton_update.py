"""The optimiser's pass in Triton: gradients, moments and weights are read once."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from saint.kernels.triton_gradient import LatentGradient
from saint.kernels.triton_ops import launch, round_row, row_shape


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
    BLOCK_D: tl.constexpr,
):
    latent, scale = tl.program_id(0).to(tl.int64), tl.load(scale_at)
    has_gradient = tl.load(touched + latent) > 0
    if has_gradient | (not LAZY):
        columns = tl.arange(0, BLOCK_D)
        at, inside = latent * d_model + columns, columns < d_model
        there = columns < tl.where(has_gradient, d_model, 0)
        weight = tl.load(w_dec + at, inside, other=0.0)
        grad = tl.load(dec + at, there, other=0.0) - tl.load(along + latent) * weight
        weight = _adam(
            weight,
            scale * grad,
            m_dec + at,
            v_dec + at,
            inside,
            step_size,
            inverse_root,
            BETA1,
            BETA2,
            EPS,
        )
        weight = weight / tl.maximum(tl.sqrt(tl.sum(weight * weight, axis=0)), 1e-12)
        tl.store(w_dec + at, weight, inside)

        weight = tl.load(w_enc + at, inside, other=0.0)
        grad = tl.load(enc + at, there, other=0.0)
        weight = _adam(
            weight,
            scale * grad,
            m_enc + at,
            v_enc + at,
            inside,
            step_size,
            inverse_root,
            BETA1,
            BETA2,
            EPS,
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
    scale: Tensor,
    step: AdamStep,
) -> None:
    """Take one Adam step on scale · gradient and give the decoder directions unit norm again.

    parameters: W_enc, b_enc and W_dec, each with Adam's two moments. rounded: W_enc in bfloat16
    (n_latents, d_model) and its rows' 4-norms (n_latents,), made anew.
    scale: (), clips the gradient.
    """
    n_latents, d_model = parameters[0][0].shape
    launch(
        *(_update, (n_latents,), gradient.touched, gradient.dec, gradient.enc),
        *(gradient.along, gradient.b),
        *(tensor for parameter in parameters for tensor in parameter),
        *(*rounded, scale, step.step_size, step.inverse_root, d_model),
        BETA1=step.beta1,
        BETA2=step.beta2,
        EPS=step.eps,
        LAZY=step.lazy,
        **row_shape(d_model),
    )
