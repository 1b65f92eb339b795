"""The encoder in Triton: a dense product in bfloat16, then exact selection of the k largest.

Every pre-activation lies between the two bounds of `rounding`. The k-th largest maximum of the
groups' lower bounds is below k pre-activations; so every latent whose upper bound is below that is
not among the k largest. The others are scored again in float32. A token falls back to the float32
product when a candidate lies outside its bounds, or when there are too many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saint.kernels.rounding import FACTOR, U, product
from saint.kernels.torch_encoder import decide, decide_without_waiting
from saint.kernels.triton_ops import launch, load_tile, round_row, row_shape, tile_shape

_BLOCK_ELEMENTS = 1 << 28  # pre-activations of one block: 512 MB in bfloat16
_GROUP = 64  # latents whose maximum is taken first, at most
_TILE = 1024  # numbers that a program looks at together
_MANY = 64  # candidates that are ranked together
_TOKENS = 16  # tokens for which a program keeps its latents' norms
_FACTORS = tl.constexpr(FACTOR)
_PRODUCT = tl.constexpr(U)


@triton.jit
def _round_rows(rows, rounded, norms, d_model, BLOCK_D: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_D)
    row = tl.load(rows + number * d_model + at, at < d_model, other=0.0)
    round_row(row, rounded, norms, number, d_model, BLOCK_D)


@dataclass(frozen=True)
class Rounded:
    """Rows (n, d_model) in bfloat16, and the 4-norms (n,) of what they were."""

    rows: Tensor
    norms: Tensor


def round_rows(rows: Tensor) -> Rounded:
    """Round float32 rows (n, d_model), contiguous."""
    rounded = Rounded(torch.empty_like(rows, dtype=torch.bfloat16), rows.new_empty(len(rows)))
    n, d_model = rows.shape
    launch(_round_rows, (n,), rows, rounded.rows, rounded.norms, d_model, **row_shape(d_model))
    return rounded


@triton.jit
def _error(product, token_norm, latent_norm):
    return _FACTORS * token_norm * latent_norm + _PRODUCT * tl.abs(product)


@triton.jit
def _group_bounds(
    pre,
    bias,
    token_norms,
    latent_norms,
    lower,
    upper,
    n_tokens,
    n_latents,
    n_groups,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Store each group's largest lower and upper bound, (n_tokens, n_groups)."""
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    latent = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = latent < n_latents
    shift = tl.load(bias + latent, inside, other=0.0)
    norm = tl.load(latent_norms + latent, inside, other=0.0)
    for i in range(TOKENS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + i
        there = token < n_tokens
        mask = latent < tl.where(there, n_latents, 0)
        product = tl.load(pre + token * n_latents + latent, mask, other=0.0).to(tl.float32)
        error = _error(product, tl.load(token_norms + token, there, other=0.0), norm)
        low = tl.where(inside, product + shift - error, -float("inf"))
        high = tl.where(inside, product + shift + error, -float("inf"))
        at, kept = token * n_groups + group, group < tl.where(there, n_groups, 0)
        tl.store(lower + at, tl.max(low, axis=1), kept)
        tl.store(upper + at, tl.max(high, axis=1), kept)


@triton.jit
def _append(out, count, numbers, wanted, capacity):
    """Store the wanted numbers after the first `count`; return how many there are then."""
    flags = wanted.to(tl.int32)
    place = count + tl.cumsum(flags, axis=0) - 1
    tl.store(out + place, numbers, wanted & (place < capacity))
    return count + tl.sum(flags, axis=0)


@triton.jit
def _find_groups(upper, thresholds, groups, counts, n_groups, TILE: tl.constexpr):
    """List each token's groups whose upper bound reaches the threshold, ascending."""
    token = tl.program_id(0).to(tl.int64)
    threshold = tl.load(thresholds + token)
    count = tl.zeros([], tl.int32)
    for start in range(0, n_groups, TILE):
        group = start + tl.arange(0, TILE)
        bound = tl.load(upper + token * n_groups + group, group < n_groups, other=0.0)
        wanted = (bound >= threshold) & (group < n_groups)
        count = _append(groups + token * n_groups, count, group, wanted, n_groups)
    tl.store(counts + token, count)


@triton.jit
def _find_candidates(
    pre,
    bias,
    token_norms,
    latent_norms,
    thresholds,
    groups,
    group_counts,
    candidates,
    counts,
    n_latents,
    n_groups,
    capacity,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """List each token's latents whose upper bound reaches the threshold, ascending."""
    token = tl.program_id(0).to(tl.int64)
    threshold = tl.load(thresholds + token)
    token_norm = tl.load(token_norms + token)
    n_numbers = tl.load(group_counts + token) * GROUP
    count = tl.zeros([], tl.int32)
    for start in range(0, n_numbers, TILE):
        number = start + tl.arange(0, TILE)
        group = tl.load(groups + token * n_groups + number // GROUP, number < n_numbers, other=0)
        latent = group * GROUP + number % GROUP
        inside = (number < n_numbers) & (latent < n_latents)
        product = tl.load(pre + token * n_latents + latent, inside, other=0.0).to(tl.float32)
        error = _error(product, token_norm, tl.load(latent_norms + latent, inside, other=0.0))
        bound = product + tl.load(bias + latent, inside, other=0.0) + error
        wanted = inside & (bound >= threshold)
        count = _append(candidates + token * capacity, count, latent, wanted, capacity)
    tl.store(counts + token, count)


@triton.jit
def _score(
    a,
    w_enc,
    bias,
    pre,
    token_norms,
    latent_norms,
    candidates,
    counts,
    scores,
    unsure,
    n_latents,
    d_model,
    k,
    capacity,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Score candidates in float32; a token is sure when all k or more lie within their bounds."""
    token = tl.program_id(0).to(tl.int64)
    token_norm, count = tl.load(token_norms + token), tl.load(counts + token)
    n_near = tl.zeros([ROWS], tl.int32)
    for start in range(0, tl.minimum(count, capacity), ROWS):
        number = start + tl.arange(0, ROWS)
        there = (number < count) & (number < capacity)
        latent = tl.load(candidates + token * capacity + number, there, other=0)
        exact = tl.zeros([ROWS], tl.float32)
        for column in range(0, d_model, TILE):
            at = column + tl.arange(0, TILE)
            row = tl.load(a + token * d_model + at, at < d_model, other=0.0)
            exact += tl.sum(load_tile(w_enc, latent, there, at, d_model) * row[None, :], axis=1)
        product = tl.load(pre + token * n_latents + latent, there, other=0.0).to(tl.float32)
        error = _error(product, token_norm, tl.load(latent_norms + latent, there, other=0.0))
        n_near += (there & (tl.abs(exact - product) <= error)).to(tl.int32)
        exact += tl.load(bias + latent, there, other=0.0)
        tl.store(scores + token * capacity + number, exact, there)
    sure = (tl.sum(n_near, axis=0) == count) & (count >= k)
    tl.store(unsure + token, tl.where(sure, 0, 1).to(tl.uint8))


@triton.jit
def _keep_largest(scores, candidates, counts, values, indices, k, capacity, MANY: tl.constexpr):
    """Store each token's k largest scores, after ReLU; of equals the first latents."""
    token = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(counts + token), capacity)
    for start in range(0, count, MANY):
        number = start + tl.arange(0, MANY)
        here = token * capacity + number
        mine = tl.load(scores + here, number < count, other=-float("inf"))
        rank = tl.zeros([MANY], tl.int32)
        for other_start in range(0, count, MANY):
            other = other_start + tl.arange(0, MANY)
            theirs = tl.load(scores + token * capacity + other, other < count, other=-float("inf"))
            larger = theirs[None, :] > mine[:, None]
            earlier = (theirs[None, :] == mine[:, None]) & (other[None, :] < number[:, None])
            before = (larger | earlier) & (other < count)[None, :]
            rank += tl.sum(before.to(tl.int32), axis=1)
        kept = (number < count) & (rank < k)
        tl.store(values + token * k + rank, tl.maximum(mine, 0.0), kept)
        tl.store(indices + token * k + rank, tl.load(candidates + here, kept, other=0), kept)


def _group_size(n_latents: int, k: int) -> int:
    """Latents to a group: with 8 k groups, few hold two of the k largest."""
    size = _GROUP
    while size > 1 and n_latents < 8 * k * size:
        size //= 2
    return size


def _find(
    pre: Tensor, bias: Tensor, a: Rounded, weights: Rounded, k: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Return each token's candidates (n_tokens, capacity) int32, and how many it has (n_tokens,).

    A token with more than `capacity` lacks the last ones.
    """
    n_tokens, n_latents = pre.shape
    size = _group_size(n_latents, k)
    n_groups, many = triton.cdiv(n_latents, size), _TILE // size
    lower, upper = (pre.new_empty(n_tokens, n_groups, dtype=torch.float32) for _ in range(2))
    inputs = (pre, bias, a.norms, weights.norms)
    launch(
        *(_group_bounds, (triton.cdiv(n_tokens, _TOKENS), triton.cdiv(n_groups, many))),
        *(*inputs, lower, upper, n_tokens, n_latents, n_groups),
        TOKENS=_TOKENS,
        GROUPS=many,
        GROUP=size,
    )
    if n_groups < k:
        thresholds = lower.new_full((n_tokens,), -math.inf)
    else:
        thresholds = lower.topk(k, dim=1, sorted=False).values.amin(dim=1)
    integers = {"dtype": torch.int32, "device": pre.device}
    groups = torch.empty(n_tokens, n_groups, **integers)
    group_counts, counts = (torch.empty(n_tokens, **integers) for _ in range(2))
    candidates = torch.empty(n_tokens, capacity, **integers)
    each = (n_tokens,)
    launch(_find_groups, each, upper, thresholds, groups, group_counts, n_groups, TILE=_TILE)
    launch(
        *(_find_candidates, each),
        *(*inputs, thresholds, groups, group_counts, candidates, counts),
        *(n_latents, n_groups, capacity),
        GROUP=size,
        TILE=_TILE,
    )
    return candidates, counts


class Encoder:
    """As `sae.encode`, with int32 indices; see the module's docstring.

    Keeps the rounded weights between steps: changes that torch makes to W_enc are noticed, a
    kernel that changes it must also round anew what `rounded_weights` returned.
    """

    def __init__(self) -> None:
        self._weights: Rounded | None = None
        self._version = (0, 0)
        self._n_tokens = 0
        self._counts: Tensor | None = None  # candidates, and unsure tokens

    def diagnostics(self) -> dict[str, Tensor]:
        """Return what the rounded product left to do since the last call, on the device."""
        n_tokens, counts = self._n_tokens, self._counts
        self._n_tokens, self._counts = 0, None
        if counts is None:
            return {}
        names = ("debug/candidates_per_token", "debug/float32_tokens_ratio")
        return dict(zip(names, (counts / max(1, n_tokens)).unbind(), strict=True))

    def rounded_weights(self, w_enc: Tensor) -> Rounded:
        """Return W_enc (n_latents, d_model) rounded, as it is now."""
        version = (w_enc.data_ptr(), w_enc._version)
        if self._weights is None or version != self._version:
            self._weights, self._version = round_rows(w_enc.detach()), version
        return self._weights

    def __call__(self, a: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `sae.encode`; of equal candidates the first are kept. Waits for the device."""
        return decide(self._choose(a, w_enc, b_enc, k), a, w_enc, b_enc)

    def without_waiting(
        self, a: Tensor, w_enc: Tensor, b_enc: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """See `torch_encoder.Encoder.without_waiting`."""
        return decide_without_waiting(self._choose(a, w_enc, b_enc, k), a, w_enc, b_enc)

    @torch.no_grad()
    def _choose(
        self, a: Tensor, w_enc: Tensor, b_enc: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return values and indices (n_tokens, k), and which tokens are unsure (n_tokens,)."""
        weights = self.rounded_weights(w_enc)
        a, w_enc, b_enc = a.contiguous(), w_enc.detach(), b_enc.detach()
        values = a.new_zeros(len(a), k)  # also where too few candidates are numbers
        indices = torch.zeros(len(a), k, dtype=torch.int32, device=a.device)
        unsure = torch.empty(len(a), dtype=torch.uint8, device=a.device)
        n_rows, n_candidates = max(1, _BLOCK_ELEMENTS // len(w_enc)), a.new_zeros(())
        for start in range(0, len(a), n_rows):
            block = slice(start, start + n_rows)
            outputs = (values[block], indices[block], unsure[block])
            n_candidates = n_candidates + self._select(a[block], w_enc, b_enc, weights, outputs)
        # Comparisons with NaN are false: a latent that has one would never be found.
        certain = (unsure == 0) & torch.isfinite(weights.norms.sum() + b_enc.sum())
        counts = torch.stack([n_candidates, (~certain).sum()]).double()
        self._counts = counts if self._counts is None else self._counts + counts
        self._n_tokens += len(a)
        return values, indices, ~certain

    def _select(
        self,
        a: Tensor,
        w_enc: Tensor,
        b_enc: Tensor,
        weights: Rounded,
        outputs: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """Fill values and indices (n_tokens, k) of the tokens a, and unsure (n_tokens,).

        Returns how many candidates there were, ().
        """
        values, indices, unsure = outputs
        (n_tokens, d_model), n_latents, k = a.shape, len(w_enc), values.shape[1]
        rounded, capacity = round_rows(a), 4 * k + 256
        pre = product(rounded.rows, weights.rows)
        candidates, counts = _find(pre, b_enc, rounded, weights, k, capacity)
        scores = a.new_empty(n_tokens, capacity)
        launch(
            *(_score, (n_tokens,)),
            *(a, w_enc, b_enc, pre, rounded.norms, weights.norms, candidates, counts),
            *(scores, unsure, n_latents, d_model, k, capacity),
            **tile_shape(a)[1],
        )
        found = (scores, candidates, counts)
        launch(_keep_largest, (n_tokens,), *found, values, indices, k, capacity, MANY=_MANY)
        return counts.sum()
