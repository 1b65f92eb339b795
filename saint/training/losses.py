"""The autoencoder's losses and their gradients: densely by autograd, and from active latents only.

Source: Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from sae import ActiveLatents, TopKSparseAutoencoder
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
    sae: TopKSparseAutoencoder,
    x: Tensor,
    chosen: ActiveLatents | int,
    aux: AuxK | None,
    prefixes: tuple[int, ...] = (),
) -> tuple[Losses, Tensor]:
    """Return the losses and the differentiable total, as plain dense autograd: the reference.

    x: (n_tokens, d_model), standardised. The batch's tokens are weighted equally. chosen, prefixes:
    see `sparse_gradient`.
    """
    pre = sae.pre_activations(x)
    if isinstance(chosen, int):
        values, indices = pre.topk(chosen, dim=1)
        values = values.relu()
        hidden = torch.zeros_like(pre).scatter(1, indices, values)
    else:
        at = (chosen.tokens(), chosen.indices.long())
        hidden = torch.zeros_like(pre).index_put(at, pre[at].relu())
    n_tokens, normaliser = max(1, x.shape[0]), x.square().mean(dim=1)
    parts, reconstruction = [], x
    for end in prefixes or (len(sae.W_dec),):
        reconstruction = hidden[:, :end] @ sae.W_dec[:end] + sae.b_pre
        parts.append(normalised_mse(reconstruction - x, normaliser) / n_tokens)
    loss = torch.stack(parts).mean()
    total, aux_loss = loss, torch.zeros_like(loss)
    if aux is not None and len(x[aux.tokens]):
        residual, dead_pre = (x - reconstruction).detach()[aux.tokens], pre[aux.tokens][:, aux.dead]
        dead_values, dead_indices = dead_pre.topk(aux.k, dim=1)
        dead_hidden = torch.zeros_like(dead_pre).scatter(1, dead_indices, dead_values.relu())
        error = dead_hidden @ sae.W_dec[aux.dead] - residual
        aux_loss = normalised_mse(error, residual.var(dim=1, correction=0)) * aux.every / n_tokens
        total = loss + aux.coefficient * aux_loss
    with torch.no_grad():
        active = hidden > 0
        losses = Losses(
            loss.detach(),
            aux_loss.detach(),
            (reconstruction - x).square().sum(),
            active.any(dim=0),
            active.sum() / n_tokens,
        )
    return losses, total


@torch.no_grad()
def sparse_gradient(
    sae: TopKSparseAutoencoder,
    x: Tensor,
    chosen: ActiveLatents | int,
    aux: AuxK | None,
    pieces: Pieces,
    *,
    prefixes: tuple[int, ...] = (),
    weight: float = 1.0,
) -> tuple[Losses, SparseGradient]:
    """Compute the losses and gradients of standardised x (n_tokens, d_model).

    chosen: the active latents, or how many of each token's largest are. prefixes: sizes of nested
    dictionaries whose losses are averaged, the last all of it; () is only all of it. weight: factor
    on the gradients, a micro-batch's share of the batch.
    """
    n_tokens, x = max(1, x.shape[0]), x.contiguous()
    a = x - sae.b_pre
    if isinstance(chosen, int):
        chosen = ActiveLatents.of_matrices(*pieces.encode(a, sae.W_enc, sae.b_enc, chosen))
    factor = 2.0 * weight / n_tokens
    if len(prefixes) > 1:
        found = _reconstruct_nested(sae, x, a, chosen, prefixes, factor)
        loss, squared, residual_of, gradient = found
        fired = torch_ops.fired_latents(chosen, sae.config.n_latents)
    else:
        g, g_values, squared, normaliser, fired = pieces.reconstruct(
            x, chosen, sae.W_dec, sae.b_pre, factor
        )
        loss = (squared / normaliser).sum()
        gradient = SparseGradient(chosen, g_values, a, g, g.sum(dim=0), None)
        residual_of = partial(_residual, g, normaliser, factor)
    aux_loss = x.new_zeros(())
    if aux is not None:
        some, share = aux.tokens, weight * aux.every / n_tokens
        aux_loss, aux_gradient = _aux_gradient(sae, a[some], residual_of(some), aux, share)
        gradient = replace(gradient, aux=aux_gradient)
        aux_loss = aux_loss * aux.every / n_tokens
    l0 = (chosen.values > 0).sum() / n_tokens
    return Losses(loss / n_tokens, aux_loss, squared.sum(), fired, l0), gradient


def _residual(g: Tensor, normaliser: Tensor, factor: float, some: slice) -> Tensor:
    """Return x − x̂ of some tokens, from ∂loss/∂x̂."""
    return g[some] * (normaliser[some] / -factor).unsqueeze(1)


def _reconstruct_nested(
    sae: TopKSparseAutoencoder,
    x: Tensor,
    a: Tensor,
    active: ActiveLatents,
    prefixes: tuple[int, ...],
    factor: float,
) -> tuple[Tensor, Tensor, Callable[[slice], Tensor], SparseGradient]:
    """Return Σ loss, ‖x̂ − x‖² (n_tokens,) and x − x̂ (by tokens) of all latents, and the gradient.

    Each token stands in the gradient once for each prefix's own latents: those see the sum of the
    errors' gradients of that prefix and all longer ones.
    """
    n_tokens, n = x.shape[0], len(prefixes)
    ends = torch.tensor(prefixes, device=x.device)
    row = active.tokens() * n + torch.bucketize(active.indices.long(), ends, right=True)
    order = torch.argsort(row, stable=True)
    counts = torch.bincount(row, minlength=n_tokens * n)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    spread = ActiveLatents(active.values[order], active.indices[order], offsets)
    error = torch_ops.decode(spread, sae.W_dec).view(n_tokens, n, x.shape[1]).cumsum(dim=1)
    error += (sae.b_pre - x).unsqueeze(1)
    squared = error.square().sum(dim=2)
    normaliser = x.square().sum(dim=1).clamp_min(MIN_NORMALISER * x.shape[1])
    g = error * (factor / n / normaliser)[:, None, None]
    seen = g.flip(1).cumsum(dim=1).flip(1).contiguous()
    rows = seen.view(n_tokens * n, x.shape[1])
    g_values = torch_ops.gather_dot(rows, spread, sae.W_dec) * (spread.values > 0)
    gradient = SparseGradient(
        *(spread, g_values, a.repeat_interleave(n, dim=0), rows, seen[:, 0].sum(dim=0), None)
    )
    loss = (squared.mean(dim=1) / normaliser).sum()
    return loss, squared[:, -1], (-error[:, -1]).__getitem__, gradient


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
    by_latent = torch_ops.group_by_latent(gradient.active, sae.config.n_latents)
    dec = torch_ops.outer_by_latent(by_latent, gradient.active.values, gradient.g)
    enc = torch_ops.outer_by_latent(by_latent, gradient.g_values, gradient.a)
    b_enc = torch_ops.sum_by_latent(by_latent, gradient.g_values)
    if aux is not None and gradient.aux is not None:
        dec.index_add_(0, aux.dead, gradient.aux.dec)
        enc.index_add_(0, aux.dead, gradient.aux.enc)
        b_enc.index_add_(0, aux.dead, gradient.aux.b)
    # b_pre also enters every pre-activation, through W_enc · (x − b_pre).
    b_pre = gradient.g_b_pre - b_enc @ sae.W_enc
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
    chosen: ActiveLatents | int,
    aux: AuxK | None,
    *,
    kernel: Literal["sparse", "dense"],
    prefixes: tuple[int, ...] = (),
    weight: float = 1.0,
) -> Losses:
    """Compute the losses of standardised x (n_tokens, d_model) and add gradients to `.grad`.

    chosen, prefixes, weight: see `sparse_gradient`. "sparse" touches the active latents only and
    equals "dense" (autograd) up to rounding.
    """
    if kernel == "dense":
        losses, total = losses_dense(sae, x, chosen, aux, prefixes)
        (weight * total).backward()
        return losses
    losses, gradient = sparse_gradient(
        sae, x, chosen, aux, TorchKernels(), prefixes=prefixes, weight=weight
    )
    add_to_grad(sae, gradient, aux)
    return losses
