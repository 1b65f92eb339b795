"""A tiny SAE, one step on it, and the same step in dense float64 autograd written another way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from sae import SAEConfig, TopKSparseAutoencoder
from saint.kernels.cpu import is_available
from saint.stage.workers import Workers
from saint.training.losses import AuxK, Losses
from saint.training.moments import Moments
from saint.training.steps import make_step

ALONE = Workers(0, 1, torch.device("cpu"))
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_pre")
needs_cpp = pytest.mark.skipif(not is_available(), reason="no C++ compiler")


def make_sae(d_model: int = 24, n_latents: int = 64, k: int = 5, seed: int = 0, **facts):
    torch.manual_seed(seed)
    sae = TopKSparseAutoencoder(SAEConfig(d_model, n_latents, k, **facts))
    sae.initialise(0.2 * torch.randn(d_model), seed=seed)
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn_like(sae.W_enc))
        sae.b_enc.add_(0.05 * torch.randn_like(sae.b_enc))
    return sae


@dataclass
class Reference:
    """The whole step in float64: objective by autograd, projection, clipping, Adam, norms."""

    loss: torch.Tensor
    aux_loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    norm: float

    def stepped(self, sae: TopKSparseAutoencoder, rate: float, clip: float) -> dict:
        """First step of Adam from zero moments: m̂ = g, v̂ = g²."""
        scale = min(1.0, clip / (self.norm + 1e-6))
        weights = {}
        for name in WEIGHTS:
            g = scale * self.gradients[name]
            weights[name] = getattr(sae, name).detach().double() - rate * g / (g.abs() + 6.25e-10)
        weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
        return weights


def reference(sae: TopKSparseAutoencoder, x: torch.Tensor, aux: AuxK | None) -> Reference:
    p = {n: v.detach().double().requires_grad_() for n, v in sae.named_parameters()}
    x = x.double()
    pre = (x - p["b_pre"]) @ p["W_enc"].T + p["b_enc"]
    chosen = pre.argsort(dim=1, descending=True, stable=True)[:, : sae.config.k]
    mask = torch.zeros_like(pre, dtype=torch.bool).scatter(1, chosen, True)
    hidden = torch.where(mask & (pre > 0), pre, 0.0)
    error = x - (hidden @ p["W_dec"] + p["b_pre"])
    loss = ((error**2).sum(1) / (x**2).sum(1).clamp_min(1e-12 * x.shape[1])).mean()
    aux_loss = torch.zeros((), dtype=torch.float64)
    if aux is not None:
        some = (torch.arange(len(x)) + aux.first) % aux.every == 0
        dead = pre[some][:, aux.dead]
        keep = dead.argsort(dim=1, descending=True, stable=True)[:, : aux.k]
        dead_mask = torch.zeros_like(dead, dtype=torch.bool).scatter(1, keep, True)
        guess = torch.where(dead_mask & (dead > 0), dead, 0.0) @ p["W_dec"][aux.dead]
        residual = error.detach()[some]
        spread = ((residual - residual.mean(1, keepdim=True)) ** 2).mean(1).clamp_min(1e-12)
        aux_loss = (((residual - guess) ** 2).mean(1) / spread).sum() * aux.every / len(x)
    (loss + (aux.coefficient * aux_loss if aux is not None else 0.0)).backward()
    gradients = {n: v.grad for n, v in p.items() if v.grad is not None}
    with torch.no_grad():
        along = (gradients["W_dec"] * p["W_dec"]).sum(1, keepdim=True)
        gradients["W_dec"] -= along * p["W_dec"]
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
    return Reference(loss.detach(), aux_loss.detach(), gradients, norm)


def one_step(
    sae, x, aux, kernels, *, parts=1, rate=0.0, clip=float("inf")
) -> tuple[Losses, dict[str, torch.Tensor], float]:
    """Take one step; return the losses, the gradients as Adam saw them, and their norm.

    After the first step Adam's first moment is (1 - β₁) times the gradient.
    """
    moments = Moments(sae)
    step = make_step(kernels, sae, moments, Workers(0, 1, x.device))
    losses, n = None, 0
    for part in x.chunk(parts):
        here = None if aux is None else replace(aux, first=aux.first + n)
        losses = step.accumulate(part, sae.config.k, here, len(part) / max(1, len(x)))
        n += len(part)
    norm = step.apply(rate, clip)
    gradients = {name: first / (1 - 0.9) for name, first in moments.first.items()}
    assert losses is not None
    return losses, gradients, float(norm)


def relative(a, b) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def activations(encoded, n_latents: int) -> torch.Tensor:
    values, indices = encoded[:2]
    return torch.zeros(len(values), n_latents).scatter(1, indices.long(), values)
