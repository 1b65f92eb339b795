"""Where an SAE does better or worse: by position, by norm, and token by token in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_N_NORM_GROUPS = 5


def by_position(tokens: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Return `group_means` over positions in the sentence, from 0: single ones, then doubling."""
    position = tokens["position"]
    edges = [edge for edge in _POSITIONS if edge <= int(position.max())]
    group = torch.bucketize(position, torch.tensor(edges[1:]), right=True)
    ends = [*edges[1:], int(position.max()) + 1]
    names = [{"from": edge, "to": end - 1} for edge, end in zip(edges, ends, strict=True)]
    return group_means(tokens, group, names)


def by_norm(tokens: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Return `group_means` over fifths of the raw activations' norm, smallest first."""
    norm = tokens["norm"].double()
    shares = torch.linspace(0, 1, _N_NORM_GROUPS + 1, dtype=torch.float64)
    edges = _quantiles(norm, shares)
    group = torch.bucketize(norm, edges[1:-1], right=True)
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return group_means(tokens, group, [{"from": low, "to": high} for low, high in pairs])


def _quantiles(values: Tensor, shares: Tensor) -> Tensor:
    """Return quantiles; torch.quantile refuses more than 16 million values."""
    ordered = values.sort().values
    return ordered[(shares * (len(ordered) - 1)).round().long()]


def group_means(
    tokens: Mapping[str, Tensor], group: Tensor, names: Sequence[Mapping[str, float]]
) -> list[dict[str, float]]:
    """Return a row per group that is not empty: its names, and means of what is known of tokens.

    group: (n_tokens,) int64, an index into names. loss_increase is over tokens that predict one.
    """
    rows = []
    for index, name in enumerate(names):
        members = group == index
        if not members.any():
            continue
        increase = (tokens["loss_sae"] - tokens["loss_clean"])[members]
        row = {
            "n_tokens": int(members.sum()),
            "normalized_mse": float(tokens["relative_error"][members].double().mean()),
            "l0": float(tokens["n_active"][members].double().mean()),
        }
        if not increase.isnan().all():
            row["loss_increase"] = float(increase.double().nanmean())
        rows.append({**name, **row})
    return rows


def excerpts(
    tokens: Mapping[str, Tensor], texts: Mapping[int, str], n_sentences: int
) -> list[dict[str, Any]]:
    """Return sentences token by token, with both losses on *this* token.

    Half of them are those whose loss the SAE raises the most per token, the others come from the
    whole range. texts: token id → display text. A first token is predicted by none: its losses are
    None.
    """
    increase = (tokens["loss_sae"] - tokens["loss_clean"]).double()
    sentence, known = tokens["sentence"], ~increase.isnan()
    n = int(sentence.max()) + 1
    total = torch.zeros(n, dtype=torch.float64).index_add_(0, sentence[known], increase[known])
    count = torch.bincount(sentence[known], minlength=n)
    mean = (total / count).nan_to_num(-torch.inf)
    order = mean.argsort(descending=True)[: int((count > 0).sum())].tolist()
    worst = order[: (n_sentences + 1) // 2]
    rest = order[len(worst) :]
    step = max(1, len(rest) // max(1, n_sentences - len(worst)))
    chosen = [*worst, *rest[step // 2 :: step]][:n_sentences]
    return [_excerpt(tokens, texts, index, float(mean[index])) for index in chosen]


def _excerpt(
    tokens: Mapping[str, Tensor], texts: Mapping[int, str], sentence: int, increase: float
) -> dict[str, Any]:
    rows = (tokens["sentence"] == sentence).nonzero()[:, 0]
    ids = tokens["token_id"][rows].tolist()
    # A token's own loss is the one that the token before it made.
    clean = [None, *tokens["loss_clean"][rows[:-1]].tolist()]
    with_sae = [None, *tokens["loss_sae"][rows[:-1]].tolist()]
    parts = [
        {"text": texts[i], "clean": _rounded(a), "sae": _rounded(b)}
        for i, a, b in zip(ids, clean, with_sae, strict=True)
    ]
    return {"loss_increase": round(increase, 4), "tokens": parts}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
