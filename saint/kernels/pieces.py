"""What a training step is made of, in torch or C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sae import ActiveLatents, encode
from saint.kernels import cpu, torch_ops
from saint.kernels.torch_encoder import Encoder
from saint.stage.workers import Axis

LOOKED_AT = 128  # a token's latents that are looked at first where their number is not known
_ALONE = Axis()


@dataclass(frozen=True)
class AuxGradient:
    """AuxK's gradients of the dead latents: W_dec, W_enc (n_dead, d_model), b_enc (n_dead,)."""

    dec: Tensor
    enc: Tensor
    b: Tensor


@dataclass(frozen=True)
class SparseGradient:
    """A batch's gradient before any sum over tokens: what the weights' gradients are made of.

    active: the activations, in n_parts rows a token, see `torch_ops.nest`. g_values: (n_active,)
    ∂loss/∂activation; Triton's pass over latents makes its own. a: (n_tokens, d_model), the
    encoder's input x − b_pre. g: (n_tokens · n_parts, d_model) ∂loss/∂x̂ as the row's decoder
    directions see it. g_b_pre: (d_model,) what reaches b_pre through x̂. threshold: (n_latents,)
    thresholds' gradient, where they are learned.
    """

    active: ActiveLatents
    g_values: Tensor
    a: Tensor
    g: Tensor
    g_b_pre: Tensor
    aux: AuxGradient | None = None
    threshold: Tensor | None = None


class Pieces(Protocol):
    """What a step is made of: `sae.encode` and `torch_ops.reconstruct`, or others like them.

    Those of one rank do its own part of the latents, whose numbers begin at 0.
    """

    @property
    def ranks(self) -> Axis:
        """Who shares the latents."""
        ...

    @property
    def encode(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """As `sae.encode`."""
        ...

    @property
    def above(self) -> Callable[[Tensor, Tensor, Tensor], ActiveLatents]:
        """As `torch_ops.above`."""
        ...

    @property
    def nest(self) -> Callable[..., ActiveLatents]:
        """As `torch_ops.nest`."""
        ...

    @property
    def reconstruct(self) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """As `torch_ops.reconstruct`."""
        ...


class PartPieces(Pieces, Protocol):
    """Pieces of which `Shared` can be made."""

    @property
    def decode(self) -> torch_ops.Decode:
        """As `torch_ops.decode`."""
        ...

    @property
    def gather_dot(self) -> torch_ops.GatherDot:
        """As `torch_ops.gather_dot`."""
        ...


class TorchKernels:
    """The pieces of the step as torch operations, on any device.

    encoder: instead of the float32 product, where the device is faster with it. waits: whether it
    may wait for the device to know which tokens are unsure.
    """

    ranks = _ALONE
    nest = staticmethod(torch_ops.nest)
    reconstruct = staticmethod(torch_ops.reconstruct)
    decode = staticmethod(torch_ops.decode)
    gather_dot = staticmethod(torch_ops.gather_dot)

    def __init__(self, encoder: Encoder | None = None, *, waits: bool = True) -> None:
        self.encoder = encoder
        self.encode: Callable[..., tuple[Tensor, Tensor]] = encode
        self.above = torch_ops.above
        if encoder is not None:
            self.encode = encoder if waits else encoder.without_waiting
            self.above = torch_ops.above_by(encoder, LOOKED_AT)


class CpuKernels:
    """The same pieces in C++. Raises UserError where they cannot be compiled.

    rounded: see `cpu.Encoder`.
    """

    ranks = _ALONE
    decode = staticmethod(torch_ops.decode)
    gather_dot = staticmethod(cpu.gather_dot)

    def __init__(self, *, rounded: bool) -> None:
        cpu.library()
        self.encode = cpu.Encoder(rounded=rounded)
        self.above = self.encode.above
        self.nest = cpu.nest
        self.reconstruct = cpu.reconstruct


class Shared:
    """Pieces of ranks that share the latents in equal, consecutive parts.

    encode, above: of this rank's latents alone. Reconstructions are sums over the ranks, and equal
    on all of them; whatever is said of a latent, its rank says.
    """

    def __init__(self, inner: PartPieces, ranks: Axis) -> None:
        self.inner, self.ranks = inner, ranks
        self.encode, self.above = inner.encode, inner.above

    def nest(self, active: ActiveLatents, prefixes: Sequence[int]) -> ActiveLatents:
        """As `torch_ops.nest`; prefixes: of all latents."""
        n_here = prefixes[-1] // self.ranks.size
        first = self.ranks.rank * n_here
        return self.inner.nest(active, [min(max(end - first, 0), n_here) for end in prefixes])

    def reconstruct(self, *args: Any, **how: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `torch_ops.reconstruct`."""

        def decode(active: ActiveLatents, w_dec: Tensor) -> Tensor:
            return self.ranks.sum(self.inner.decode(active, w_dec))

        return torch_ops.reconstruct(*args, **how, by=(decode, self.inner.gather_dot))


def largest(pieces: Pieces, a: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> ActiveLatents:
    """Return the pieces' latents that are among each token's k largest, those of all ranks.

    a: (n_tokens, d_model), the encoder's inputs x − b_pre.
    """
    values, indices = pieces.encode(a, w_enc, b_enc, min(k, len(w_enc)))
    if pieces.ranks.size == 1:
        return ActiveLatents.of_matrices(values, indices)
    kept = among_largest(values, k, pieces.ranks) & (values > 0)
    return torch_ops.keep(values, indices, kept, int(kept.sum()))


def among_largest(values: Tensor, k: int, ranks: Axis) -> Tensor:
    """Return which of a rank's values (n, m) are among the k largest of their row on all ranks.

    m ≤ k may differ from rank to rank. (n, m) bool; of equal values too, k of a row in all.
    """
    n, m = values.shape
    padded = F.pad(values, (0, k - m), value=-torch.inf)
    everyones = ranks.gather(padded).transpose(0, 1).reshape(n, -1)
    first = torch.zeros_like(everyones, dtype=torch.bool)
    first.scatter_(1, everyones.topk(k, dim=1, sorted=False).indices, True)
    return first.view(n, ranks.size, k)[:, ranks.rank, :m]
