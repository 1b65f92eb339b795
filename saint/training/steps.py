"""One optimiser step from micro-batches, in the ways that `--kernels` names.

Each step object is given micro-batches (`accumulate`) and then moves the weights once (`apply`).
All keep Adam's moments alike, so that a checkpoint does not depend on the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sae import TopKSparseAutoencoder, normalise_decoder
from saint.kernels import cpu
from saint.stage.program import UserError, Workers, log
from saint.training.losses import (
    AuxGradient,
    AuxK,
    CpuKernels,
    Losses,
    Pieces,
    SparseGradient,
    losses_and_gradients,
    sparse_gradient,
)
from saint.training.moments import Moments

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""As `TopKSparseAutoencoder.encode`."""
KERNELS = ("auto", "cpp", "cpp_float32", "triton", "sparse", "dense")
_LEAST_ROUNDED_D_MODEL = 256  # for shorter rows the error bound is wide, and there is little to win
BETAS = (0.9, 0.999)
EPS = 6.25e-10


class Step(Protocol):
    """What the training loop needs of a step."""

    @property
    def name(self) -> str:
        """Which of KERNELS it is, "auto" resolved."""
        ...

    def accumulate(self, x: Tensor, k: int, aux: AuxK | None, weight: float) -> Losses:
        """Take in a micro-batch: standardised x (n_tokens, d_model), its gradient times weight."""
        ...

    def apply(self, learning_rate: float, grad_clip: float) -> Tensor:
        """Move the weights by the sum over micro-batches and ranks; return the gradient's norm."""
        ...

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `TopKSparseAutoencoder.encode`, by these kernels."""
        ...

    def diagnostics(self) -> dict[str, float]:
        """Return metrics of the kernels themselves since the last call."""
        ...


def make_step(kernels: str, sae: TopKSparseAutoencoder, moments: Moments, workers: Workers) -> Step:
    """Choose the step: "auto" is C++ (else sparse) on a CPU, and dense on a GPU.

    "cpp" multiplies rounded numbers where that is faster and scores what could matter exactly,
    "cpp_float32" never does; "triton" is for GPUs. Raises UserError when these are asked for and
    cannot be had.
    """
    if kernels == "triton":
        try:
            from saint.training.triton_step import (
                TritonStep,  # not everywhere, and seconds to import
            )
        except ImportError as error:
            raise UserError(f"--kernels triton: {error} (pip install triton)") from None
        if moments.scales:
            raise UserError("--kernels triton keeps float32 moments only: not --moments int8")
        return TritonStep(sae, moments, workers)
    on_cpu = workers.device.type == "cpu"
    if kernels.startswith("cpp") and not on_cpu:
        raise UserError(f"--kernels {kernels} works on a CPU, this run is on {workers.device}")
    if kernels.startswith("cpp") or (kernels == "auto" and on_cpu):
        try:
            float32 = kernels == "cpp_float32"
            d_model = sae.config.d_model
            pieces = CpuKernels(rounded=False) if float32 else fastest_cpu_kernels(d_model)
            return CppStep(sae, moments, workers, pieces)
        except UserError as error:
            if kernels != "auto":
                raise
            log.info("kernels: torch's sparse products, since there are no faster ones: %s", error)
            return TorchStep(sae, moments, workers, "sparse")
    return TorchStep(sae, moments, workers, "sparse" if kernels == "sparse" else "dense")


def fastest_cpu_kernels(d_model: int) -> CpuKernels:
    """Multiply rounded numbers where that is faster. Raises UserError like `CpuKernels`."""
    rounded = d_model >= _LEAST_ROUNDED_D_MODEL and cpu.has_rounded_product()
    return CpuKernels(rounded=rounded)


@torch.no_grad()
def encode(sae: TopKSparseAutoencoder, pieces: Pieces, x: Tensor) -> tuple[Tensor, Tensor]:
    """As `TopKSparseAutoencoder.encode`, by the given pieces."""
    values, indices = pieces.encode(x - sae.b_pre, sae.W_enc, sae.b_enc, sae.config.k)
    return values, indices.long()


def fastest_encode(sae: TopKSparseAutoencoder) -> Encode:
    """Return the `sae.encode` of `make_step("auto", …)`, for weights that stay as they are."""
    if sae.W_enc.device.type != "cpu":
        return sae.encode
    try:
        return partial(encode, sae, fastest_cpu_kernels(sae.config.d_model))
    except UserError as error:
        log.info("encoder: torch's, since there is no faster one: %s", error)
        return sae.encode


class TorchStep:
    """Dense gradients in `.grad`, from autograd ("dense") or sparse products ("sparse")."""

    def __init__(
        self,
        sae: TopKSparseAutoencoder,
        moments: Moments,
        workers: Workers,
        name: Literal["sparse", "dense"],
    ):
        self.sae, self.moments, self.workers = sae, moments, workers
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
        self._adam(learning_rate)
        self.sae.zero_grad(set_to_none=True)
        normalise_decoder(self.sae)
        return norm

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        return self.sae.encode(x)

    def diagnostics(self) -> dict[str, float]:
        """See `Step`."""
        return {}

    @torch.no_grad()
    def _adam(self, learning_rate: float) -> None:
        from torch.optim.adam import adam  # takes seconds to import, which "cpp" can do without

        before = float(self.moments.n_steps)
        self.moments.n_steps += 1
        for name, parameter in self.sae.named_parameters():
            assert parameter.grad is not None
            for rows, first, second in self.moments.blocks(name):
                adam(
                    [parameter[rows]],
                    [parameter.grad[rows]],
                    [first],
                    [second],
                    [],
                    [torch.tensor(before, device=self.workers.device)],
                    fused=True,
                    amsgrad=False,
                    beta1=BETAS[0],
                    beta2=BETAS[1],
                    lr=learning_rate,
                    weight_decay=0.0,
                    eps=EPS,
                    maximize=False,
                )


@torch.no_grad()
def project_decoder_gradient(sae: TopKSparseAutoencoder) -> None:
    """Remove from each decoder direction's gradient the component parallel to it."""
    assert sae.W_dec.grad is not None
    parallel = (sae.W_dec.grad * sae.W_dec).sum(dim=1, keepdim=True)
    sae.W_dec.grad.addcmul_(sae.W_dec, parallel, value=-1)


class FusedStep:
    """No gradient is ever stored: the optimiser's pass makes each latent's from its tokens.

    Ranks exchange their tokens' activations and errors rather than gradients, so each does what
    one rank does with the whole batch. Subclasses have `apply`, the pass itself.
    """

    def __init__(
        self, sae: TopKSparseAutoencoder, moments: Moments, workers: Workers, pieces: Pieces
    ):
        self.sae, self.moments, self.workers, self.pieces = sae, moments, workers, pieces
        self._parts: list[SparseGradient] = []
        self._dead: Tensor | None = None

    def accumulate(self, x: Tensor, k: int, aux: AuxK | None, weight: float) -> Losses:
        """See `Step`."""
        losses, gradient = sparse_gradient(self.sae, x, k, aux, self.pieces, weight=weight)
        self._parts.append(gradient)
        self._dead = aux.dead if aux is not None else None
        return losses

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        return encode(self.sae, self.pieces, x)

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
        return SparseGradient(**dict(zip(names, whole, strict=True)), aux=aux)

    def _weight_and_moments(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return a weight and Adam's two moments of it."""
        weight: Tensor = getattr(self.sae, name)
        return weight.detach(), self.moments.first[name], self.moments.second[name]

    def _adam_constants(self, learning_rate: float) -> tuple[float, float]:
        """Count a step; return lr / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ)."""
        self.moments.n_steps += 1
        correction1, correction2 = (1 - beta**self.moments.n_steps for beta in BETAS)
        return learning_rate / correction1, correction2**-0.5


class CppStep(FusedStep):
    """The fused step in C++, on a CPU."""

    pieces: CpuKernels

    def __init__(
        self, sae: TopKSparseAutoencoder, moments: Moments, workers: Workers, pieces: CpuKernels
    ):
        self.name = "cpp" if pieces.encode.rounded else "cpp_float32"
        super().__init__(sae, moments, workers, pieces)

    @torch.no_grad()
    def apply(self, learning_rate: float, grad_clip: float) -> Tensor:
        """See `Step`."""
        whole = self._sum_of_parts()
        aux = None
        if whole.aux is not None and self._dead is not None:
            aux = (self._dead, whole.aux.dec, whole.aux.enc, whole.aux.b)
        gradient = cpu.group_by_latent(
            self.sae.config.n_latents,
            *(whole.indices, whole.values, whole.g_values, whole.a, whole.g, aux),
        )
        names = ("W_enc", "b_enc", "W_dec", "b_pre")
        parameters = cpu.point_to(
            *((*self._weight_and_moments(name), self.moments.scales.get(name)) for name in names)
        )
        grad_b_pre = whole.g.sum(dim=0)
        norm = cpu.gradient_norm(gradient, parameters, grad_b_pre)
        scale = min(1.0, grad_clip / (norm + 1e-6))
        constants = self._adam_constants(learning_rate)
        step = cpu.AdamStep(*BETAS, *constants, EPS, self.moments.n_steps)
        cpu.update(gradient, parameters, step, scale, grad_b_pre)
        self.pieces.encode.forget_weights()
        return torch.tensor(norm)

    def diagnostics(self) -> dict[str, float]:
        """See `Step`."""
        return self.pieces.encode.diagnostics()


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
