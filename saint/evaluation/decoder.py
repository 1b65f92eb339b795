"""How the decoder's directions lie: nearest neighbours, and groups of nearly equal ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 25
_SHARES_ABOVE = (0.3, 0.5, 0.7, 0.9)


@torch.inference_mode()
def nearest_cosines(w_dec: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return each latent's largest cosine with another direction, and whose that is.

    w_dec: (n_latents, d_model), any norms. latents: (m,) int64. Returns (m,) float32 and (m,).
    """
    directions = torch.nn.functional.normalize(w_dec.float(), dim=1)
    cosines, others = [], []
    for part in latents.split(max(1, _BLOCK_ELEMENTS // len(directions))):
        products = directions[part] @ directions.T
        products.scatter_(1, part.unsqueeze(1), -torch.inf)
        found = products.max(dim=1)
        cosines.append(found.values)
        others.append(found.indices)
    return torch.cat(cosines).clamp_(-1, 1), torch.cat(others)


@torch.inference_mode()
def clusters(w_dec: Tensor, latents: Tensor, cosine: float) -> list[list[int]]:
    """Group latents that chains of pairs above a cosine connect; largest first, none of one.

    w_dec: (n_latents, d_model). latents: (m,): only pairs among these count.
    """
    directions = torch.nn.functional.normalize(w_dec[latents].float(), dim=1)
    parent = list(range(len(latents)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    rows = max(1, _BLOCK_ELEMENTS // max(1, len(latents)))
    for start in range(0, len(latents), rows):
        near = directions[start : start + rows] @ directions.T > cosine
        for i, j in near.nonzero().tolist():
            parent[root(start + i)] = root(j)
    members: dict[int, list[int]] = {}
    for i, latent in enumerate(latents.tolist()):
        members.setdefault(root(i), []).append(latent)
    return sorted((m for m in members.values() if len(m) > 1), key=lambda m: (-len(m), m))


def geometry(w_dec: Tensor, alive: Tensor, *, n_compared: int, seed: int) -> dict[str, Any]:
    """Return what is worth knowing of the directions of latents that fire.

    alive: (n_alive,) int64. At most n_compared of them, a seeded draw, are compared: with all for
    their nearest neighbour, with each other for clusters.
    """
    draw = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))
    latents = alive[draw[:n_compared]].sort().values.to(w_dec.device)
    if len(latents) < 2:
        return {"n_compared": len(latents)}
    cosines, _ = nearest_cosines(w_dec, latents)
    counts = torch.histc(cosines.cpu().clamp_min(0), bins=40, min=0.0, max=1.0)
    groups = clusters(w_dec, latents, _SHARES_ABOVE[2])
    return {
        "n_compared": len(latents),
        "mean_nearest_cosine": float(cosines.mean()),
        "share_above": {str(c): float((cosines > c).float().mean()) for c in _SHARES_ABOVE},
        "nearest_cosine_histogram": {
            "edges": torch.linspace(0, 1, 41).tolist(),
            "n_latents": counts.tolist(),
        },
        "cluster_cosine": _SHARES_ABOVE[2],
        "n_clusters": len(groups),
        "share_in_clusters": sum(map(len, groups)) / len(latents),
        "largest_clusters": [group[:20] for group in groups[:5]],
    }
