"""The fastest exact encoder that this machine has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sae import ActiveLatents, TopKSparseAutoencoder
from saint.kernels import cpu
from saint.kernels.pieces import CpuKernels, Pieces
from saint.stage.errors import UserError, log

Encode = Callable[[Tensor], ActiveLatents]
"""As `TopKSparseAutoencoder.encode`."""


_LEAST_ROUNDED_D_MODEL = 256  # for shorter rows the error bound is wide, and there is little to win


def fastest_cpu_kernels(d_model: int) -> CpuKernels:
    """Multiply rounded numbers where that is faster. Raises UserError like `CpuKernels`."""
    rounded = d_model >= _LEAST_ROUNDED_D_MODEL and cpu.has_rounded_product()
    return CpuKernels(rounded=rounded)


@torch.no_grad()
def encode(sae: TopKSparseAutoencoder, pieces: Pieces, x: Tensor) -> ActiveLatents:
    """As `TopKSparseAutoencoder.encode` of a topk, by the given pieces."""
    return sae.of_topk(*pieces.encode(x - sae.b_pre, sae.W_enc, sae.b_enc, sae.config.k))


def fastest_encode(sae: TopKSparseAutoencoder) -> Encode:
    """Return the `sae.encode` of `make_step("auto", …)`, for weights that stay as they are."""
    fixed = sae.config.activation == "topk" and sae.W_enc.dtype == torch.float32
    if sae.W_enc.device.type != "cpu" or not fixed:
        return sae.encode
    try:
        return partial(encode, sae, fastest_cpu_kernels(sae.config.d_model))
    except UserError as error:
        log.info("encoder: torch's, since there is no faster one: %s", error)
        return sae.encode
