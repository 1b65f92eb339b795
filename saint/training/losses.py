"""The autoencoder's losses and their gradients: densely by autograd, and from active latents only.

Source: Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sae import ActiveLatents, TopKSparseAutoencoder
from saint.kernels import torch_ops
from saint.kernels.pieces import (
    AuxGradient,
    Pieces,
    SparseGradient,
    among_largest,
    largest,
)
from saint.kernels.torch_ops import MIN_NORMALISER
from saint.stage.workers import Axis


@dataclass(frozen=True)
class Losses:
    """One batch's losses and what the training loop counts; tensors stay on the device.

    loss: normalised MSE, mean over tokens. aux_loss: AuxK's, 0 where it was off.
    squared_error: Σ‖x − x̂‖². fired: (n_latents,) bool, a rank's latents active on any token.
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

    dead: (n_dead,) int64 indices of a rank's latents. k: latents kept per token, at most the n_dead
    of all ranks.
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


@dataclass(frozen=True)
class Jump:
    """What moves JumpReLU's thresholds (Rajamanoharan et al., arXiv:2407.14435, sec. 3).

    For |z − θ| < bandwidth / 2 a threshold θ's derivative of its latent's activation z · H(z − θ)
    is taken to be −θ / bandwidth, and that of H(z − θ), whether it is active, −1 / bandwidth; else
    both are 0. bandwidth: in the units of pre-activations. price: () ∂loss/∂L0.
    """

    bandwidth: float
    price: Tensor


def normalised_mse(error: Tensor, normaliser: Tensor) -> Tensor:
    """Sum over tokens of mean_d(error²) / normaliser; error (n, d_model), normaliser (n,)."""
    return (error.square().mean(dim=1) / normaliser.clamp_min(MIN_NORMALISER)).sum()


def losses_dense(
    sae: TopKSparseAutoencoder,
    x: Tensor,
    chosen: ActiveLatents | int,
    aux: AuxK | None,
    prefixes: tuple[int, ...] = (),
    jump: Jump | None = None,
) -> tuple[Losses, Tensor]:
    """Return the losses and the differentiable total, as plain dense autograd: the reference.

    x: (n_tokens, d_model), standardised. The batch's tokens are weighted equally. chosen, prefixes,
    jump: see `sparse_gradient`.
    """
    ramps = x.new_zeros(())
    pre = sae.pre_activations(x)
    if isinstance(chosen, int):
        values, indices = pre.topk(chosen, dim=1)
        values = values.relu()
        hidden = torch.zeros_like(pre).scatter(1, indices, values)
    else:
        at = (chosen.tokens(), chosen.indices.long())
        values = torch.where(chosen.values > 0, pre[at], 0.0)
        if jump is not None and sae.threshold is not None:
            levels = sae.threshold[at[1]]
            ramp = (levels - levels.detach()) / -jump.bandwidth  # 0, but for its derivative
            ramp = torch.where(chosen.values - levels < jump.bandwidth / 2, ramp, 0.0)
            values, ramps = values + levels.detach() * ramp, ramp.sum()
        hidden = torch.zeros_like(pre).index_put(at, values)
    n_tokens, normaliser = max(1, x.shape[0]), x.square().mean(dim=1)
    parts, reconstruction = [], x
    for end in prefixes or (len(sae.W_dec),):
        reconstruction = hidden[:, :end] @ sae.W_dec[:end] + sae.b_pre
        parts.append(normalised_mse(reconstruction - x, normaliser) / n_tokens)
    loss = torch.stack(parts).mean()
    total, aux_loss = loss, torch.zeros_like(loss)
    if jump is not None:
        total = loss + jump.price * ramps / n_tokens
    if aux is not None and len(x[aux.tokens]):
        residual, dead_pre = (x - reconstruction).detach()[aux.tokens], pre[aux.tokens][:, aux.dead]
        dead_values, dead_indices = dead_pre.topk(aux.k, dim=1)
        dead_hidden = torch.zeros_like(dead_pre).scatter(1, dead_indices, dead_values.relu())
        error = dead_hidden @ sae.W_dec[aux.dead] - residual
        aux_loss = normalised_mse(error, residual.var(dim=1, correction=0)) * aux.every / n_tokens
        total = total + aux.coefficient * aux_loss
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
    jump: Jump | None = None,
    weight: float = 1.0,
) -> tuple[Losses, SparseGradient]:
    """Compute the losses and gradients of standardised x (n_tokens, d_model).

    chosen: the active latents, or how many of each token's largest are. prefixes: sizes of nested
    dictionaries whose losses are averaged, the last all of it; () is only all of it. jump: where
    thresholds are learned; chosen then has, beside what is active, entries of 0 for whatever lies
    less than half the bandwidth below its threshold. weight: factor on the gradients, a
    micro-batch's share of the batch.
    """
    n_tokens, n, x = max(1, x.shape[0]), max(1, len(prefixes)), x.contiguous()
    a = x - sae.b_pre
    if isinstance(chosen, int):
        chosen = largest(pieces, a, sae.W_enc, sae.b_enc, chosen)
    if n > 1:
        chosen = pieces.nest(chosen, prefixes)
    factor = 2.0 * weight / n_tokens / n
    g, g_values, squared, normaliser, fired = pieces.reconstruct(
        *(x, chosen, sae.W_dec, sae.b_pre, factor), parts=n, at_rest=jump is not None
    )
    by_part = g.view(x.shape[0], n, x.shape[1])
    g_b_pre = by_part[:, 0].sum(dim=0)
    if pieces.ranks.rank:  # once is enough: it is summed over the ranks
        g_b_pre.zero_()
    gradient = SparseGradient(chosen, g_values, a, g, g_b_pre)
    if jump is not None and sae.threshold is not None:
        threshold = _threshold_gradient(sae.threshold, chosen, g_values, jump, weight / n_tokens)
        g_values = g_values * (chosen.values > 0)
        gradient = replace(gradient, g_values=g_values, threshold=threshold)
    aux_loss = x.new_zeros(())
    if aux is not None:
        some, share = aux.tokens, weight * aux.every / n_tokens
        residual = by_part[some, -1] * (normaliser[some] / -factor).unsqueeze(1)
        aux_loss, aux_gradient = _aux_gradient(sae, a[some], residual, aux, share, pieces.ranks)
        gradient = replace(gradient, aux=aux_gradient)
        aux_loss = aux_loss * aux.every / n_tokens
    loss = (squared.mean(dim=1) / normaliser).sum() / n_tokens
    l0 = pieces.ranks.sum((chosen.values > 0).sum()) / n_tokens
    return Losses(loss, aux_loss, squared[:, -1].sum(), fired, l0), gradient


def _threshold_gradient(
    threshold: Tensor, chosen: ActiveLatents, g_values: Tensor, jump: Jump, share: float
) -> Tensor:
    """Return thresholds' gradient (n_latents,); g_values: also of entries that are 0.

    share: a token's of the batch.
    """
    indices = chosen.indices.long()
    levels = threshold[indices]
    near = chosen.values - levels < jump.bandwidth / 2
    pull = (levels * g_values + jump.price * share) * (near / -jump.bandwidth)
    by_latent = torch_ops.group_by_latent(chosen, len(threshold))
    return torch_ops.sum_by_latent(by_latent, pull)


def _aux_gradient(
    sae: TopKSparseAutoencoder,
    a: Tensor,
    residual: Tensor,
    aux: AuxK,
    weight: float,
    ranks: Axis,
) -> tuple[Tensor, AuxGradient]:
    """Return AuxK's loss, and weight times its gradients; both sums over tokens.

    It is a small dense autoencoder of the dead latents alone.
    """
    w_dec = sae.W_dec[aux.dead]
    hidden = torch.addmm(sae.b_enc[aux.dead], a, sae.W_enc[aux.dead].T)
    if ranks.size > 1:
        hidden = _kept_on_ranks(hidden, aux.k, ranks)
    elif aux.k < len(aux.dead):
        values, kept = hidden.topk(aux.k, dim=1, sorted=False)
        hidden = torch.zeros_like(hidden).scatter_(1, kept, values)
    hidden.relu_()
    error = ranks.sum(torch.mm(hidden, w_dec)).sub_(residual)
    normaliser = residual.var(dim=1, correction=0).clamp_min(MIN_NORMALISER)
    loss = (error.square().mean(dim=1) / normaliser).sum()
    factor = 2.0 * weight * aux.coefficient / (residual.shape[1] * normaliser)
    g = error.mul_(factor.unsqueeze(1))
    g_hidden = torch.mm(g, w_dec.T).mul_(hidden > 0)
    return loss, AuxGradient(hidden.T @ g, g_hidden.T @ a, g_hidden.sum(dim=0))


def _kept_on_ranks(hidden: Tensor, k: int, ranks: Axis) -> Tensor:
    """Return hidden (n_tokens, n_dead), of this rank's latents, but for each token's k largest 0.

    The k largest are those of all ranks.
    """
    values, places = hidden.topk(min(k, hidden.shape[1]), dim=1, sorted=False)
    values = torch.where(among_largest(values, k, ranks), values, 0.0)
    return torch.zeros_like(hidden).scatter_(1, places, values)


@torch.no_grad()
def add_to_grad(sae: TopKSparseAutoencoder, gradient: SparseGradient, aux: AuxK | None) -> None:
    """Sum a sparse gradient over its tokens into the parameters' dense `.grad`."""
    by_latent = torch_ops.group_by_latent(gradient.active, sae.config.n_latents)
    dec = torch_ops.outer_by_latent(by_latent, gradient.active.values, gradient.g)
    by_token = by_latent.of_tokens(len(gradient.a))
    enc = torch_ops.outer_by_latent(by_token, gradient.g_values, gradient.a)
    b_enc = torch_ops.sum_by_latent(by_latent, gradient.g_values)
    if aux is not None and gradient.aux is not None:
        parts = (gradient.aux.dec, gradient.aux.enc, gradient.aux.b)
        for whole, part in zip((dec, enc, b_enc), parts, strict=True):
            whole[aux.dead] += part
    # b_pre also enters every pre-activation, through W_enc · (x − b_pre).
    b_pre = gradient.g_b_pre - b_enc @ sae.W_enc
    _accumulate(sae.W_dec, dec)
    _accumulate(sae.W_enc, enc)
    _accumulate(sae.b_enc, b_enc)
    _accumulate(sae.b_pre, b_pre)
    if sae.threshold is not None and gradient.threshold is not None:
        _accumulate(sae.threshold, gradient.threshold)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
