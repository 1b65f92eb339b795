"""An SAE as other tools write it, and how it becomes one of ours: every difference is folded.

Theirs: x̂ = (D a + b_dec) in the normalised space, a = f(W (z − b_dec) + b_enc), where some tools do
not subtract b_dec, and where decoder directions need not have unit norm. Outputs stay equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sae import SAEConfig, as_metadata, describe, write_header
from saint.stage.errors import UserError
from saint.stage.files import atomic_path, save_torch

BLOCK_ROWS = 512
_UNIT_NORM_TOLERANCE = 1e-5  # float32 training leaves no more


@dataclass(frozen=True)
class ForeignSAE:
    """What another tool's file says.

    config: ours, without what the fold changes. w_enc, w_dec: (n_latents, d_model), views of
    memory-mapped tensors in any dtype. b_enc: (n_latents,), a gated SAE's gate bias. b_dec:
    (d_model,). threshold, magnitude_scale, magnitude_bias: (n_latents,), see `sae`.
    subtracts_b_dec: whether the encoder reads z − b_dec. selects_by_norm: whether topk or a
    threshold looks at activation · decoder norm.
    """

    config: SAEConfig
    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    magnitude_scale: Tensor | None = None
    magnitude_bias: Tensor | None = None
    subtracts_b_dec: bool = True
    selects_by_norm: bool = False


@dataclass(frozen=True)
class LazyTensor:
    """A float32 tensor that is made a block of rows at a time. read: (start, stop) to rows."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """Take a tensor as it is."""
        return cls(tuple(tensor.shape), lambda start, stop: tensor[start:stop])

    def blocks(self) -> Iterator[Tensor]:
        """Yield contiguous float32 blocks."""
        for start in range(0, self.shape[0], BLOCK_ROWS):
            yield self.read(start, min(start + BLOCK_ROWS, self.shape[0])).float().contiguous()


def per_row(matrix: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Return (n,) float64: `reduce` of float64 blocks of rows of an (n, d) matrix."""
    found = torch.empty(len(matrix), dtype=torch.float64)
    # One block's memory for all: small results between new ones would keep them from being freed.
    block = torch.empty(BLOCK_ROWS, matrix.shape[1], dtype=torch.float64)
    for start in range(0, len(matrix), BLOCK_ROWS):
        rows = matrix[start : start + BLOCK_ROWS]
        found[start : start + len(rows)] = reduce(block[: len(rows)].copy_(rows))
    return found


def check_shapes(found: ForeignSAE, source: str) -> None:
    """Raise UserError where a tensor does not fit the others."""
    n, d = found.config.n_latents, found.config.d_model
    wanted = {
        "encoder": (found.w_enc, (n, d)),
        "decoder": (found.w_dec, (n, d)),
        "encoder bias": (found.b_enc, (n,)),
        "decoder bias": (found.b_dec, (d,)),
        "threshold": (found.threshold, (n,)),
        "magnitude scale": (found.magnitude_scale, (n,)),
        "magnitude bias": (found.magnitude_bias, (n,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(f"{source}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if found.config.activation == "topk" and not 1 <= found.config.k <= n:
        raise UserError(f"{source}: k {found.config.k} is not between 1 and its {n} latents")


@torch.no_grad()
def fold(found: ForeignSAE) -> tuple[SAEConfig, dict[str, LazyTensor]]:
    """Return the config and tensors of our file, decoder directions of unit norm."""
    config, b_dec = found.config, found.b_dec.double()
    b_enc, bias = found.b_enc.double(), found.magnitude_bias
    scale, threshold = found.magnitude_scale, found.threshold
    if not found.subtracts_b_dec:
        shift = per_row(found.w_enc, lambda w: w @ b_dec)
        b_enc = b_enc + shift
        if bias is not None and scale is not None:
            bias = bias.double() + scale.double() * shift
    norms = per_row(found.w_dec, lambda w: torch.linalg.vector_norm(w, dim=1))
    norms = torch.where(norms > 0, norms, 1.0)
    factor = torch.ones_like(norms)  # of the encoder
    if float((norms - 1).abs().max()) <= _UNIT_NORM_TOLERANCE:
        norms = torch.ones_like(norms)
    elif config.activation == "gated":
        assert scale is not None and bias is not None
        scale, bias = scale.double() * norms, bias.double() * norms
    elif config.activation == "topk" and not found.selects_by_norm:
        scale = norms if scale is None else scale.double() * norms
    else:
        factor = norms
        if config.activation == "batchtopk":
            assert config.threshold is not None
            threshold = torch.full_like(norms, config.threshold)
            config = replace(config, activation="jumprelu", threshold=None, k=0)
        if threshold is not None and not found.selects_by_norm:
            threshold = threshold.double() * norms
    n, d = config.n_latents, config.d_model
    small = {"encoder.bias": b_enc * factor, "b_pre": b_dec, "threshold": threshold}
    small |= {"magnitude_scale": scale, "magnitude_bias": bias}
    narrow, inverse = factor.float().unsqueeze(1), (1 / norms).float()
    large = {
        "encoder.weight": LazyTensor((n, d), lambda a, b: found.w_enc[a:b].float() * narrow[a:b]),
        "decoder.weight": LazyTensor((d, n), lambda a, b: found.w_dec.T[a:b].float() * inverse),
    }
    return config, large | {
        name: LazyTensor.of(t.float()) for name, t in small.items() if t is not None
    }


def write_tensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, float32, atomically, a block of rows at a time."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, rows in tensors.items():
        start, end = end, end + 4 * math.prod(rows.shape)
        header[name] = {"dtype": "F32", "shape": rows.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for rows in tensors.values():
            for block in rows.blocks():
                file.write(block.numpy().data)


def as_tensor(rows: LazyTensor) -> Tensor:
    """Return a whole tensor of its own."""
    whole, start = torch.empty(rows.shape), 0
    for block in rows.blocks():
        whole[start : start + len(block)] = block
        start += len(block)
    return whole


def write_ours(path: Path, config: SAEConfig, tensors: Mapping[str, LazyTensor]) -> None:
    """Write our file, as `sae.save_sae` does, a block of rows at a time where it can be."""
    header = describe(config, tensors)
    if path.suffix == ".safetensors":
        write_tensors(path, tensors, as_metadata(header))
        write_header(path, header)
        return
    state = {name: as_tensor(rows) for name, rows in tensors.items()}
    header["config"]["max_activations"] = state.pop("max_activations", None)
    save_torch(path, header | {"state_dict": state})
