"""One optimiser step from micro-batches, in the ways that `--kernels` names.

Each step object is given micro-batches (`accumulate`) and then moves the weights once (`apply`).
All keep Adam's moments alike, so that a checkpoint does not depend on the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from sae import ActiveLatents, TopKSparseAutoencoder
from saint.kernels.fastest import fastest_cpu_kernels
from saint.kernels.pieces import CpuKernels
from saint.stage.errors import UserError, log
from saint.stage.workers import Workers
from saint.training.fused_step import CppStep
from saint.training.losses import AuxK, Jump, Losses
from saint.training.moments import Moments
from saint.training.torch_step import TorchStep

KERNELS = ("auto", "cpp", "cpp_float32", "torch", "triton", "dense")


class Step(Protocol):
    """What the training loop needs of a step."""

    sae: TopKSparseAutoencoder
    moments: Moments

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

    def diagnostics(self) -> Mapping[str, float | Tensor]:
        """Return metrics of the kernels themselves since the last call; tensors are ()."""
        ...


def make_step(kernels: str, sae: TopKSparseAutoencoder, moments: Moments, workers: Workers) -> Step:
    """Choose the step: "auto" is C++ (else torch) on a CPU, and torch on a GPU.

    "cpp" multiplies rounded numbers where that is faster and scores what could matter exactly,
    "cpp_float32" never does; "torch" does on GPUs that can; "triton" is for GPUs. Raises UserError
    when these are asked for and cannot be had: "triton" and "dense" where ranks share the latents.
    """
    if kernels in ("dense", "triton") and workers.latents.size > 1:
        raise UserError(f"--kernels {kernels} is not for --latent_parallel_size: leave it out")
    if kernels == "triton":
        try:
            from saint.training.triton_step import (
                TritonStep,  # not everywhere, and seconds to import
            )
        except ImportError as error:
            raise UserError(f"--kernels triton: {error} (pip install triton)") from None
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
            log.info("kernels: torch's, since there are no faster ones: %s", error)
    return TorchStep(sae, moments, workers, "dense" if kernels == "dense" else "torch")
