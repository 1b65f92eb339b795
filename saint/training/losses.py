"""The autoencoder's losses and their gradients: densely by autograd, and from active latents only.

Source: Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sae import TopKSparseAutoencoder
from saint.kernels import torch_ops
from saint.kernels.pieces import AuxGradient, Pieces, SparseGradient, TorchKernels
from saint.kernels.torch_ops import MIN_NORMALISER


@dataclass(frozen=True)
class Losses:
    """One batch's losses and what the training loop counts; tensors stay on the device.

    loss: normalised MSE, mean over tokens. aux_loss: AuxK's, 0 where it was off.
    squared_error: Σ‖x − x̂‖². fired: (n_latents,) bool, latents active on any token.
    l0: mean number of active latents per token.
    """

    loss: Tensor
    aux_loss: Tensor
    squared_error: Tensor
    fired: Tensor
    l0: Tensor


@dataclass(frozen=True)
class AuxK:
    """The dead latents' auxiliary loss (Gao et al., sec. A.2).

    dead: (n_dead,) int64 latent indices. k: latents kept per token, at most n_dead.
    coefficient: its weight in the total loss. every: one in so many tokens takes part, and counts
    for as many, which bounds the cost where many latents are dead. first: the number of a
    micro-batch's first token, of which those that `every` divides take part.
    """

    dead: Tensor
    k: int
    coefficient: float
    every: int = 1
    first: int = 0

    @property
    def tokens(self) -> slice:
        """Which of a micro-batch's tokens take part."""
        return slice(-self.first % self.every, None, self.every)


def normalised_mse(error: Tensor, normaliser: Tensor) -> Tensor:
    """Sum over tokens of mean_d(error²) / normaliser; error (n, d_model), normaliser (n,)."""
    return (error.square().mean(dim=1) / normaliser.clamp_min(MIN_NORMALISER)).sum()


def losses_dense(
    sae: TopKSparseAutoencoder, x: Tensor, k: int, aux: AuxK | None
) -> tuple[Losses, Tensor]:
    """Return the losses and the differentiable total, as plain dense autograd: the reference.

    x: (n_tokens, d_model), standardised. The batch's tokens are weighted equally.
    """
    pre = sae.pre_activations(x)
    values, indices = pre.topk(k, dim=1)
    values = values.relu()
    hidden = torch.zeros_like(pre).scatter(1, indices, values)
    reconstruction = hidden @ sae.W_dec + sae.b_pre
    n_tokens = max(1, x.shape[0])
    loss = normalised_mse(reconstruction - x, x.square().mean(dim=1)) / n_tokens
    total, aux_loss = loss, torch.zeros_like(loss)
    if aux is not None and len(x[aux.tokens]):
        residual, dead_pre = (x - reconstruction).detach()[aux.tokens], pre[aux.tokens][:, aux.dead]
        dead_values, dead_indices = dead_pre.topk(aux.k, dim=1)
        dead_hidden = torch.zeros_like(dead_pre).scatter(1, dead_indices, dead_values.relu())
        error = dead_hidden @ sae.W_dec[aux.dead] - residual
        aux_loss = normalised_mse(error, residual.var(dim=1, correction=0)) * aux.every / n_tokens
        total = loss + aux.coefficient * aux_loss
    with torch.no_grad():
        fired = torch.zeros(sae.config.n_latents, dtype=torch.bool, device=x.device)
        fired[indices[values > 0]] = True
        losses = Losses(
            loss.detach(),
            aux_loss.detach(),
            (reconstruction - x).square().sum(),
            fired,
            (values > 0).sum() / max(1, x.shape[0]),
        )
    return losses, total


@torch.no_grad()
def sparse_gradient(
    sae: TopKSparseAutoencoder,
    x: Tensor,
    k: int,
    aux: AuxK | None,
    pieces: Pieces,
    *,
    weight: float = 1.0,
) -> tuple[Losses, SparseGradient]:
    """Compute the losses and gradients of standardised x (n_tokens, d_model).

    weight: factor on the gradients, a micro-batch's share of the batch.
    """
    n_tokens, x = max(1, x.shape[0]), x.contiguous()
    a = x - sae.b_pre
    values, indices = pieces.encode(a, sae.W_enc, sae.b_enc, k)
    factor = 2.0 * weight / n_tokens
    g, g_values, squared, normaliser, fired = pieces.reconstruct(
        x, values, indices, sae.W_dec, sae.b_pre, factor
    )
    aux_loss, aux_gradient = x.new_zeros(()), None
    if aux is not None:
        some = aux.tokens
        residual = g[some] * (normaliser[some] / -factor).unsqueeze(1)
        share = weight * aux.every / n_tokens
        aux_loss, aux_gradient = _aux_gradient(sae, a[some], residual, aux, share)
        aux_loss = aux_loss * aux.every / n_tokens
    losses = Losses(
        (squared / normaliser).sum() / n_tokens,
        aux_loss,
        squared.sum(),
        fired,
        (values > 0).sum() / n_tokens,
    )
    return losses, SparseGradient(values, g_values, indices, a, g, aux_gradient)


def _aux_gradient(
    sae: TopKSparseAutoencoder,
    a: Tensor,
    residual: Tensor,
    aux: AuxK,
    weight: float,
) -> tuple[Tensor, AuxGradient]:
    """Return AuxK's loss, and weight times its gradients; both sums over tokens.

    It is a small dense autoencoder of the dead latents alone.
    """
    w_dec = sae.W_dec[aux.dead]
    hidden = torch.addmm(sae.b_enc[aux.dead], a, sae.W_enc[aux.dead].T)
    if aux.k < len(aux.dead):
        largest, kept = hidden.topk(aux.k, dim=1, sorted=False)
        hidden = torch.zeros_like(hidden).scatter_(1, kept, largest)
    hidden.relu_()
    error = torch.mm(hidden, w_dec).sub_(residual)
    normaliser = residual.var(dim=1, correction=0).clamp_min(MIN_NORMALISER)
    loss = (error.square().mean(dim=1) / normaliser).sum()
    factor = 2.0 * weight * aux.coefficient / (residual.shape[1] * normaliser)
    g = error.mul_(factor.unsqueeze(1))
    g_hidden = torch.mm(g, w_dec.T).mul_(hidden > 0)
    return loss, AuxGradient(hidden.T @ g, g_hidden.T @ a, g_hidden.sum(dim=0))


@torch.no_grad()
def add_to_grad(sae: TopKSparseAutoencoder, gradient: SparseGradient, aux: AuxK | None) -> None:
    """Sum a sparse gradient over its tokens into the parameters' dense `.grad`."""
    by_latent = torch_ops.group_by_latent(gradient.indices, sae.config.n_latents)
    dec = torch_ops.outer_by_latent(by_latent, gradient.values, gradient.g)
    enc = torch_ops.outer_by_latent(by_latent, gradient.g_values, gradient.a)
    b_enc = torch_ops.sum_by_latent(by_latent, gradient.g_values)
    if aux is not None and gradient.aux is not None:
        dec.index_add_(0, aux.dead, gradient.aux.dec)
        enc.index_add_(0, aux.dead, gradient.aux.enc)
        b_enc.index_add_(0, aux.dead, gradient.aux.b)
    # b_pre also enters every pre-activation, through W_enc · (x − b_pre).
    b_pre = gradient.g.sum(dim=0) - b_enc @ sae.W_enc
    _accumulate(sae.W_dec, dec)
    _accumulate(sae.W_enc, enc)
    _accumulate(sae.b_enc, b_enc)
    _accumulate(sae.b_pre, b_pre)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def losses_and_gradients(
    sae: TopKSparseAutoencoder,
    x: Tensor,
    k: int,
    aux: AuxK | None,
    *,
    kernel: Literal["sparse", "dense"],
    weight: float = 1.0,
) -> Losses:
    """Compute the losses of standardised x (n_tokens, d_model) and add gradients to `.grad`.

    weight: factor on the gradients, a micro-batch's share of the batch. "sparse" touches the
    active latents only and equals "dense" (autograd) up to rounding.
    """
    if kernel == "dense":
        losses, total = losses_dense(sae, x, k, aux)
        (weight * total).backward()
        return losses
    losses, gradient = sparse_gradient(sae, x, k, aux, TorchKernels(), weight=weight)
    add_to_grad(sae, gradient, aux)
    return losses
