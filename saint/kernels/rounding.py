"""How far a product of rows in bfloat16 can lie from the float32 one: the bound of both encoders.

Rounding a number to bfloat16 errs by at most u = 2⁻⁸ of it, by u²/3 in the mean square, and a
product of two rows a and w adds up d such errors of either side: σ² ≤ 2u²/3 · Σᵢ aᵢ²wᵢ², which is
at most 2u²/3 · ‖a‖₄² ‖w‖₄² (Cauchy-Schwarz) even where both have their outliers in the same places.
With 6σ, and u of the product itself for its own rounding, every pre-activation lies between two
bounds: product ± (FACTOR · ‖a‖₄ ‖w‖₄ + U · |product|). What is decided by them alone is certain
once every candidate's float32 score was seen to lie within its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)  # Ampere: products of bfloat16
U = 2.0**-8
FACTOR = 6 * math.sqrt(2 / 3) * U


def has_rounded_product(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32: GPUs since Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def product(a: Tensor, w: Tensor) -> Tensor:
    """Return a · wᵀ (n_tokens, n_latents) in bfloat16, summed in float32."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    flags.allow_bf16_reduced_precision_reduction = False  # partial sums would err by more than u
    try:
        return torch.mm(a, w.T)
    finally:
        flags.allow_bf16_reduced_precision_reduction = before


def fourth_norms(rows: Tensor) -> Tensor:
    """Return ‖row‖₄ (n,) of rows (n, d)."""
    return torch.linalg.vector_norm(rows, 4, dim=1)


def error_bound(products: Tensor, norms: Tensor) -> Tensor:
    """Return how far products may be off; norms: ‖a‖₄ ‖w‖₄ of each, or what broadcasts to it."""
    return (norms * FACTOR).add(products.abs(), alpha=U)
