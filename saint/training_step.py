"""One optimiser step from micro-batches, in the three ways that `--kernels` names.

Each step object is given micro-batches (`accumulate`) and then moves the weights once (`apply`).
All use one `torch.optim.Adam`'s moments, so that a checkpoint does not depend on the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sae import TopKSparseAutoencoder, normalise_decoder
from saint import cpu_kernels
from saint.runtime import UserError, Workers, log
from saint.sae_gradients import (
    AuxGradient,
    AuxK,
    CpuKernels,
    Losses,
    SparseGradient,
    losses_and_gradients,
    sparse_gradient,
)

KERNELS = ("auto", "cpp", "sparse", "dense")


class Step(Protocol):
    """What the training loop needs of a step."""

    name: str

    def accumulate(self, x: Tensor, k: int, aux: AuxK | None, weight: float) -> Losses:
        """Take in a micro-batch: standardised x (n_tokens, d_model), its gradient times weight."""
        ...

    def apply(self, learning_rate: float, grad_clip: float) -> Tensor:
        """Move the weights by the sum over micro-batches and ranks; return the gradient's norm."""
        ...


def make_step(
    kernels: str, sae: TopKSparseAutoencoder, optimizer: torch.optim.Adam, workers: Workers
) -> Step:
    """Choose the step: "auto" is C++ (else sparse) on a CPU, and dense on a GPU.

    Raises UserError when "cpp" is asked for and cannot be had.
    """
    on_cpu = workers.device.type == "cpu"
    if kernels == "cpp" and not on_cpu:
        raise UserError(f"--kernels cpp works on a CPU, this run is on {workers.device}")
    if kernels == "cpp" or (kernels == "auto" and on_cpu):
        try:
            return CppStep(sae, optimizer, workers)
        except UserError as error:
            if kernels == "cpp":
                raise
            log.info("kernels: torch's sparse products, since there are no faster ones: %s", error)
            return TorchStep(sae, optimizer, workers, "sparse")
    return TorchStep(sae, optimizer, workers, "sparse" if kernels == "sparse" else "dense")


class TorchStep:
    """Dense gradients in `.grad`, from autograd ("dense") or sparse products ("sparse")."""

    def __init__(
        self,
        sae: TopKSparseAutoencoder,
        optimizer: torch.optim.Adam,
        workers: Workers,
        name: Literal["sparse", "dense"],
    ):
        self.sae, self.optimizer, self.workers = sae, optimizer, workers
        self.name: Literal["sparse", "dense"] = name

    def accumulate(self, x: Tensor, k: int, aux: AuxK | None, weight: float) -> Losses:
        """See `Step`."""
        return losses_and_gradients(self.sae, x, k, aux, kernel=self.name, weight=weight)

    def apply(self, learning_rate: float, grad_clip: float) -> Tensor:
        """See `Step`."""
        if self.workers.world_size > 1:
            for parameter in self.sae.parameters():
                dist.all_reduce(parameter.grad)
        project_decoder_gradient(self.sae)
        norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        normalise_decoder(self.sae)
        return norm


@torch.no_grad()
def project_decoder_gradient(sae: TopKSparseAutoencoder) -> None:
    """Remove from each decoder direction's gradient the component parallel to it."""
    assert sae.W_dec.grad is not None
    parallel = (sae.W_dec.grad * sae.W_dec).sum(dim=1, keepdim=True)
    sae.W_dec.grad.addcmul_(sae.W_dec, parallel, value=-1)


class CppStep:
    """No gradient is ever stored: the optimiser's pass makes each latent's from its tokens.

    Ranks exchange their tokens' activations and errors rather than gradients, so each does what
    one rank does with the whole batch.
    """

    name = "cpp"

    def __init__(
        self, sae: TopKSparseAutoencoder, optimizer: torch.optim.Adam, workers: Workers
    ):
        self.sae, self.optimizer, self.workers = sae, optimizer, workers
        self.pieces = CpuKernels()
        self._parts: list[SparseGradient] = []
        self._dead: Tensor | None = None

    def accumulate(self, x: Tensor, k: int, aux: AuxK | None, weight: float) -> Losses:
        """See `Step`."""
        losses, gradient = sparse_gradient(self.sae, x, k, aux, self.pieces, weight=weight)
        self._parts.append(gradient)
        self._dead = aux.dead if aux is not None else None
        return losses

    @torch.no_grad()
    def apply(self, learning_rate: float, grad_clip: float) -> Tensor:
        """See `Step`."""
        whole = self._sum_of_parts()
        aux = None
        if whole.aux is not None and self._dead is not None:
            aux = (self._dead, whole.aux.dec, whole.aux.enc, whole.aux.b)
        gradient = cpu_kernels.group_by_latent(
            self.sae.config.n_latents,
            *(whole.indices, whole.values, whole.g_values, whole.a, whole.g, aux),
        )
        parameters = cpu_kernels.point_to(*self._weights_and_moments())
        grad_b_pre = whole.g.sum(dim=0)
        norm = cpu_kernels.gradient_norm(gradient, parameters, grad_b_pre)
        scale = min(1.0, grad_clip / (norm + 1e-6))
        step = self._adam_step(learning_rate)
        cpu_kernels.update(gradient, parameters, step, scale, grad_b_pre)
        return torch.tensor(norm)

    def _sum_of_parts(self) -> SparseGradient:
        """Put the micro-batches' and then the ranks' tokens one after the other."""
        parts, self._parts = self._parts, []
        names = ("values", "g_values", "indices", "a", "g")
        whole = [_concatenate([getattr(part, name) for part in parts]) for name in names]
        aux = _add([part.aux for part in parts if part.aux is not None])
        if self.workers.world_size > 1:
            whole = [_gather(tensor, self.workers.world_size) for tensor in whole]
            if aux is not None:
                for tensor in (aux.dec, aux.enc, aux.b):
                    dist.all_reduce(tensor)
        return SparseGradient(*whole, aux)

    def _weights_and_moments(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for parameter in (self.sae.W_enc, self.sae.b_enc, self.sae.W_dec, self.sae.b_pre):
            state = self._state(parameter)
            yield parameter.detach(), state["exp_avg"], state["exp_avg_sq"]

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return Adam's state of a parameter, laid out as torch's own first step would."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _adam_step(self, learning_rate: float) -> cpu_kernels.AdamStep:
        group = self.optimizer.param_groups[0]
        group["lr"] = learning_rate
        for parameter in group["params"]:
            self._state(parameter)["step"] += 1
        n_steps = int(self._state(group["params"][0])["step"])
        beta1, beta2 = group["betas"]
        return cpu_kernels.AdamStep(
            beta1,
            beta2,
            learning_rate / (1 - beta1**n_steps),
            (1 - beta2**n_steps) ** -0.5,
            group["eps"],
        )


def _concatenate(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _gather(tensor: Tensor, world_size: int) -> Tensor:
    pieces = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(pieces, tensor)
    return torch.cat(pieces)


def _add(parts: list[AuxGradient]) -> AuxGradient | None:
    if not parts:
        return None
    for part in parts[1:]:
        parts[0].dec.add_(part.dec)
        parts[0].enc.add_(part.enc)
        parts[0].b.add_(part.b)
    return parts[0]
