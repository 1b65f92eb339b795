"""Steps that take their gradient from the tokens' activations and errors, which ranks exchange."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sae import ActiveLatents, TopKSparseAutoencoder
from saint.kernels import cpu, torch_ops
from saint.kernels.fastest import encode
from saint.kernels.pieces import (
    AuxGradient,
    CpuKernels,
    PartPieces,
    Pieces,
    Shared,
    SparseGradient,
)
from saint.stage.workers import Axis, Workers
from saint.training.losses import AuxK, Jump, Losses, sparse_gradient
from saint.training.moments import EPS, Moments


class FusedStep:
    """Each latent's gradient is made of its tokens, when the weights are moved.

    Ranks exchange their tokens' activations and errors rather than gradients, so each does what
    one rank does with the whole batch. Subclasses have `apply`, the pass itself.
    """

    def __init__(
        self, sae: TopKSparseAutoencoder, moments: Moments, workers: Workers, pieces: Pieces
    ):
        self.sae, self.moments, self.workers, self.pieces = sae, moments, workers, pieces
        self._parts: list[SparseGradient] = []
        self._dead: Tensor | None = None

    def top(self, a: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        return self.pieces.encode(a, self.sae.W_enc, self.sae.b_enc, k)

    def above(self, a: Tensor, bias: Tensor) -> ActiveLatents:
        """See `Step`."""
        return self.pieces.above(a, self.sae.W_enc, bias)

    def accumulate(
        self,
        x: Tensor,
        chosen: ActiveLatents | int,
        aux: AuxK | None,
        weight: float,
        prefixes: tuple[int, ...] = (),
        jump: Jump | None = None,
    ) -> Losses:
        """See `Step`."""
        how = {"prefixes": prefixes, "jump": jump, "weight": weight}
        losses, gradient = sparse_gradient(self.sae, x, chosen, aux, self.pieces, **how)
        self._parts.append(gradient)
        self._dead = aux.dead if aux is not None else None
        return losses

    def encode(self, x: Tensor) -> ActiveLatents:
        """See `Step`."""
        return encode(self.sae, self.pieces, x)

    def _sum_of_parts(self) -> SparseGradient:
        """Put the micro-batches' and then the ranks' tokens one after the other."""
        parts, self._parts = self._parts, []
        active = torch_ops.concatenate([part.active for part in parts])
        names = ("g_values", "a", "g")
        g_values, a, g = (_concatenate([getattr(part, name) for part in parts]) for name in names)
        g_b_pre = torch.stack([part.g_b_pre for part in parts]).sum(dim=0)
        thresholds = [part.threshold for part in parts if part.threshold is not None]
        threshold = torch.stack(thresholds).sum(dim=0) if thresholds else None
        aux = _add([part.aux for part in parts if part.aux is not None])
        data = self.workers.data
        if data.size > 1:
            a, g = (data.gather(tensor).flatten(0, 1) for tensor in (a, g))
            values, indices, g_values = (
                data.gather_uneven(tensor) for tensor in (active.values, active.indices, g_values)
            )
            counts = data.gather(active.offsets.diff()).flatten()
            offsets = torch.cat([active.offsets[:1], counts.cumsum(0)])
            active = ActiveLatents(values, indices, offsets, active.k)
            data.sum(g_b_pre)
            if threshold is not None:
                data.sum(threshold)
            if aux is not None:
                for tensor in (aux.dec, aux.enc, aux.b):
                    data.sum(tensor)
        return SparseGradient(active, g_values, a, g, g_b_pre, aux, threshold)

    def _weight_and_moments(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return a weight and Adam's two moments of it."""
        weight: Tensor = getattr(self.sae, name)
        return weight.detach(), self.moments.first[name], self.moments.second[name]

    def _move_thresholds(
        self, gradient: Tensor | None, scale: Tensor | float, constants: tuple[float, float]
    ) -> None:
        """Take the thresholds' step, where they are learned; none falls below 0."""
        if gradient is None:
            return
        (beta1, beta2), (rate, inverse_root) = self.moments.betas, constants
        weight, first, second = self._weight_and_moments("threshold")
        touched = gradient != 0 if self.moments.lazy else torch.ones_like(gradient).bool()
        gradient = scale * gradient
        moved = torch.lerp(first, gradient, 1 - beta1)
        spread = (beta2 * second).addcmul_(gradient, gradient, value=1 - beta2)
        rate *= self.moments.threshold_rate
        lower = weight - rate * moved / (spread.sqrt() * inverse_root + EPS)
        for mine, new in ((first, moved), (second, spread), (weight, lower.clamp_min_(0))):
            mine.copy_(torch.where(touched, new, mine))


class CppStep(FusedStep):
    """The fused step in C++, on a CPU: no gradient is ever stored."""

    def __init__(
        self, sae: TopKSparseAutoencoder, moments: Moments, workers: Workers, pieces: CpuKernels
    ):
        self.name = "cpp" if pieces.encode.rounded else "cpp_float32"
        self._encoder = pieces.encode
        super().__init__(sae, moments, workers, over_ranks(pieces, workers.latents))

    @torch.no_grad()
    def apply(self, learning_rate: float, grad_clip: float) -> Tensor:
        """See `Step`."""
        whole = self._sum_of_parts()
        aux = None
        if whole.aux is not None and self._dead is not None:
            aux = (self._dead, whole.aux.dec, whole.aux.enc, whole.aux.b)
        gradient = cpu.group_by_latent(
            self.sae.config.n_latents, whole.active, whole.g_values, whole.a, whole.g, aux
        )
        names = ("W_enc", "b_enc", "W_dec", "b_pre")
        parameters = cpu.point_to(
            *((*self._weight_and_moments(name), self.moments.scales.get(name)) for name in names)
        )
        grad_b_pre = whole.g_b_pre
        norm = cpu.gradient_norm(gradient, parameters, grad_b_pre)
        if whole.threshold is not None:
            norm = math.hypot(norm, float(torch.linalg.vector_norm(whole.threshold)))
        ranks = self.workers.latents
        if ranks.size > 1:
            rows = norm**2 - float(grad_b_pre.double().square().sum())
            squares = torch.tensor(rows, dtype=torch.float64)
            norm = float(norm_over_latents(squares, grad_b_pre, ranks))
        scale = min(1.0, grad_clip / (norm + 1e-6))
        constants = self.moments.advance(learning_rate)
        betas, lazy = self.moments.betas, int(self.moments.lazy)
        step = cpu.AdamStep(*betas, *constants, EPS, self.moments.n_steps, lazy)
        cpu.update(gradient, parameters, step, scale, grad_b_pre)
        self._move_thresholds(whole.threshold, scale, constants)
        self._encoder.forget_weights()
        return torch.tensor(norm)

    def diagnostics(self) -> dict[str, float]:
        """See `Step`."""
        return self._encoder.diagnostics()


def over_ranks(pieces: PartPieces, ranks: Axis) -> Pieces:
    """Return the pieces of a step whose latents these ranks share."""
    return pieces if ranks.size == 1 else Shared(pieces, ranks)


def _concatenate(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def norm_over_latents(squares: Tensor, grad_b_pre: Tensor, ranks: Axis) -> Tensor:
    """Return the whole gradient's norm (), and sum b_pre's over the ranks in place.

    squares: () float64, the squared norm of what belongs to this rank's latents.
    """
    ranks.sum(grad_b_pre)
    return (ranks.sum(squares) + grad_b_pre.double().square().sum()).sqrt()


def _add(parts: list[AuxGradient]) -> AuxGradient | None:
    if not parts:
        return None
    for part in parts[1:]:
        parts[0].dec.add_(part.dec)
        parts[0].enc.add_(part.enc)
        parts[0].b.add_(part.b)
    return parts[0]
