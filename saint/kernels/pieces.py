"""What a training step is made of, in torch or C++."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sae import ActiveLatents, encode
from saint.kernels import cpu, torch_ops


@dataclass(frozen=True)
class AuxGradient:
    """AuxK's gradients of the dead latents: W_dec, W_enc (n_dead, d_model), b_enc (n_dead,)."""

    dec: Tensor
    enc: Tensor
    b: Tensor


@dataclass(frozen=True)
class SparseGradient:
    """A batch's gradient before any sum over tokens: what the weights' gradients are made of.

    active: the activations. g_values: (n_active,) ∂loss/∂activation. a, g: (n_tokens, d_model), the
    encoder's input x − b_pre, and ∂loss/∂x̂ as the entries' decoder rows see it. g_b_pre:
    (d_model,) what reaches b_pre through x̂. A token may stand there several times, each with some
    of its latents.
    """

    active: ActiveLatents
    g_values: Tensor
    a: Tensor
    g: Tensor
    g_b_pre: Tensor
    aux: AuxGradient | None


class Pieces(Protocol):
    """What a step is made of: `sae.encode` and `torch_ops.reconstruct`, or others like them."""

    @property
    def encode(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """As `sae.encode`."""
        ...

    @property
    def reconstruct(self) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """As `torch_ops.reconstruct`."""
        ...


class TorchKernels:
    """The pieces of the step as torch operations, on any device."""

    encode = staticmethod(encode)
    reconstruct = staticmethod(torch_ops.reconstruct)


class CpuKernels:
    """The same pieces in C++. Raises UserError where they cannot be compiled.

    rounded: see `cpu.Encoder`.
    """

    def __init__(self, *, rounded: bool) -> None:
        cpu.library()
        self.encode = cpu.Encoder(rounded=rounded)
        self.reconstruct = cpu.reconstruct
