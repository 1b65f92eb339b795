"""The TopK sparse autoencoder: model, checkpoints, steering edit.

Source: Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saint.stage.errors import UserError
from saint.stage.files import save_torch

FORMAT = "saint.sae"
VERSION = 1
# Pre-activations of one block: 2^26 float32 are 256 MB.
BLOCK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class SAEConfig:
    """What a checkpoint says about itself.

    layer, hook_point, prepend_bos, max_token_length: where its inputs were captured.
    norm_eps: added to the per-token standard deviation. held_out_*: the rule of the held-out split.
    *_fingerprint: identity of the language model and the sentence dataset.
    """

    d_model: int
    n_latents: int
    k: int
    layer: int | None = None
    hook_point: str = "resid_pre"
    prepend_bos: bool = True
    max_token_length: int | None = None
    norm_eps: float = 1e-6
    normalisation: str = "per_token_standardise"
    held_out_fraction: float = 0.05
    held_out_seed: int = 0
    model_fingerprint: str | None = None
    dataset_fingerprint: str | None = None


def standardise(x: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract each token's mean over d_model and divide by its (unbiased) deviation + eps.

    x: (..., d_model), any float dtype. Returns float32 z (..., d_model), mean and scale (..., 1),
    with x = z * scale + mean.
    """
    x = x.float()
    std, mean = torch.std_mean(x, dim=-1, keepdim=True)
    scale = std + eps
    return (x - mean) / scale, mean, scale


def encode(a: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of a · w_encᵀ + b_enc per row, after ReLU, and their indices.

    a: (n_tokens, d_model) float32. w_enc: (n_latents, d_model). b_enc: (n_latents,).
    Returns values (n_tokens, k) float32 and indices (n_tokens, k) int64, in no particular order.
    """
    n_tokens, n_latents = a.shape[0], w_enc.shape[0]
    rows = max(1, BLOCK_ELEMENTS // n_latents)
    values = a.new_empty(n_tokens, k)
    indices = torch.empty(n_tokens, k, dtype=torch.int64, device=a.device)
    for start in range(0, n_tokens, rows):
        block = slice(start, start + rows)
        pre = torch.addmm(b_enc, a[block], w_enc.T)
        torch.topk(pre, k, dim=1, sorted=False, out=(values[block], indices[block]))
    return values.relu_(), indices


def decode(values: Tensor, indices: Tensor, w_dec: Tensor) -> Tensor:
    """Return (n_tokens, d_model) sums of values · decoder rows; w_dec: (n_latents, d_model)."""
    return F.embedding_bag(indices, w_dec, per_sample_weights=values, mode="sum")


class TopKSparseAutoencoder(nn.Module):
    """x̂ = W_decᵀ · ReLU(TopK(W_enc · (x − b_pre) + b_enc)) + b_pre, on standardised tokens.

    W_enc, W_dec: (n_latents, d_model), rows are latents' encoder and decoder directions; decoder
    rows have unit norm. b_enc: (n_latents,). b_pre: (d_model,). All float32.
    max_activations: (n_latents,) float32, each latent's largest activation over the captured
    tokens with these weights (the steering unit), or None where it is not known.
    """

    def __init__(self, config: SAEConfig, *, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        n, d = config.n_latents, config.d_model
        self.W_enc = nn.Parameter(torch.empty(n, d, device=device))
        self.b_enc = nn.Parameter(torch.zeros(n, device=device))
        self.W_dec = nn.Parameter(torch.empty(n, d, device=device))
        self.b_pre = nn.Parameter(torch.zeros(d, device=device))
        self.max_activations: Tensor | None = None

    @torch.no_grad()
    def initialise(self, mean: Tensor, *, seed: int) -> None:
        """Draw random unit decoder directions, the encoder as their transpose, b_pre as the mean.

        mean: (d_model,) in the standardised input space. The draw is the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, self.config.n_latents, 4096):
            rows = self.W_dec[start : start + 4096]
            draw = torch.randn(rows.shape, generator=generator)
            rows.copy_(draw / torch.linalg.vector_norm(draw, dim=1, keepdim=True))
        self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_pre.copy_(mean)

    def pre_activations(self, x: Tensor) -> Tensor:
        """Return (n_tokens, n_latents) encoder outputs before TopK of standardised x."""
        return torch.addmm(self.b_enc, x - self.b_pre, self.W_enc.T)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keep each token's k largest latents (Gao et al., sec. 2.3).

        x: (n_tokens, d_model), already standardised. Memory is bounded: long inputs go in blocks.
        Returns values (n_tokens, k), non-negative, and indices (n_tokens, k), int64.
        """
        return encode(x - self.b_pre, self.W_enc, self.b_enc, self.config.k)

    @torch.no_grad()
    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Return the (n_tokens, d_model) standardised reconstruction of sparse activations."""
        return decode(values, indices, self.W_dec) + self.b_pre

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct standardised tokens x: (n_tokens, d_model)."""
        return self.decode(*self.encode(x))

    @torch.no_grad()
    def reconstruct(self, activations: Tensor) -> Tensor:
        """Reconstruct raw activations (..., d_model), in their own scale and dtype."""
        z, mean, scale = standardise(activations, self.config.norm_eps)
        flat = z.reshape(-1, z.shape[-1])
        return (self(flat).reshape(z.shape) * scale + mean).to(activations.dtype)

    @torch.no_grad()
    def latent_activations(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return (n_tokens, m) activations, after TopK, of m latents on standardised x."""
        values, indices = self.encode(x)
        hits = indices.unsqueeze(-1) == latents.to(indices.device)
        return (values.unsqueeze(-1) * hits).sum(dim=1)


@torch.no_grad()
def normalise_decoder(sae: TopKSparseAutoencoder) -> None:
    """Give each latent's decoder direction unit norm again."""
    sae.W_dec.div_(torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True).clamp_min(1e-12))


def save_sae(path: Path, sae: TopKSparseAutoencoder) -> None:
    """Write a checkpoint atomically; `decoder.weight` is stored as (d_model, n_latents)."""
    config = asdict(sae.config)
    config["max_activations"] = None if sae.max_activations is None else sae.max_activations.cpu()
    state = {
        "encoder.weight": sae.W_enc.detach().cpu(),
        "encoder.bias": sae.b_enc.detach().cpu(),
        "decoder.weight": sae.W_dec.detach().cpu().T.contiguous(),
        "b_pre": sae.b_pre.detach().cpu(),
    }
    record = {"format": FORMAT, "version": VERSION, "config": config, "state_dict": state}
    save_torch(path, record)


def load_sae(
    path: Path,
    *,
    device: torch.device | str,
    k: int | None = None,
    layer: int | None = None,
    hook_point: str | None = None,
    no_bos: bool = False,
) -> TopKSparseAutoencoder:
    """Load a checkpoint written by `save_sae`, or a bare state dict with the same keys.

    k, layer, hook_point, no_bos: what a bare state dict (older checkpoints) does not know; for a
    full checkpoint they must agree with it. Raises UserError when the file is missing, damaged, of
    an unknown version, when a tensor disagrees with the config, or when a flag contradicts it.
    """
    record = _read_checkpoint(path)
    maximum = None
    if "state_dict" in record:
        if record.get("format") != FORMAT or record.get("version") != VERSION:
            raise UserError(
                f"{path}: format {record.get('format')} version {record.get('version')} "
                "is not known here"
            )
        fields = dict(record["config"])
        maximum = fields.pop("max_activations", None)
        config = SAEConfig(**fields)
        _refuse_contradictions(path, config, k=k, layer=layer, hook_point=hook_point, no_bos=no_bos)
        state = record["state_dict"]
    else:
        state = {name.removeprefix("module."): tensor for name, tensor in record.items()}
        config = _bare_config(path, state, k, layer, hook_point, no_bos)
    sae = TopKSparseAutoencoder(config, device=device)
    _copy_state(path, sae, state)
    if maximum is not None:
        sae.max_activations = maximum.to(device)
    return sae.requires_grad_(False)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} does not exist: train an SAE first (sae_training.py)")
    try:
        record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
        raise UserError(
            f"{path} is not a readable SAE checkpoint: damaged, or not sae_training.py's"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is not an SAE checkpoint")
    return record


def _refuse_contradictions(path: Path, config: SAEConfig, **flags: Any) -> None:
    no_bos = flags.pop("no_bos")
    if no_bos and config.prepend_bos:
        raise UserError(f"{path} was trained with a BOS token, --no_bos says without")
    for name, value in flags.items():
        if value is not None and value != getattr(config, name):
            raise UserError(f"{path} has {name} {getattr(config, name)}, --{name} says {value}")


def _bare_config(
    path: Path,
    state: dict[str, Tensor],
    k: int | None,
    layer: int | None,
    hook_point: str | None,
    no_bos: bool,
) -> SAEConfig:
    weight = state.get("encoder.weight")
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UserError(f"{path} is not an SAE checkpoint: it has no encoder.weight matrix")
    if k is None:
        raise UserError(f"{path} is a bare state dict, which does not know its k: name it with --k")
    return SAEConfig(
        d_model=weight.shape[1],
        n_latents=weight.shape[0],
        k=k,
        layer=layer,
        hook_point=hook_point or "resid_pre",
        prepend_bos=not no_bos,
    )


@torch.no_grad()
def _copy_state(path: Path, sae: TopKSparseAutoencoder, state: dict[str, Tensor]) -> None:
    n, d = sae.config.n_latents, sae.config.d_model
    if not 1 <= sae.config.k <= n:
        raise UserError(f"{path}: k {sae.config.k} is not between 1 and its {n} latents")
    wanted = {
        "encoder.weight": (sae.W_enc, (n, d)),
        "encoder.bias": (sae.b_enc, (n,)),
        "decoder.weight": (sae.W_dec, (d, n)),
        "b_pre": (sae.b_pre, (d,)),
    }
    for name, (parameter, shape) in wanted.items():
        tensor = state.get(name)
        if tensor is None:
            raise UserError(f"{path} has no tensor {name}")
        if tuple(tensor.shape) != shape:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        parameter.copy_(tensor.T if name == "decoder.weight" else tensor)


@dataclass(frozen=True)
class Steer:
    """One latent's wish: which activation it should have.

    mode: "add" (its activation + amount), "set" (amount), "scale" (its activation × amount) or
    "ablate" (0). amount: in the SAE's activation units for add and set, a factor for scale.
    """

    latent: int
    mode: Literal["add", "set", "scale", "ablate"]
    amount: float = 0.0


def steering_shift(sae: TopKSparseAutoencoder, steers: Sequence[Steer], x: Tensor) -> Tensor:
    """Return std(x) · Σ_i (target_i − a_i) · d_i, what steering adds to activations x.

    x: (..., d_model) raw activations, any float dtype. a_i is the latent's present activation
    (after TopK) and d_i its decoder direction; all a_i are read before anything is added. Returns
    float32 (..., d_model), exactly 0 where every target equals the present activation.
    """
    latents = torch.tensor([s.latent for s in steers], dtype=torch.int64, device=sae.W_dec.device)
    z, _, scale = standardise(x, sae.config.norm_eps)
    changes = _activation_changes(sae, steers, latents, z.reshape(-1, z.shape[-1]))
    return (changes @ sae.W_dec.detach()[latents]).reshape(z.shape) * scale


def _activation_changes(
    sae: TopKSparseAutoencoder, steers: Sequence[Steer], latents: Tensor, z: Tensor
) -> Tensor:
    """Return (n_tokens, m) target − present activation; the encoder runs only where it must."""
    present = z.new_zeros(z.shape[0], len(steers))
    if any(steer.mode != "add" for steer in steers):
        present = sae.latent_activations(z, latents)
    columns = []
    for i, steer in enumerate(steers):
        a = present[:, i]
        columns.append(
            {
                "add": torch.full_like(a, steer.amount),
                "set": steer.amount - a,
                "scale": (steer.amount - 1.0) * a,
                "ablate": -a,
            }[steer.mode]
        )
    return torch.stack(columns, dim=1) if columns else present
