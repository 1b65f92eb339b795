"""Sparse pieces of the autoencoder: only the encoder's product touches every latent.

Activations are kept as `sae.ActiveLatents`. Nothing here has the size (n_tokens, n_latents) beyond
one block of rows, nor (n_active, d_model).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sae import BLOCK_ELEMENTS, ActiveLatents

MIN_NORMALISER = 1e-12
TopK = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""The k largest pre-activations of rows (n, d_model), after ReLU, and their latents: (n, k)."""
Decode = Callable[[ActiveLatents, Tensor], Tensor]
GatherDot = Callable[[Tensor, ActiveLatents, Tensor], Tensor]


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


def places_of(mask: Tensor, n: int) -> Tensor:
    """Return where a mask (m,) is true, (n,) int64; n: how often, which the host must know."""
    # Each one's place is written at its number; all others' at n, which is left out.
    numbers = torch.where(mask, mask.cumsum(0) - 1, n)
    places = torch.arange(len(mask), device=mask.device)
    return places.new_empty(n + 1).scatter_(0, numbers, places)[:n]


def keep(values: Tensor, indices: Tensor, kept: Tensor, n: int) -> ActiveLatents:
    """Return the n entries of (n_tokens, m) matrices that a bool mask keeps."""
    places, offsets = places_of(kept.flatten(), n), F.pad(kept.sum(dim=1).cumsum(0), (1, 0))
    return ActiveLatents(values.flatten()[places], indices.flatten()[places], offsets)


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


def complete(
    top: TopK, a: Tensor, cut: Tensor, found: tuple[Tensor, Tensor], n_latents: int
) -> ActiveLatents:
    """Return all latents whose pre-activation is at least a cut () and above 0.

    a: (n_tokens, d_model). found: some of each token's largest, by `top`. Where all of a token's
    are active there may be more: it is looked at again.
    """
    values, indices = found
    kept = (values >= cut) & (values > 0)
    k = values.shape[1]
    full = kept.all(dim=1) if k < n_latents else kept.new_zeros(len(kept))
    kept &= ~full.unsqueeze(1)
    n_full, n_kept = torch.stack([full.sum(), kept.sum()]).tolist()
    if not n_full:
        return keep(values, indices, kept, n_kept)
    rest = places_of(full, n_full)
    wider = top(a[rest], min(4 * k, n_latents))
    return fill(
        keep(values, indices, kept, n_kept), rest, complete(top, a[rest], cut, wider, n_latents)
    )


def fill(active: ActiveLatents, rest: Tensor, theirs: ActiveLatents) -> ActiveLatents:
    """Give the tokens `rest` (n,), which have no entries, those of `theirs`, in their order."""
    both = concatenate([active, theirs])
    n_tokens = len(active.offsets) - 1
    tokens = torch.cat([torch.arange(n_tokens, device=rest.device), rest])[both.tokens()]
    return _in_rows(both, tokens, n_tokens)


def above(a: Tensor, w_enc: Tensor, bias: Tensor) -> ActiveLatents:
    """Return where a · w_encᵀ + bias exceeds 0, and by how much.

    a: (n_tokens, d_model). w_enc: (n_latents, d_model). bias: (n_latents,).
    """
    values, indices, counts = [], [], [torch.zeros(1, dtype=torch.int64, device=a.device)]
    for rows in a.split(max(1, BLOCK_ELEMENTS // len(w_enc))):
        pre = torch.addmm(bias, rows, w_enc.T)
        kept = pre > 0
        counts.append(kept.sum(dim=1))
        indices.append(kept.nonzero()[:, 1])
        values.append(pre[kept])
    return ActiveLatents(torch.cat(values), torch.cat(indices), torch.cat(counts).cumsum(0))


def above_by(
    encode: Callable[..., tuple[Tensor, Tensor]], k: int
) -> Callable[[Tensor, Tensor, Tensor], ActiveLatents]:
    """Return `above`, made of an encoder like `sae.encode` that looks at k latents first."""

    def find(a: Tensor, w_enc: Tensor, bias: Tensor) -> ActiveLatents:
        def top(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
            return encode(rows, w_enc, bias, k)

        found = top(a, min(k, len(w_enc)))
        return complete(top, a, a.new_zeros(()), found, len(w_enc))

    return find


def gather_dot(g: Tensor, active: ActiveLatents, weight: Tensor) -> Tensor:
    """Return (n_active,) dot products of g's rows with the weight rows of their latents.

    It is what `decode` has as its values' gradient: the rows are never stored side by side.
    """
    indices = active.indices.long()
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g, weight.detach(), indices, active.offsets, active.tokens(), 0
    )


def nest(active: ActiveLatents, prefixes: Sequence[int]) -> ActiveLatents:
    """Give each token as many rows as there are nested dictionaries, of the latents each adds.

    prefixes: the dictionaries' sizes, ascending, the last all latents.
    """
    n, n_tokens = len(prefixes), len(active.offsets) - 1
    ends = torch.tensor(prefixes, device=active.indices.device)
    row = active.tokens() * n + torch.bucketize(active.indices.long(), ends, right=True)
    return _in_rows(active, row, n_tokens * n)


def _in_rows(entries: ActiveLatents, row: Tensor, n_rows: int) -> ActiveLatents:
    """Sort entries into rows, given each one's; stably."""
    order = torch.argsort(row, stable=True)
    offsets = _starts(row[order], n_rows)
    return ActiveLatents(entries.values[order], entries.indices[order], offsets)


def _starts(ascending: Tensor, n: int) -> Tensor:
    """Return (n + 1,) where each of the numbers 0 to n begins in an ascending list."""
    return torch.searchsorted(ascending, torch.arange(n + 1, device=ascending.device))


def reconstruct(
    x: Tensor,
    active: ActiveLatents,
    w_dec: Tensor,
    b_pre: Tensor,
    factor: float,
    *,
    parts: int = 1,
    at_rest: bool = False,
    by: tuple[Decode, GatherDot] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decode, and go back to the activations.

    x: (n_tokens, d_model), the wanted outputs. parts: rows that active has for each token, see
    `nest`; x̂ of a part is b_pre and the sum of the rows up to its own. The loss is factor / 2 ·
    Σ_tokens Σ_parts ‖x̂ − x‖² / ‖x‖². at_rest: whether entries of 0 have a derivative too. by: what
    does the work of `decode` and `gather_dot`, by default these.
    Returns ∂loss/∂(a row's sum) (n_tokens · parts, d_model), ∂loss/∂values (n_active,), ‖x̂ − x‖²
    (n_tokens, parts), ‖x‖² (n_tokens,), and which latents are active on any token, (n_latents,)
    bool.
    """
    decoder, dotter = by or (decode, gather_dot)
    error = decoder(active, w_dec).view(len(x), parts, x.shape[1])
    if parts > 1:
        error = error.cumsum(dim=1)
    error += (b_pre - x).unsqueeze(1)
    squared = error.square().sum(dim=2)
    normaliser = x.square().sum(dim=1).clamp_min(MIN_NORMALISER * x.shape[1])
    g = error.mul_((factor / normaliser)[:, None, None])
    if parts > 1:
        g = g.flip(1).cumsum(dim=1).flip(1)
    g = g.reshape(-1, x.shape[1])
    g_values = dotter(g, active, w_dec)
    if not at_rest:
        g_values *= active.values > 0
    return g, g_values, squared, normaliser, fired_latents(active, w_dec.shape[0])


def fired_latents(active: ActiveLatents, n_latents: int) -> Tensor:
    """Return which latents are active on any token: (n_latents,) bool."""
    fired = torch.zeros(n_latents, dtype=torch.int32, device=active.values.device)
    return fired.scatter_reduce_(0, active.indices.long(), (active.values > 0).int(), "amax") > 0


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

    def of_tokens(self, n_tokens: int) -> ByLatent:
        """Return the same where a token has several rows, see `nest`, as if it had one."""
        parts = self.n_tokens // max(1, n_tokens)
        if parts <= 1:
            return self
        return replace(self, tokens=self.tokens // parts, n_tokens=n_tokens)


def group_by_latent(active: ActiveLatents, n_latents: int) -> ByLatent:
    """Sort entries by latent, stably: sums are deterministic."""
    indices = active.indices.long()
    order = torch.argsort(indices, stable=True)
    tokens, row_starts = active.tokens()[order], _starts(indices[order], n_latents)
    return ByLatent(order, tokens, row_starts, len(active.offsets) - 1)


def outer_by_latent(by_latent: ByLatent, values: Tensor, rows: Tensor) -> Tensor:
    """Return (n_latents, d_model): for each latent, the sum of value · rows[token].

    values: (n_active,), in the order that was grouped. rows: (n_tokens, d_model). It is `decode`
    with tokens and latents exchanged: one entry after the other, without atomics.
    """
    return F.embedding_bag(
        by_latent.tokens,
        rows,
        by_latent.row_starts,
        per_sample_weights=values[by_latent.order],
        mode="sum",
        include_last_offset=True,
    )


def sum_by_latent(by_latent: ByLatent, values: Tensor) -> Tensor:
    """Return (n_latents,): for each latent, the sum of its values (n_active,)."""
    return F.embedding_bag(
        by_latent.order,
        values.unsqueeze(1),
        by_latent.row_starts,
        mode="sum",
        include_last_offset=True,
    ).squeeze(1)
