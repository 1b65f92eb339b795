"""The fastest encoder and kernels that this machine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sae import ActiveLatents, TopKSparseAutoencoder
from saint.kernels import cpu
from saint.kernels.pieces import CpuKernels, Pieces, TorchKernels, largest
from saint.kernels.rounding import has_rounded_product
from saint.kernels.torch_encoder import Encoder
from saint.stage.errors import UserError, log

Encode = Callable[[Tensor], ActiveLatents]
"""As `TopKSparseAutoencoder.encode`."""

_LEAST_ROUNDED_D_MODEL = 256  # for shorter rows the error bound is wide, and there is little to win


def fastest_cpu_kernels(d_model: int) -> CpuKernels:
    """Multiply rounded numbers where that is faster. Raises UserError like `CpuKernels`."""
    rounded = d_model >= _LEAST_ROUNDED_D_MODEL and cpu.has_rounded_product()
    return CpuKernels(rounded=rounded)


def fastest_torch_kernels(device: torch.device) -> TorchKernels:
    """Multiply rounded numbers where the device is faster with them."""
    return TorchKernels(Encoder() if has_rounded_product(device) else None)


@torch.no_grad()
def encode(sae: TopKSparseAutoencoder, pieces: Pieces, x: Tensor) -> ActiveLatents:
    """As `TopKSparseAutoencoder.encode`, by the given pieces."""
    config, a = sae.config, x - sae.b_pre
    if config.activation == "topk":
        return sae.of_topk(largest(pieces, a, sae.W_enc, sae.b_enc, config.k))
    if config.activation == "gated" or (config.activation, config.threshold) == ("batchtopk", None):
        return TopKSparseAutoencoder.encode(sae, x)
    # Latents above a threshold are those above 0 once it is taken off the bias.
    threshold = sae.b_enc.new_tensor(config.threshold or 0.0)
    if sae.threshold is not None:
        threshold = sae.threshold.detach()
    threshold = threshold.clamp_min(0).expand(config.n_latents)
    above = pieces.above(a, sae.W_enc, sae.b_enc - threshold)
    indices = above.indices.long()
    return replace(above, values=above.values + threshold[indices], indices=indices)


def fastest_encode(sae: TopKSparseAutoencoder) -> Encode:
    """Return the `sae.encode` of `make_step("auto", …)`, for weights that stay as they are.

    Narrower weights are widened and multiplied in float32, by `sae.encode`.
    """
    if sae.W_enc.dtype != torch.float32:
        return sae.encode
    if sae.W_enc.device.type != "cpu":
        return partial(encode, sae, fastest_torch_kernels(sae.W_enc.device))
    try:
        return partial(encode, sae, fastest_cpu_kernels(sae.config.d_model))
    except UserError as error:
        log.info("encoder: torch's, since there is no faster one: %s", error)
        return sae.encode


def take_fastest_encoder(sae: TopKSparseAutoencoder) -> None:
    """Let an SAE whose weights stay as they are encode, and reconstruct, as a GPU does fastest.

    Does nothing where the device has no fast product of rounded numbers.
    """
    if sae.W_enc.dtype == torch.float32 and has_rounded_product(sae.W_enc.device):
        kernels = fastest_torch_kernels(sae.W_enc.device)
        sae.__dict__["encode"] = partial(encode, sae, kernels)  # before the class's
