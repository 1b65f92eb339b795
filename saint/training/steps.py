"""One optimiser step from micro-batches, in the ways that `--kernels` names.

Each step object is given micro-batches (`accumulate`) and then moves the weights once (`apply`).
All keep Adam's moments alike, so that a checkpoint does not depend on the kernels.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from sae import ActiveLatents, TopKSparseAutoencoder, encode, normalise_decoder
from saint.kernels import torch_ops
from saint.kernels.fastest import encode as encode_by
from saint.kernels.fastest import fastest_cpu_kernels
from saint.kernels.pieces import CpuKernels, TorchKernels
from saint.stage.errors import UserError, log
from saint.stage.workers import Workers
from saint.training.fused_step import CppStep, norm_over_latents, over_ranks
from saint.training.losses import AuxK, Jump, Losses, losses_and_gradients
from saint.training.moments import EPS, Moments

KERNELS = ("auto", "cpp", "cpp_float32", "triton", "sparse", "dense")


class Step(Protocol):
    """What the training loop needs of a step."""

    sae: TopKSparseAutoencoder

    @property
    def name(self) -> str:
        """Which of KERNELS it is, "auto" resolved."""
        ...

    def top(self, a: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `kernels.torch_ops.TopK`, of the encoder's inputs x − b_pre; this rank's latents."""
        ...

    def above(self, a: Tensor, bias: Tensor) -> ActiveLatents:
        """Return where a · W_encᵀ + bias exceeds 0, and by how much; bias: (n_latents,)."""
        ...

    def accumulate(
        self,
        x: Tensor,
        chosen: ActiveLatents | int,
        aux: AuxK | None,
        weight: float,
        prefixes: tuple[int, ...] = (),
        jump: Jump | None = None,
    ) -> Losses:
        """Take in a micro-batch: standardised x (n_tokens, d_model), its gradient times weight.

        chosen, prefixes, jump: see `losses.sparse_gradient`.
        """
        ...

    def apply(self, learning_rate: float, grad_clip: float) -> Tensor:
        """Move the weights by the sum over micro-batches and ranks; return the gradient's norm."""
        ...

    def encode(self, x: Tensor) -> ActiveLatents:
        """As `TopKSparseAutoencoder.encode`, by these kernels."""
        ...

    def diagnostics(self) -> dict[str, float]:
        """Return metrics of the kernels themselves since the last call."""
        ...


def make_step(kernels: str, sae: TopKSparseAutoencoder, moments: Moments, workers: Workers) -> Step:
    """Choose the step: "auto" is C++ (else sparse) on a CPU, and dense on a GPU (sparse in shards).

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
    sparse = kernels == "sparse" or workers.latents.size > 1
    return TorchStep(sae, moments, workers, "sparse" if sparse else "dense")


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
        self.pieces = over_ranks(TorchKernels(), workers.latents) if name == "sparse" else None
        self._touched: Tensor | None = None  # latents with a gradient, where the others are let be

    def top(self, a: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        return encode(a, self.sae.W_enc, self.sae.b_enc, k)

    @torch.no_grad()
    def above(self, a: Tensor, bias: Tensor) -> ActiveLatents:
        """See `Step`."""
        return torch_ops.above(a, self.sae.W_enc, bias)

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
        losses = losses_and_gradients(self.sae, x, chosen, aux, pieces=self.pieces, **how)
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
        project_decoder_gradient(self.sae)
        norm = self._clip(grad_clip)
        touched, self._touched = self._touched, None
        self._adam(learning_rate, touched)
        self.sae.zero_grad(set_to_none=True)
        self._normalise_decoder(touched)
        return norm

    def encode(self, x: Tensor) -> ActiveLatents:
        """See `Step`."""
        if self.pieces is None or self.workers.latents.size == 1:
            return self.sae.encode(x)
        return encode_by(self.sae, self.pieces, x)

    def diagnostics(self) -> dict[str, float]:
        """See `Step`."""
        return {}

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
    def _normalise_decoder(self, touched: Tensor | None) -> None:
        if touched is None:
            normalise_decoder(self.sae)
            return
        norms = torch.linalg.vector_norm(self.sae.W_dec, dim=1).clamp_min(1e-12)
        self.sae.W_dec.div_(torch.where(touched, norms, 1.0).unsqueeze(1))

    @torch.no_grad()
    def _adam(self, learning_rate: float, touched: Tensor | None) -> None:
        from torch.optim.adam import adam  # takes seconds to import, which "cpp" can do without

        before = float(self.moments.n_steps)
        self.moments.n_steps += 1
        beta1, beta2 = self.moments.betas
        for name, parameter in self.sae.named_parameters():
            assert parameter.grad is not None
            some, rate = touched, learning_rate
            if name == "threshold":
                some = None if touched is None else parameter.grad != 0
                rate *= self.moments.threshold_rate
            for rows, first, second in self.moments.blocks(name, some):
                weight = parameter[rows]  # a copy, unless rows are a slice
                adam(
                    [weight],
                    [parameter.grad[rows]],
                    [first],
                    [second],
                    [],
                    [torch.tensor(before, device=self.workers.device)],
                    fused=True,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=rate,
                    weight_decay=0.0,
                    eps=EPS,
                    maximize=False,
                )
                if not isinstance(rows, slice):
                    parameter[rows] = weight
        if self.sae.threshold is not None:
            self.sae.threshold.clamp_(min=0)


@torch.no_grad()
def project_decoder_gradient(sae: TopKSparseAutoencoder) -> None:
    """Remove from each decoder direction's gradient the component parallel to it."""
    assert sae.W_dec.grad is not None
    parallel = (sae.W_dec.grad * sae.W_dec).sum(dim=1, keepdim=True)
    sae.W_dec.grad.addcmul_(sae.W_dec, parallel, value=-1)
