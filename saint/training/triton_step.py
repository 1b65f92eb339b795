"""The fused training step in Triton, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sae import ActiveLatents, TopKSparseAutoencoder
from saint.kernels import torch_ops, triton_ops
from saint.kernels.fastest import encode
from saint.kernels.pieces import LOOKED_AT
from saint.kernels.rounding import LEAST_CAPABILITY
from saint.kernels.triton_encoder import Encoder
from saint.kernels.triton_gradient import gradient_by_latent
from saint.kernels.triton_update import AdamStep, Codes, update
from saint.stage.errors import UserError
from saint.stage.workers import Axis, Workers
from saint.training.fused_step import FusedStep
from saint.training.moments import EPS, MATRICES, Moments, key


class TritonKernels:
    """The pieces of the step in Triton. Raises UserError where the device cannot run them.

    waits: see `TorchKernels`.
    """

    def __init__(self, device: torch.device, encoder: Encoder, *, waits: bool = True) -> None:
        if not triton_ops.interpreted():
            if device.type != "cuda":
                raise UserError(f"--kernels triton works on a GPU, this run is on {device}")
            capability = torch.cuda.get_device_capability(device)
            if capability < LEAST_CAPABILITY:
                name = torch.cuda.get_device_name(device)
                raise UserError(
                    f"--kernels triton needs bfloat16 products (compute capability 8.0 or more), "
                    f"{name} has {capability[0]}.{capability[1]}"
                )
        self.ranks = Axis()
        self.encode = encoder if waits else encoder.without_waiting
        self.above = torch_ops.above_by(encoder, LOOKED_AT)
        self.nest = torch_ops.nest
        self.reconstruct = triton_ops.reconstruct


class TritonStep(FusedStep):
    """The fused step in Triton, for which the host never waits, where the objective lets it."""

    name = "triton"

    def __init__(self, sae: TopKSparseAutoencoder, moments: Moments, workers: Workers):
        self.encoder = Encoder()
        pieces = TritonKernels(workers.device, self.encoder, waits=False)
        super().__init__(sae, moments, workers, pieces)
        self._outside = TritonKernels(workers.device, self.encoder)

    @torch.no_grad()
    def apply(self, learning_rate: float, grad_clip: float) -> Tensor:
        """See `Step`."""
        sae, whole = self.sae, self._sum_of_parts()
        gradient = gradient_by_latent(whole, sae.W_dec.detach(), self._dead)
        # b_pre also enters every pre-activation, through W_enc · (x − b_pre).
        grad_b_pre = whole.g_b_pre - sae.W_enc.T @ gradient.b
        norm = gradient.squared_norm + grad_b_pre.double().square().sum()
        if whole.threshold is not None:
            norm += whole.threshold.double().square().sum()
        norm = norm.sqrt()
        scale = (grad_clip / (norm + 1e-6)).clamp(max=1.0).float()
        betas, lazy = self.moments.betas, self.moments.lazy
        constants = self.moments.advance(learning_rate)
        step = AdamStep(*betas, EPS, *constants, lazy)
        weights = self.encoder.rounded_weights(sae.W_enc)
        parameters = [self._weight_and_moments(name) for name in ("W_enc", "b_enc", "W_dec")]
        rounded = (weights.rows, weights.norms)
        update(gradient, parameters, rounded, scale, step, self._codes())
        step.move(*self._weight_and_moments("b_pre"), scale * grad_b_pre)
        self._move_thresholds(whole.threshold, scale, constants)
        return norm.float()

    def _codes(self) -> Codes | None:
        moments = self.moments
        if not moments.scales:
            return None
        keys = [key(moments.n_steps, n, self.workers.device) for n in range(len(MATRICES))]
        scales = moments.scales
        return Codes(scales["W_enc"], scales["W_dec"], torch.stack(keys))

    def encode(self, x: Tensor) -> ActiveLatents:
        """See `Step`."""
        return encode(self.sae, self._outside, x)

    def diagnostics(self) -> dict[str, Tensor]:
        """See `Step`."""
        return self.encoder.diagnostics()
