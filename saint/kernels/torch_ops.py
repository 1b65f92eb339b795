"""Sparse pieces of the TopK autoencoder: only the encoder's product touches every latent.

Activations are kept as values (n_tokens, k) and indices (n_tokens, k). Nothing here has the size
(n_tokens, n_latents) beyond one block of rows, nor (n_tokens · k, d_model).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae import decode

MIN_NORMALISER = 1e-12


def gather_dot(g: Tensor, indices: Tensor, w_dec: Tensor) -> Tensor:
    """Return (n_tokens, k) dot products of g's rows with the decoder rows of their latents."""
    n_tokens, k = indices.shape
    wanted = torch.sparse_csr_tensor(
        torch.arange(0, n_tokens * k + 1, k, device=g.device),
        indices.reshape(-1),
        g.new_zeros(n_tokens * k),
        size=(n_tokens, w_dec.shape[0]),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(wanted, g, w_dec.T, beta=0.0).values().view(n_tokens, k)


def reconstruct(
    x: Tensor, values: Tensor, indices: Tensor, w_dec: Tensor, b_pre: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decode, and go back to the activations.

    x: (n_tokens, d_model), the wanted outputs. The loss is factor / 2 · Σ_tokens ‖x̂ − x‖² / ‖x‖².
    Returns ∂loss/∂x̂ (n_tokens, d_model), ∂loss/∂values (n_tokens, k), 0 where inactive, ‖x̂ − x‖²
    and ‖x‖² (n_tokens,), and which latents are active on any token (n_latents,) bool.
    """
    g = decode(values, indices, w_dec).add_(b_pre).sub_(x)
    squared = g.square().sum(dim=1)
    normaliser = x.square().sum(dim=1).clamp_min(MIN_NORMALISER * x.shape[1])
    g.mul_((factor / normaliser).unsqueeze(1))
    g_values = gather_dot(g, indices, w_dec) * (values > 0)
    fired = torch.zeros(w_dec.shape[0], dtype=torch.bool, device=x.device)
    fired[indices[values > 0]] = True
    return g, g_values, squared, normaliser, fired


@dataclass(frozen=True)
class ByLatent:
    """The entries of an (n_tokens, k) index matrix, sorted by latent.

    order: (n_tokens · k,) positions in the flattened matrix. tokens: their rows.
    row_starts: (n_latents + 1,) where each latent's entries begin.
    """

    order: Tensor
    tokens: Tensor
    row_starts: Tensor
    n_tokens: int


def group_by_latent(indices: Tensor, n_latents: int) -> ByLatent:
    """Sort the entries of indices (n_tokens, k) by latent, stably: sums are deterministic."""
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=n_latents)
    row_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tokens = torch.div(order, indices.shape[1], rounding_mode="floor")
    return ByLatent(order, tokens, row_starts, indices.shape[0])


def outer_by_latent(by_latent: ByLatent, values: Tensor, rows: Tensor) -> Tensor:
    """Return (n_latents, d_model): for each latent, the sum of value · rows[token].

    values: (n_tokens, k), in the order of the indices that were grouped. rows: (n_tokens, d_model).
    """
    n_latents = len(by_latent.row_starts) - 1
    matrix = torch.sparse_csr_tensor(
        by_latent.row_starts,
        by_latent.tokens,
        values.reshape(-1)[by_latent.order],
        size=(n_latents, by_latent.n_tokens),
        check_invariants=False,
    )
    return matrix @ rows


def sum_by_latent(by_latent: ByLatent, values: Tensor) -> Tensor:
    """Return (n_latents,): for each latent, the sum of its values (n_tokens, k)."""
    flat = values.reshape(-1)[by_latent.order]
    latents = torch.repeat_interleave(
        torch.arange(len(by_latent.row_starts) - 1, device=flat.device), by_latent.row_starts.diff()
    )
    # One entry after the other in latent order: the same sum every time, on the CPU.
    return flat.new_zeros(len(by_latent.row_starts) - 1).index_add_(0, latents, flat)
