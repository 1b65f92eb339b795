"""The training step in torch, on any device: gradients in `.grad`, then one pass of Adam.

With "torch" nothing that is done to the device depends on the data but the numbers themselves, as
far as the objective lets it: the host never waits. Sums are taken in one order, so that two runs
have the same bits. "dense" is plain autograd, the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from sae import ActiveLatents, TopKSparseAutoencoder
from saint.kernels.fastest import encode, fastest_torch_kernels
from saint.kernels.pieces import TorchKernels
from saint.stage.workers import Workers
from saint.training.fused_step import norm_over_latents, over_ranks
from saint.training.losses import (
    AuxK,
    Jump,
    Losses,
    add_to_grad,
    losses_dense,
    sparse_gradient,
)
from saint.training.moments import EPS, Moments

_BLOCK_ELEMENTS = 1 << 21  # of rows that are passed over several times: 8 MB, for the caches


class TorchStep:
    """Gradients of the active latents' alone ("torch"), or from autograd ("dense")."""

    def __init__(
        self,
        sae: TopKSparseAutoencoder,
        moments: Moments,
        workers: Workers,
        name: Literal["torch", "dense"],
    ):
        self.sae, self.moments, self.workers = sae, moments, workers
        self.name: Literal["torch", "dense"] = name
        kernels = fastest_torch_kernels(workers.device) if name == "torch" else TorchKernels()
        self.encoder = kernels.encoder
        self.pieces = over_ranks(kernels, workers.latents)
        self._in_step = over_ranks(TorchKernels(self.encoder, waits=False), workers.latents)
        self._touched: Tensor | None = None  # latents with a gradient, where the others are let be

    def top(self, a: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        return self._in_step.encode(a, self.sae.W_enc, self.sae.b_enc, k)

    @torch.no_grad()
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
        if self.name == "dense":
            losses, total = losses_dense(self.sae, x, chosen, aux, prefixes, jump)
            (weight * total).backward()
        else:
            how = {"prefixes": prefixes, "jump": jump, "weight": weight}
            losses, gradient = sparse_gradient(self.sae, x, chosen, aux, self._in_step, **how)
            add_to_grad(self.sae, gradient, aux)
        if self.moments.lazy:
            touched = losses.fired.clone()
            if aux is not None:
                touched[aux.dead] = True
            self._touched = touched if self._touched is None else self._touched | touched
        return losses

    def apply(self, learning_rate: float, grad_clip: float) -> Tensor:
        """See `Step`."""
        data = self.workers.data
        if data.size > 1:
            for parameter in self.sae.parameters():
                assert parameter.grad is not None
                data.sum(parameter.grad)
            if self._touched is not None:
                self._touched = data.largest(self._touched.to(torch.int32)) > 0
        _project_decoder_gradient(self.sae)
        norm = self._clip(grad_clip)
        touched, self._touched = self._touched, None
        self._adam(learning_rate, touched)
        self.sae.zero_grad(set_to_none=True)
        _normalise_decoder(self.sae, touched)
        return norm

    def encode(self, x: Tensor) -> ActiveLatents:
        """See `Step`."""
        return encode(self.sae, self.pieces, x)

    def diagnostics(self) -> Mapping[str, float | Tensor]:
        """See `Step`."""
        return {} if self.encoder is None else self.encoder.diagnostics()

    def _clip(self, largest_norm: float) -> Tensor:
        ranks, parameters = self.workers.latents, list(self.sae.parameters())
        if ranks.size == 1:
            return torch.nn.utils.clip_grad_norm_(parameters, largest_norm)
        grad_b_pre = self.sae.b_pre.grad
        own = [p.grad for p in parameters if p.grad is not None and p is not self.sae.b_pre]
        assert grad_b_pre is not None
        squares = torch.nn.utils.get_total_norm(own).double().square()
        norm = norm_over_latents(squares, grad_b_pre, ranks).float()
        torch.nn.utils.clip_grads_with_norm_(parameters, largest_norm, norm)
        return norm

    @torch.no_grad()
    def _adam(self, learning_rate: float, touched: Tensor | None) -> None:
        """Move the weights: in one call all that move as a whole, the others row by row."""
        n_before, moments = self.moments.n_steps, self.moments
        constants = moments.advance(learning_rate)
        whole = []
        for name, parameter in self.sae.named_parameters():
            assert parameter.grad is not None
            some, factor = touched if name != "b_pre" else None, 1.0
            if name == "threshold":
                some = None if touched is None else parameter.grad != 0
                factor = moments.threshold_rate
            if some is None and name not in moments.scales and factor == 1.0:
                whole.append(name)
                continue
            for rows, first, second in moments.blocks(name, some):
                moving = torch.ones(len(first), dtype=torch.bool, device=first.device)
                moving = moving if some is None else some[rows]
                tensors = (parameter[rows], parameter.grad[rows], first, second)
                _move_rows(*tensors, moving, moments.betas, (factor * constants[0], constants[1]))
        self._move_whole(whole, learning_rate, float(n_before))
        if self.sae.threshold is not None:
            self.sae.threshold.clamp_(min=0)

    def _move_whole(self, names: list[str], learning_rate: float, n_before: float) -> None:
        from torch.optim.adam import adam  # takes seconds to import, which "cpp" can do without

        parameters = [self.sae.get_parameter(name) for name in names]
        beta1, beta2 = self.moments.betas
        adam(
            [parameter.detach() for parameter in parameters],
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [self.moments.first[name] for name in names],
            [self.moments.second[name] for name in names],
            [],
            [torch.full((), n_before, device=self.workers.device) for _ in names],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=learning_rate,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )


def _move_rows(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    moving: Tensor,
    betas: tuple[float, float],
    constants: tuple[float, float],
) -> None:
    """Take Adam's step of the rows that move, in place; the others keep weights and moments.

    weight, gradient, moments: (n, …); a row that does not move has no gradient. moving: (n,) bool.
    constants: see `Moments.advance`. Rows are not gathered: their number need not be known.
    """
    moving = moving.view(-1, *[1] * (weight.dim() - 1))
    (beta1, beta2), (rate, inverse_root) = betas, constants
    zero = gradient.new_zeros(())
    first.lerp_(gradient, torch.where(moving, 1 - beta1, zero))
    second.mul_(torch.where(moving, beta2, zero + 1)).addcmul_(gradient, gradient, value=1 - beta2)
    # Divided by infinity, a row stays where it is.
    root = second.sqrt().add_(torch.where(moving, EPS / inverse_root, zero + math.inf))
    weight.addcdiv_(first, root, value=-rate / inverse_root)


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    n_rows = max(1, _BLOCK_ELEMENTS // matrix.shape[1])
    for start in range(0, len(matrix), n_rows):
        yield slice(start, start + n_rows)


@torch.no_grad()
def _project_decoder_gradient(sae: TopKSparseAutoencoder) -> None:
    """Remove from each decoder direction's gradient the component parallel to it."""
    assert sae.W_dec.grad is not None
    for rows in _row_blocks(sae.W_dec):
        gradient, weight = sae.W_dec.grad[rows], sae.W_dec[rows]
        parallel = (gradient * weight).sum(dim=1, keepdim=True)
        gradient.addcmul_(weight, parallel, value=-1)


@torch.no_grad()
def _normalise_decoder(sae: TopKSparseAutoencoder, touched: Tensor | None) -> None:
    """Give decoder directions unit norm again; touched: (n_latents,) which, by default all."""
    for rows in _row_blocks(sae.W_dec):
        weight = sae.W_dec[rows]
        norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min_(1e-12)
        if touched is not None:
            norms = torch.where(touched[rows].unsqueeze(1), norms, 1.0)
        weight.div_(norms)
