"""The sparse autoencoder: model, checkpoints, steering edit.

Sources: Gao et al., "Scaling and evaluating sparse autoencoders", arXiv:2406.04093 (TopK);
Bussmann et al., arXiv:2412.06410 (BatchTopK); Rajamanoharan et al., arXiv:2407.14435 (JumpReLU) and
arXiv:2404.16014 (gated).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from saint.stage.errors import UserError
from saint.stage.files import atomic_path, read_json, save_torch, write_json
from saint.stage.manifests import file_checksum

FORMAT = "saint.sae"
VERSIONS = (1, 2)  # 2: says something that version 1 had no word for
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "gated")
NORMALISATIONS = ("per_token_standardise", "none", "scalar")
_SINCE_2 = {"since": 2}  # left out of a file where it is the default: version 1 did not know it
# Pre-activations of one block: 2^26 float32 are 256 MB.
BLOCK_ELEMENTS = 1 << 26
_RULE_TENSORS = ("threshold", "magnitude_scale", "magnitude_bias")
_WIDENED_ROWS = 1 << 13  # rows of narrower weights that are float32 at a time


@dataclass(frozen=True)
class SAEConfig:
    """What a checkpoint says about itself.

    k: active latents per token, exactly (topk) or on average (batchtopk); 0 where the rule has no
    such number. layer, hook_point, prepend_bos, max_token_length: where its inputs were captured.
    normalisation: what is done to raw activations, one of NORMALISATIONS: each token standardised,
    with norm_eps added to its deviation; nothing; or all multiplied by norm_factor.
    held_out_*: the rule of the held-out split. *_fingerprint: identity of the language model and
    the sentence dataset. activation: one of ACTIVATIONS, see `SparseAutoencoder`. threshold:
    batchtopk's at inference, None before it is calibrated. model_name, source: of an SAE that
    another tool made, the language model's name there and what it was imported from.
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
    norm_factor: float = field(default=1.0, metadata=_SINCE_2)
    activation: str = field(default="topk", metadata=_SINCE_2)
    threshold: float | None = field(default=None, metadata=_SINCE_2)
    model_name: str | None = field(default=None, metadata=_SINCE_2)
    source: str | None = field(default=None, metadata=_SINCE_2)


@dataclass(frozen=True)
class ActiveLatents:
    """The active latents of n tokens, one token after the other.

    Token i's entries are offsets[i] to offsets[i + 1] of values (n_entries,) float32, at least 0
    (0 only where topk keeps one that does not fire), and indices (n_entries,) int64, distinct in a
    token. offsets: (n_tokens + 1,) int64. k: the entries of every token, None where they differ.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    k: int | None = None

    @classmethod
    def of_matrices(cls, values: Tensor, indices: Tensor) -> ActiveLatents:
        """Take (n_tokens, k) matrices."""
        n_tokens, k = values.shape
        offsets = torch.arange(n_tokens + 1, device=values.device) * k
        return cls(values.reshape(-1), indices.reshape(-1), offsets, k)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return values and indices (n_tokens, k), or as wide as needed, both filled up with 0."""
        n_tokens = len(self.offsets) - 1
        if self.k is not None:
            shape = (n_tokens, self.k)
            return self.values.view(shape), self.indices.view(shape)
        counts = self.offsets.diff()
        width = int(counts.max()) if n_tokens else 0
        place = torch.arange(width, device=counts.device) < counts.unsqueeze(1)
        values, indices = self.values.new_zeros(place.shape), self.indices.new_zeros(place.shape)
        values[place], indices[place] = self.values, self.indices
        return values, indices

    def tokens(self) -> Tensor:
        """Return (n_entries,) each entry's token."""
        n_tokens, n_entries = len(self.offsets) - 1, len(self.indices)
        tokens = torch.arange(n_tokens, device=self.offsets.device)
        return torch.repeat_interleave(tokens, self.offsets.diff(), output_size=n_entries)


def normalise(x: Tensor, config: SAEConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Bring raw activations into an SAE's input space.

    x: (..., d_model), any float dtype. Returns float32 z (..., d_model), mean and scale (..., 1),
    with x = z * scale + mean.
    """
    if config.normalisation == "per_token_standardise":
        return standardise(x, config.norm_eps)
    x = x.float()
    mean = x.new_zeros(*x.shape[:-1], 1)
    if config.normalisation == "none":
        return x, mean, torch.ones_like(mean)
    return x * config.norm_factor, mean, torch.full_like(mean, 1 / config.norm_factor)


def denormalise(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Undo `normalise`, which returned mean and scale."""
    return z * scale + mean


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
    """x̂ = W_decᵀ · f(W_enc · (x − b_pre) + b_enc) + b_pre, on normalised tokens.

    W_enc, W_dec: (n_latents, d_model), rows are latents' encoder and decoder directions; decoder
    rows have unit norm. b_enc: (n_latents,). b_pre: (d_model,). All float32, or W_enc and W_dec in
    a narrower dtype, which are multiplied in float32.

    f, by config.activation: topk, a token's k largest after ReLU; batchtopk, what exceeds
    config.threshold; jumprelu, what exceeds threshold (n_latents,); relu, what exceeds 0; gated,
    ReLU(magnitude_scale · W_enc · (x − b_pre) + magnitude_bias) where the encoder's output exceeds
    0. A topk with magnitude_scale (n_latents,) multiplies what it kept. The three are None where
    the rule has none.

    max_activations: (n_latents,) float32, each latent's largest activation over the captured
    tokens with these weights (the steering unit), or None where it is not known.
    """

    threshold: nn.Parameter | None
    magnitude_scale: nn.Parameter | None
    magnitude_bias: nn.Parameter | None

    def __init__(
        self,
        config: SAEConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        scaled: bool = False,
    ):
        """dtype: of W_enc and W_dec. scaled: whether a topk has magnitude_scale."""
        super().__init__()
        self.config = config
        n, d, gated = config.n_latents, config.d_model, config.activation == "gated"
        self.W_enc = nn.Parameter(torch.empty(n, d, device=device, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(n, device=device))
        self.W_dec = nn.Parameter(torch.empty(n, d, device=device, dtype=dtype))
        self.b_pre = nn.Parameter(torch.zeros(d, device=device))

        def per_latent(wanted: bool, value: float) -> nn.Parameter | None:
            return nn.Parameter(torch.full((n,), value, device=device)) if wanted else None

        self.threshold = per_latent(config.activation == "jumprelu", 0.0)
        self.magnitude_scale = per_latent(gated or scaled, 1.0)
        self.magnitude_bias = per_latent(gated, 0.0)
        self.max_activations: Tensor | None = None

    @torch.no_grad()
    def initialise(self, mean: Tensor, *, seed: int, part: tuple[int, int] = (0, 1)) -> None:
        """Draw random unit decoder directions, the encoder as their transpose, b_pre as the mean.

        mean: (d_model,) in the normalised input space. The draw is the same on every device. part:
        (i, n), this is the i-th of n equal parts of an SAE's latents, and gets that one's rows.
        """
        generator, n_here = torch.Generator().manual_seed(seed), self.config.n_latents
        first, n_in_all = part[0] * n_here, part[1] * n_here
        for start in range(0, first + n_here, 4096):
            n_rows = min(4096, n_in_all - start)
            draw = torch.randn(n_rows, self.config.d_model, generator=generator)
            draw /= torch.linalg.vector_norm(draw, dim=1, keepdim=True)
            own = draw[max(first - start, 0) : first + n_here - start]
            at = max(start - first, 0)
            self.W_dec[at : at + len(own)].copy_(own)
        self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_pre.copy_(mean)

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z, mean and scale of raw x, see the function of that name."""
        return normalise(x, self.config)

    def pre_activations(self, x: Tensor) -> Tensor:
        """Return (n_tokens, n_latents) float32 encoder outputs of normalised x, before f."""
        if self.W_enc.dtype == torch.float32:
            return torch.addmm(self.b_enc, x - self.b_pre, self.W_enc.T)
        pre, a = x.new_empty(len(x), len(self.W_enc)), x - self.b_pre
        for start in range(0, len(self.W_enc), _WIDENED_ROWS):  # a part of the weights at a time
            rows = slice(start, start + _WIDENED_ROWS)
            pre[:, rows] = torch.addmm(self.b_enc[rows], a, self.W_enc[rows].float().T)
        return pre

    @torch.no_grad()
    def encode(self, x: Tensor) -> ActiveLatents:
        """Return the latents that the rule keeps of each token.

        x: (n_tokens, d_model), already normalised. Memory is bounded by a block of pre-activations
        and the result: long inputs go in blocks. Raises ValueError for a batchtopk without a
        threshold.
        """
        if self.config.activation == "topk":
            if self.W_enc.dtype == torch.float32:
                found = encode(x - self.b_pre, self.W_enc, self.b_enc, self.config.k)
            else:
                parts = [pre.topk(self.config.k, sorted=False) for pre in self._pre_by_block(x)]
                kept, indices = map(torch.cat, zip(*parts, strict=True))
                found = kept.relu_(), indices
            return self.of_topk(ActiveLatents.of_matrices(*found))
        values, indices, counts = [], [], [torch.zeros(1, dtype=torch.int64, device=x.device)]
        for pre in self._pre_by_block(x):
            active = self._apply_rule(pre)
            counts.append(active.count_nonzero(dim=1))
            indices.append(active.nonzero()[:, 1])
            values.append(pre[active])
        offsets = torch.cat(counts).cumsum(0)
        return ActiveLatents(torch.cat(values), torch.cat(indices), offsets)

    def of_topk(self, kept: ActiveLatents) -> ActiveLatents:
        """Return a topk's result from what the encoder product kept."""
        values, indices = kept.values, kept.indices.long()
        if self.magnitude_scale is not None:
            values = values * self.magnitude_scale.detach()[indices]
        return replace(kept, values=values, indices=indices)

    def _pre_by_block(self, x: Tensor) -> Iterator[Tensor]:
        rows = max(1, BLOCK_ELEMENTS // self.config.n_latents)
        for start in range(0, max(1, len(x)), rows):
            yield self.pre_activations(x[start : start + rows])

    def _apply_rule(self, pre: Tensor) -> Tensor:
        """Turn pre (n_tokens, n_latents) into activations, in place; returns where they are > 0."""
        rule = self.config.activation
        if rule == "gated":
            assert self.magnitude_scale is not None and self.magnitude_bias is not None
            active = pre > 0
            pre.sub_(self.b_enc).mul_(self.magnitude_scale).add_(self.magnitude_bias)
            return active & (pre > 0)
        if rule == "jumprelu":
            assert self.threshold is not None
            return pre > self.threshold.clamp_min(0)
        if rule == "batchtopk":
            if self.config.threshold is None:
                raise ValueError("this BatchTopK SAE has no threshold yet: it was not calibrated")
            return pre > max(self.config.threshold, 0.0)
        return pre > 0

    @torch.no_grad()
    def decode(self, active: ActiveLatents) -> Tensor:
        """Return the (n_tokens, d_model) normalised reconstruction of active latents."""
        if self.W_dec.dtype == torch.float32:
            summed = F.embedding_bag(
                active.indices,
                self.W_dec,
                active.offsets,
                per_sample_weights=active.values,
                mode="sum",
                include_last_offset=True,
            )
            return summed + self.b_pre
        decoded = self.b_pre.new_zeros(len(active.offsets) - 1, len(self.b_pre))
        tokens = active.tokens()
        for start in range(0, len(tokens), _WIDENED_ROWS):
            part = slice(start, start + _WIDENED_ROWS)
            rows = self.W_dec[active.indices[part]].float() * active.values[part, None]
            decoded.index_add_(0, tokens[part], rows)
        return decoded.add_(self.b_pre)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct normalised tokens x: (n_tokens, d_model)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def reconstruct(self, activations: Tensor) -> Tensor:
        """Reconstruct raw activations (..., d_model), in their own scale and dtype."""
        z, mean, scale = self.normalise(activations)
        flat = z.reshape(-1, z.shape[-1])
        return denormalise(self(flat).reshape(z.shape), mean, scale).to(activations.dtype)

    @torch.no_grad()
    def latent_activations(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return (n_tokens, m) activations of m latents, as `encode` has them, on normalised x."""
        active = self.encode(x)
        hits = active.indices.unsqueeze(1) == latents.to(active.indices.device)
        found = active.values.new_zeros(len(x), len(latents))
        return found.index_add_(0, active.tokens(), active.values.unsqueeze(1) * hits)


@torch.no_grad()
def normalise_decoder(sae: TopKSparseAutoencoder) -> None:
    """Give each latent's decoder direction unit norm again."""
    sae.W_dec.div_(torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True).clamp_min(1e-12))


def save_sae(path: Path, sae: TopKSparseAutoencoder) -> None:
    """Write a checkpoint atomically; `decoder.weight` is stored as (d_model, n_latents).

    A path that ends in .safetensors becomes such a file, whose metadata hold the config, with the
    same config beside it as .json for people; any other one is written by `torch.save`.
    """
    # The decoder is transposed where it lies: a GPU does that in no time.
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in file_tensors(sae).items()}
    write_sae(path, sae.config, state, sae.max_activations)


def write_sae(
    path: Path, config: SAEConfig, state: dict[str, Tensor], maximum: Tensor | None
) -> None:
    """Write the file of `save_sae`: state has its contiguous tensors, on the CPU, by their names.

    maximum: max_activations.
    """
    header = describe(config, state)
    maximum = None if maximum is None else maximum.cpu()
    if path.suffix != ".safetensors":
        header["config"]["max_activations"] = maximum
        save_torch(path, header | {"state_dict": state})
        return
    if maximum is not None:
        state["max_activations"] = maximum
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata=as_metadata(header))
    write_header(path, header)


def write_header(path: Path, header: Mapping[str, Any]) -> None:
    """Write what `describe` returned beside a safetensors file, with the file's checksum."""
    write_json(path.with_suffix(".json"), {**header, "checksum": file_checksum(path)})


def describe(config: SAEConfig, names: Collection[str]) -> dict[str, Any]:
    """Return format, version and config of a file with tensors of these names."""
    said = asdict(config)
    for known in fields(SAEConfig):
        if known.metadata == _SINCE_2 and said[known.name] == known.default:
            del said[known.name]
    later = {f.name for f in fields(SAEConfig) if f.metadata == _SINCE_2} | set(_RULE_TENSORS)
    other = config.normalisation != NORMALISATIONS[0]
    version = 2 if other or later & (said.keys() | set(names)) else 1
    return {"format": FORMAT, "version": version, "config": said}


def as_metadata(header: Mapping[str, Any]) -> dict[str, str]:
    """Return what `describe` returned as a safetensors file's metadata."""
    return {
        "format": header["format"],
        "version": str(header["version"]),
        "config": json.dumps(header["config"]),
    }


def file_tensors(sae: TopKSparseAutoencoder) -> dict[str, Tensor]:
    """Return an SAE's parameters by their names in a file, as views."""
    tensors = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T,
        "b_pre": sae.b_pre,
    }
    rule = {name: getattr(sae, name) for name in _RULE_TENSORS}
    return tensors | {name: tensor for name, tensor in rule.items() if tensor is not None}


def load_sae(
    path: Path | str,
    *,
    device: torch.device | str,
    k: int | None = None,
    layer: int | None = None,
    hook_point: str | None = None,
    no_bos: bool = False,
    dtype: torch.dtype = torch.float32,
    part: tuple[int, int] = (0, 1),
) -> TopKSparseAutoencoder:
    """Load a checkpoint written by `save_sae`, or a bare state dict with the same keys.

    k, layer, hook_point, no_bos: what a bare state dict (older checkpoints) does not know; for a
    full checkpoint they must agree with it. dtype: of W_enc and W_dec. part: (i, n), only the i-th
    of n equal parts of its latents. Raises UserError when the file is missing, damaged, of an
    unknown version or another tool's, when a tensor disagrees with the config, or when a flag
    contradicts it.
    """
    path = Path(path)
    config, state = read_sae(path)
    if config is None:
        config = _bare_config(path, state, k, layer, hook_point, no_bos)
    else:
        _refuse_contradictions(path, config, k=k, layer=layer, hook_point=hook_point, no_bos=no_bos)
    _refuse_bad_k(path, config)
    if part[1] > 1:
        config, state = _only(path, config, state, part)
    maximum, scaled = state.pop("max_activations", None), "magnitude_scale" in state
    sae = TopKSparseAutoencoder(config, device=device, dtype=dtype, scaled=scaled)
    _copy_state(path, sae, state)
    if maximum is not None:
        sae.max_activations = maximum.to(device)
    return sae.requires_grad_(False)


def read_sae(path: Path) -> tuple[SAEConfig | None, dict[str, Tensor]]:
    """Return a checkpoint's config, None for a bare state dict, and its memory-mapped tensors.

    max_activations is among them where it is known. Raises UserError as `load_sae` does.
    """
    record = _read_checkpoint(path)
    if "state_dict" not in record:
        return None, {name.removeprefix("module."): tensor for name, tensor in record.items()}
    if record.get("format") != FORMAT or record.get("version") not in VERSIONS:
        raise UserError(
            f"{path}: format {record.get('format')} version {record.get('version')} "
            "is not known here"
        )
    if not (isinstance(record.get("config"), dict) and isinstance(record["state_dict"], dict)):
        raise UserError(f"{path} is not an SAE checkpoint: its config or state_dict is damaged")
    said, state = dict(record["config"]), dict(record["state_dict"])
    maximum = said.pop("max_activations", None)
    if maximum is not None:
        state["max_activations"] = maximum
    unknown = said.keys() - {known.name for known in fields(SAEConfig)}
    if unknown:
        raise UserError(f"{path} says {', '.join(sorted(unknown))}, which is not known here")
    config = _checked(path, said, state)
    for name, known in (("activation", ACTIVATIONS), ("normalisation", NORMALISATIONS)):
        if getattr(config, name) not in known:
            raise UserError(f"{path} has the {name} {getattr(config, name)}, not known here")
    return config, state


def _checked(path: Path, said: dict[str, Any], state: dict[str, Any]) -> SAEConfig:
    """Return the config that a file states, once its values and its tensors are what they say.

    Nothing is allocated by these numbers before they agree with the tensors.
    """
    kinds = {"int": int, "str": str, "bool": bool, "float": int | float}
    for known in fields(SAEConfig):
        kind, value = str(known.type), said.get(known.name, known.default)
        fits = isinstance(value, kinds[kind.split(" ")[0]]) and (type(value) is bool) == (
            kind == "bool"
        )
        if not fits and not (value is None and "None" in kind):
            raise UserError(f"{path} is damaged: its config says {known.name} {str(value)[:40]}")
    config = SAEConfig(**said)
    shapes = {
        "encoder.weight": (config.n_latents, config.d_model),
        "max_activations": (config.n_latents,),
    }
    for name, tensor in state.items():
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if not isinstance(tensor, Tensor) or shape != shapes.get(name, shape):
            raise UserError(f"{path}: {name} has shape {shape}, expected {shapes.get(name, 'any')}")
    if "encoder.weight" not in state:
        raise UserError(f"{path} has no tensor encoder.weight")
    return config


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} does not exist: train an SAE first (sae_training.py)")
    try:
        if not _is_intact(path):
            raise ValueError("its bytes are not those that were written")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, SafetensorError),
        zipfile.BadZipFile,
    ):
        raise UserError(
            f"{path} is not a readable SAE checkpoint: damaged, or not sae_training.py's"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is not an SAE checkpoint")
    return record


def _is_intact(path: Path) -> bool:
    """Whether a file's own checksums hold: torch.save's, or that in the .json beside it."""
    if path.suffix != ".safetensors":
        if not zipfile.is_zipfile(path):
            return True  # an older torch's, or none at all
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    beside = path.with_suffix(".json")
    header = read_json(beside) if beside.exists() else None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        return True
    return header.get("checksum") in (None, file_checksum(path))


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return the record that `torch.save` would have been given."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "config" not in metadata:
        return state
    return {
        "format": metadata.get("format"),
        "version": int(metadata.get("version", 0)),
        "config": json.loads(metadata["config"]),
        "state_dict": state,
    }


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


def _refuse_bad_k(path: Path, config: SAEConfig) -> None:
    n = config.n_latents
    if config.activation == "topk" and not 1 <= config.k <= n:
        raise UserError(f"{path}: k {config.k} is not between 1 and its {n} latents")


def _only(
    path: Path, config: SAEConfig, state: dict[str, Tensor], part: tuple[int, int]
) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Return config and tensors, views, of the i-th of n equal parts of the latents."""
    i, n = part
    if config.n_latents % n:
        raise UserError(f"{path} has {config.n_latents} latents, which {n} ranks cannot share")
    n_here = config.n_latents // n
    own = slice(i * n_here, (i + 1) * n_here)
    cut = {name: tensor if name == "b_pre" else tensor[own] for name, tensor in state.items()}
    if "decoder.weight" in state:
        cut["decoder.weight"] = state["decoder.weight"][:, own]
    return replace(config, n_latents=n_here), cut


@torch.no_grad()
def _copy_state(path: Path, sae: TopKSparseAutoencoder, state: dict[str, Tensor]) -> None:
    for name, parameter in file_tensors(sae).items():
        tensor = state.get(name)
        if tensor is None:
            hint = (
                "" if name in _RULE_TENSORS else " (another tool's SAE? saint_exchange.py import)"
            )
            raise UserError(f"{path} has no tensor {name}{hint}")
        if tensor.shape != parameter.shape:
            shapes = tuple(tensor.shape), tuple(parameter.shape)
            raise UserError(f"{path}: {name} has shape {shapes[0]}, expected {shapes[1]}")
        parameter.copy_(tensor)


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
    """Return scale · Σ_i (target_i − a_i) · d_i, what steering adds to activations x.

    x: (..., d_model) raw activations, any float dtype. scale is `normalise`'s, a token's deviation
    where tokens are standardised. a_i is the latent's present activation and d_i its decoder
    direction; all a_i are read before anything is added. Returns float32 (..., d_model), exactly 0
    where every target equals the present activation.
    """
    latents = torch.tensor([s.latent for s in steers], dtype=torch.int64, device=sae.W_dec.device)
    z, _, scale = sae.normalise(x)
    changes = _activation_changes(sae, steers, latents, z.reshape(-1, z.shape[-1]))
    return (changes @ sae.W_dec.detach()[latents].float()).reshape(z.shape) * scale


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
