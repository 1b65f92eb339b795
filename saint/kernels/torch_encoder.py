"""The encoder in torch: a dense product in bfloat16, then exact selection of the k largest.

Of each group of latents the largest product is looked at first, then all of the groups with the
highest upper bounds (see `rounding`), then the latents among these with the highest, the
candidates, which are scored in float32. The k best of them are a token's k largest for certain
where the k-th reaches every upper bound that was left out, and every candidate lies within its own
bounds. The other tokens are decided by the float32 product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sae import ActiveLatents, encode
from saint.kernels.rounding import error_bound, fourth_norms, product
from saint.kernels.torch_ops import gather_dot

BLOCK_ELEMENTS = 1 << 28  # pre-activations of one block: 512 MB in bfloat16
_GROUP = 32  # latents whose maximum is taken first
_NEVER = -1e30  # the bias of latents that only fill up the last group
_LEAST_AGAIN = 16
_SHARE_AGAIN = 64  # one in so many tokens can be decided by the float32 product without a wait


def n_candidates(k: int) -> int:
    """Return how many latents of a token are scored in float32."""
    return k + k // 2 + 32


@dataclass(frozen=True)
class Rounded:
    """W_enc for the product.

    rows: (_GROUP · n_groups, d) bfloat16, W_enc's, then three columns for the bias and zeros up to
    a multiple of 8. norms: (_GROUP, n_groups) ‖W_enc row‖₄. Group g has the latents
    g, g + n_groups, g + 2 · n_groups …: maxima over them are read as they lie in memory.
    """

    rows: Tensor
    norms: Tensor


@dataclass(frozen=True)
class _Candidates:
    """Of a block of tokens: latents (n_tokens, m), their products, and ‖a‖₄ ‖w‖₄ of each.

    left_out: (n_tokens,) the highest upper bound of all other latents.
    """

    latents: Tensor
    products: Tensor
    norms: Tensor
    left_out: Tensor


def _round_weights(w_enc: Tensor) -> Rounded:
    n_latents, d_model = w_enc.shape
    n_groups = -(-n_latents // _GROUP)
    rows = w_enc.new_zeros(n_groups * _GROUP, -(-(d_model + 3) // 8) * 8, dtype=torch.bfloat16)
    rows[:n_latents, :d_model] = w_enc
    norms = F.pad(fourth_norms(w_enc), (0, len(rows) - n_latents))
    return Rounded(rows, norms.view(_GROUP, n_groups))


def _set_bias(rounded: Rounded, b_enc: Tensor, d_model: int) -> None:
    """Give the three columns what adds up to the bias, to 24 bits."""
    rest = F.pad(b_enc, (0, len(rounded.rows) - len(b_enc)), value=_NEVER)
    for column in range(d_model, d_model + 3):
        rounded.rows[:, column] = rest
        rest = rest - rounded.rows[:, column]


def _best(upper: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the places (n_tokens, n) of each row's n largest, and the largest of the others."""
    if n >= upper.shape[1]:
        places = torch.arange(upper.shape[1], device=upper.device).expand_as(upper)
        return places, upper.new_full((len(upper),), -math.inf)
    values, places = upper.topk(n + 1, dim=1)
    return places[:, :n], values[:, n]


def _find(a: Tensor, weights: Rounded, m: int) -> _Candidates:
    """Return the m latents with the highest upper bounds of each token; a: (n_tokens, d_model)."""
    group, n_groups = weights.norms.shape
    rows = F.pad(a, (0, weights.rows.shape[1] - a.shape[1]), value=1.0).bfloat16()
    pre = product(rows, weights.rows).view(len(a), group, n_groups)
    token_norms = fourth_norms(a)[:, None]
    tops = pre.amax(dim=1).float()
    groups, left_out = _best(tops + error_bound(tops, token_norms * weights.norms.amax(dim=0)), m)
    inside = groups.unsqueeze(1).expand(-1, group, -1)
    products = pre.gather(2, inside).flatten(1).float()
    norms = token_norms * weights.norms[:, groups].transpose(0, 1).flatten(1)
    places, others = _best(products + error_bound(products, norms), m)
    member, number = places // groups.shape[1], places % groups.shape[1]
    latents, order = (member * n_groups + groups.gather(1, number)).sort(dim=1)
    places = places.gather(1, order)
    return _Candidates(
        *(latents, products.gather(1, places), norms.gather(1, places)),
        left_out.maximum(others),
    )


def decide(
    found: tuple[Tensor, Tensor, Tensor], a: Tensor, w_enc: Tensor, b_enc: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the unsure tokens what the float32 product has; see `Encoder`.

    found: values and indices (n_tokens, k), changed in place, and which are unsure (n_tokens,).
    """
    values, indices, unsure = found
    rows = torch.nonzero(unsure).squeeze(1)
    if len(rows):
        again = encode(a[rows], w_enc, b_enc, values.shape[1])
        for mine, theirs in zip((values, indices), again, strict=True):
            mine[rows] = theirs.to(mine.dtype)
    return values, indices


def decide_without_waiting(
    found: tuple[Tensor, Tensor, Tensor], a: Tensor, w_enc: Tensor, b_enc: Tensor
) -> tuple[Tensor, Tensor]:
    """As `decide`, of so many unsure tokens as are always multiplied again."""
    values, indices, unsure = found
    n = min(len(a), max(_LEAST_AGAIN, len(a) // _SHARE_AGAIN))
    rows = unsure.int().sort(descending=True, stable=True).indices[:n]
    again, here = encode(a[rows], w_enc, b_enc, values.shape[1]), unsure[rows].unsqueeze(1)
    for mine, theirs in zip((values, indices), again, strict=True):
        mine[rows] = torch.where(here, theirs.to(mine.dtype), mine[rows])
    return values, indices


class Encoder:
    """As `sae.encode`; see the module's docstring. Of equal candidates the first are kept.

    Keeps the rounded weights between calls: what torch changes of W_enc is noticed.
    """

    def __init__(self) -> None:
        self._weights: Rounded | None = None
        self._made_of: tuple[Tensor | None, int] = (None, 0)
        self._n_tokens = 0
        self._counts: Tensor | None = None  # candidates that were needed, and unsure tokens

    def diagnostics(self) -> dict[str, Tensor]:
        """Return what the rounded product left to do since the last call, on the device."""
        n_tokens, counts = self._n_tokens, self._counts
        self._n_tokens, self._counts = 0, None
        if counts is None:
            return {}
        names = ("debug/candidates_per_token", "debug/float32_tokens_ratio")
        return dict(zip(names, (counts / max(1, n_tokens)).unbind(), strict=True))

    def __call__(self, a: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `sae.encode`. Waits for the device, to know which tokens are unsure."""
        return decide(self._select(a, w_enc, b_enc, k), a, w_enc, b_enc)

    def without_waiting(
        self, a: Tensor, w_enc: Tensor, b_enc: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """As a call, but of many unsure tokens only one in 64 of all is decided in float32.

        The others have the k largest of their candidates. Nothing depends on the data but values.
        """
        return decide_without_waiting(self._select(a, w_enc, b_enc, k), a, w_enc, b_enc)

    @torch.no_grad()
    def _select(
        self, a: Tensor, w_enc: Tensor, b_enc: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return values and indices (n_tokens, k), and which tokens are unsure (n_tokens,)."""
        weights = self._rounded(w_enc)
        a, w_enc, b_enc = a.contiguous(), w_enc.detach(), b_enc.detach()
        _set_bias(weights, b_enc, a.shape[1])
        n_rows = max(1, BLOCK_ELEMENTS // len(w_enc))
        parts = [self._of_block(block, w_enc, b_enc, weights, k) for block in a.split(n_rows)]
        self._n_tokens += len(a)
        values, indices, unsure = map(torch.cat, zip(*parts, strict=True))
        return values, indices, unsure

    def _rounded(self, w_enc: Tensor) -> Rounded:
        """Return W_enc rounded, as it is now."""
        of, version = self._made_of
        if of is not w_enc or version != w_enc._version or self._weights is None:
            self._weights = _round_weights(w_enc.detach())
            self._made_of = w_enc, w_enc._version
        return self._weights

    def _of_block(
        self, a: Tensor, w_enc: Tensor, b_enc: Tensor, weights: Rounded, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _find(a, weights, n_candidates(k))
        latents = found.latents.clamp(max=len(w_enc) - 1)
        entries = ActiveLatents.of_matrices(found.products, latents)
        exact = gather_dot(a, entries, w_enc).view(latents.shape) + b_enc[latents]
        exact = exact.masked_fill(found.latents >= len(w_enc), -math.inf)
        error = error_bound(found.products, found.norms)
        near = ((exact - found.products).abs() <= error) | (found.latents >= len(w_enc))
        largest = exact.sort(dim=1, descending=True, stable=True)
        values, places = largest.values[:, :k], largest.indices[:, :k]
        least = values[:, -1]
        unsure = ~(near.all(dim=1) & (least >= found.left_out))
        needed = (found.products + error >= least.unsqueeze(1)).sum()
        counts = torch.stack([needed, unsure.sum()]).double()
        self._counts = counts if self._counts is None else self._counts + counts
        return values.relu(), latents.gather(1, places), unsure
