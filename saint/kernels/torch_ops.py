"""Sparse pieces of the autoencoder: only the encoder's product touches every latent.

Activations are kept as `sae.ActiveLatents`. Nothing here has the size (n_tokens, n_latents) beyond
one block of rows, nor (n_active, d_model).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sae import ActiveLatents

MIN_NORMALISER = 1e-12
TopK = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""The k largest pre-activations of rows (n, d_model), after ReLU, and their latents: (n, k)."""


def decode(active: ActiveLatents, w_dec: Tensor) -> Tensor:
    """Return (n_tokens, d_model) sums of values · decoder rows; w_dec: (n_latents, d_model)."""
    return F.embedding_bag(
        active.indices,
        w_dec,
        active.offsets.to(active.indices.dtype),
        per_sample_weights=active.values,
        mode="sum",
        include_last_offset=True,
    )


def keep(values: Tensor, indices: Tensor, kept: Tensor) -> ActiveLatents:
    """Return the entries of (n_tokens, m) matrices that a bool mask keeps."""
    offsets = F.pad(kept.sum(dim=1).cumsum(0), (1, 0))
    return ActiveLatents(values[kept], indices[kept], offsets)


def concatenate(parts: Sequence[ActiveLatents]) -> ActiveLatents:
    """Return the tokens of several one after the other."""
    if len(parts) == 1:
        return parts[0]
    values = torch.cat([part.values for part in parts])
    indices = torch.cat([part.indices for part in parts])
    counts = torch.cat([part.offsets.diff() for part in parts])
    (k, *others) = {part.k for part in parts}
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return ActiveLatents(values, indices, offsets, None if others else k)


def at_least(top: TopK, a: Tensor, cut: Tensor, k: int, n_latents: int) -> ActiveLatents:
    """Return all latents whose pre-activation is at least a cut () and above 0.

    a: (n_tokens, d_model). k: how many of each token to look at first.
    """
    return complete(top, a, cut, top(a, min(k, n_latents)), n_latents)


def complete(
    top: TopK, a: Tensor, cut: Tensor, found: tuple[Tensor, Tensor], n_latents: int
) -> ActiveLatents:
    """As `at_least`, given what `top` found first.

    Where all that was found of a token is active there may be more: it is looked at again.
    """
    values, indices = found
    kept = (values >= cut) & (values > 0)
    k = values.shape[1]
    full = kept.all(dim=1) if k < n_latents else kept.new_zeros(len(kept))
    rest = torch.nonzero(full).squeeze(1)
    if not len(rest):
        return keep(values, indices, kept)
    kept[rest] = False
    again = at_least(top, a[rest], cut, 4 * k, n_latents)
    both = concatenate([keep(values, indices, kept), again])
    tokens = torch.cat([torch.arange(len(a), device=a.device), rest])[both.tokens()]
    order = torch.argsort(tokens, stable=True)
    counts = torch.bincount(tokens, minlength=len(a))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return ActiveLatents(both.values[order], both.indices[order], offsets)


def gather_dot(g: Tensor, active: ActiveLatents, w_dec: Tensor) -> Tensor:
    """Return (n_active,) dot products of g's rows with the decoder rows of their latents."""
    wanted = torch.sparse_csr_tensor(
        active.offsets,
        active.indices.to(active.offsets.dtype),
        g.new_zeros(len(active.values)),
        size=(len(active.offsets) - 1, w_dec.shape[0]),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(wanted, g, w_dec.T, beta=0.0).values()


def reconstruct(
    x: Tensor, active: ActiveLatents, w_dec: Tensor, b_pre: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decode, and go back to the activations.

    x: (n_tokens, d_model), the wanted outputs. The loss is factor / 2 · Σ_tokens ‖x̂ − x‖² / ‖x‖².
    Returns ∂loss/∂x̂ (n_tokens, d_model), ∂loss/∂values (n_active,), 0 at rest, ‖x̂ − x‖² and ‖x‖²
    (n_tokens,), and which latents are active on any token (n_latents,) bool.
    """
    g = decode(active, w_dec).add_(b_pre).sub_(x)
    squared = g.square().sum(dim=1)
    normaliser = x.square().sum(dim=1).clamp_min(MIN_NORMALISER * x.shape[1])
    g.mul_((factor / normaliser).unsqueeze(1))
    g_values = gather_dot(g, active, w_dec) * (active.values > 0)
    return g, g_values, squared, normaliser, fired_latents(active, w_dec.shape[0])


def fired_latents(active: ActiveLatents, n_latents: int) -> Tensor:
    """Return which latents are active on any token: (n_latents,) bool."""
    fired = torch.zeros(n_latents, dtype=torch.bool, device=active.values.device)
    fired[active.indices[active.values > 0].long()] = True
    return fired


@dataclass(frozen=True)
class ByLatent:
    """Entries of `ActiveLatents`, sorted by latent.

    order: (n_active,) their positions. tokens: (n_active,). row_starts: (n_latents + 1,) where
    each latent's entries begin.
    """

    order: Tensor
    tokens: Tensor
    row_starts: Tensor
    n_tokens: int


def group_by_latent(active: ActiveLatents, n_latents: int) -> ByLatent:
    """Sort entries by latent, stably: sums are deterministic."""
    indices = active.indices.long()
    order = torch.argsort(indices, stable=True)
    counts = torch.bincount(indices, minlength=n_latents)
    row_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tokens = active.tokens()[order]
    return ByLatent(order, tokens, row_starts, len(active.offsets) - 1)


def outer_by_latent(by_latent: ByLatent, values: Tensor, rows: Tensor) -> Tensor:
    """Return (n_latents, d_model): for each latent, the sum of value · rows[token].

    values: (n_active,), in the order that was grouped. rows: (n_tokens, d_model).
    """
    n_latents = len(by_latent.row_starts) - 1
    matrix = torch.sparse_csr_tensor(
        by_latent.row_starts,
        by_latent.tokens,
        values[by_latent.order],
        size=(n_latents, by_latent.n_tokens),
        check_invariants=False,
    )
    return matrix @ rows


def sum_by_latent(by_latent: ByLatent, values: Tensor) -> Tensor:
    """Return (n_latents,): for each latent, the sum of its values (n_active,)."""
    flat = values[by_latent.order]
    latents = torch.repeat_interleave(
        torch.arange(len(by_latent.row_starts) - 1, device=flat.device), by_latent.row_starts.diff()
    )
    # One entry after the other in latent order: the same sum every time, on the CPU.
    return flat.new_zeros(len(by_latent.row_starts) - 1).index_add_(0, latents, flat)
