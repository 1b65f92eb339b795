"""Linear probes: what can be read from activations, and from a few latents instead of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_PENALTY = 1e-3
_MOST_ITERATIONS = 200
_TEST_SHARE = 0.25


def fit_logistic(x: Tensor, y: Tensor, *, penalty: float = _PENALTY) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression per class by L-BFGS, all at once.

    x: (n, d) for all classes, or (n, n_classes, d), each class with features of its own.
    y: (n, n_classes), 0 or 1. penalty: of the squared weights of standardised features, beside the
    mean loss. Returns weights (n_classes, d) and biases (n_classes,), for x as it is, float64.
    """
    x, y = x.double(), y.double()
    scale, mean = torch.std_mean(x, dim=0)
    scale = torch.where(scale > 1e-9, scale, 1.0)
    z = (x - mean) / scale
    weights = torch.zeros(y.shape[1], x.shape[-1], dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(y.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, biases],
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(scores(z, weights, biases), y, reduction="none")
        total = losses.mean(0).sum() + penalty * weights.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    scaled = weights.detach() / scale
    return scaled, biases.detach() - (scaled * mean).sum(dim=-1)


def scores(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Return (n, n_classes) logits of what `fit_logistic` returned."""
    if x.ndim == 2:
        return x @ weights.T + biases
    return torch.einsum("ncd,cd->nc", x, weights) + biases


def rank_by_class(means: Tensor, counts: Tensor, k: int) -> Tensor:
    """Return (n_classes, k) features whose mean differs the most inside and outside of a class.

    means: (n_classes, n_features) of the classes' examples. counts: (n_classes,).
    Gurnee et al., arXiv:2305.01610, "max mean difference"; only those that are higher inside.
    """
    total = (means * counts[:, None]).sum(0)
    outside = (total - means * counts[:, None]) / (counts.sum() - counts).clamp_min(1)[:, None]
    return (means - outside).topk(k, dim=1).indices


def f1(predicted: Tensor, y: Tensor) -> Tensor:
    """Return each column's F1 of two (n, n_classes) bools; 0 where nothing is right."""
    right = (predicted & y).sum(0).double()
    return 2 * right / (predicted.sum(0) + y.sum(0)).clamp_min(1)


def best_cuts(logits: Tensor, y: Tensor) -> Tensor:
    """Return for each column the logit from which on to say yes, so that F1 is largest.

    logits, y: (n, n_classes). A class of few examples is never likelier than not, however well a
    feature ranks them.
    """
    ordered, order = logits.sort(dim=0, descending=True)
    right = y.gather(0, order).double().cumsum(0)
    said = torch.arange(1, len(y) + 1, dtype=torch.float64)[:, None]
    quality = 2 * right / (said + y.sum(0))
    tied = torch.zeros_like(y, dtype=torch.bool)
    tied[:-1] = ordered[:-1] == ordered[1:]  # equal ones are on one side
    best = quality.masked_fill(tied, -1).argmax(dim=0, keepdim=True)
    below = (best + 1).clamp_max(len(y) - 1)  # in the middle of the gap, for examples to come
    return (ordered.gather(0, best) + ordered.gather(0, below))[0] / 2


def rows_to_test_on(n: int, *, seed: int) -> Tensor:
    """Return (n,) bool: a seeded quarter, to test on."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order[: max(1, round(_TEST_SHARE * n))]] = True
    return chosen


def sparse_probing(
    dense: Tensor,
    latents: Tensor,
    labels: Tensor,
    names: Sequence[str],
    *,
    seed: int,
    ks: Sequence[int] = (1, 5),
) -> dict[str, Any]:
    """Tell each class from the others, from k latents and from the whole activation.

    dense: (n, d_model), latents: (n, n_latents), labels: (n,) index into names: one row per
    sentence, its tokens' mean, as many sentences of each class. Each class has a balanced set of
    its own, half of it drawn from all the others; accuracies on a quarter that was not fitted on.
    """
    per_class: dict[str, dict[str, float]] = {}
    for index, name in enumerate(names):
        rows = _balanced(labels == index, seed=seed + index)
        y, test = (labels[rows] == index)[:, None], rows_to_test_on(len(rows), seed=seed)
        inside = y[~test][:, 0]
        features = latents[rows]
        means = torch.stack([features[~test][side].mean(0) for side in (~inside, inside)])
        counts = torch.stack([(~inside).sum(), inside.sum()])
        chosen = rank_by_class(means, counts, max(ks))[1]
        found = {"dense": _accuracy(dense[rows], y, test)}
        for k in ks:
            found[f"k{k}"] = _accuracy(features[:, chosen[:k]], y, test)
        per_class[name] = found | {"latent": int(chosen[0])}
    figures = ["dense", *(f"k{k}" for k in ks)]
    means_ = {f: sum(each[f] for each in per_class.values()) / len(per_class) for f in figures}
    return {"n_sentences": len(labels), "mean": means_, "classes": per_class}


def _balanced(inside: Tensor, *, seed: int) -> Tensor:
    """Return rows of all members and as many others, in a seeded order."""
    generator = torch.Generator().manual_seed(seed)
    members, others = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
    n = min(len(members), len(others))
    draw = [rows[torch.randperm(len(rows), generator=generator)[:n]] for rows in (members, others)]
    rows = torch.cat(draw)
    return rows[torch.randperm(len(rows), generator=generator)]


def _accuracy(x: Tensor, y: Tensor, test: Tensor) -> float:
    weights, biases = fit_logistic(x[~test], y[~test])
    right = (scores(x[test].double(), weights, biases) > 0) == y[test]
    return float(right.double().mean())
